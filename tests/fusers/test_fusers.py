"""The fusers in CCRA's place: which layers they read, what is peculiar to each, that all of them
train and answer."""
import math

import pytest
import torch

from ccra import FUSERS, NAMED, VLM
from clip import CLIPVision, CLIPVisionConfig
from core.common import ROOT, UserError
from fusers.common import at
from fusers.dense_connector import DenseConnector, DenseConnectorConfig
from fusers.igva import IGVA, IGVAConfig
from fusers.llava import LLaVA, LLaVAConfig
from fusers.mlvf import MLVF, MLVF_LAYERS, MLVFConfig
from fusers.mmfuser import Deformable, MMFuser, MMFuserConfig
from llama import Llama, LlamaConfig

pytestmark = pytest.mark.usefixtures("one_thread")

# (width, tokens, own parameters, what the projector has beyond LLaVA's) for CLIP ViT-L/336 and a
# language model of 4096
PAPER = {
    "ccra": (2048, 576, 3_545_216, 4_194_304), "llava": (1024, 576, 0, 0),
    "wide": (2048, 576, 0, 4_194_304), "sti": (1024, 720, 0, 0), "sci": (3072, 576, 0, 8_388_608),
    "dci": (3072, 576, 0, 8_388_608), "mmfuser": (1024, 576, 5_190_592, 0), "igva":
        (2048, 576, 30_455_812, 4_194_304), "mlvf": (3072, 576, 0, 8_388_608), "pwca":
            (2048, 576, 2_230_400, 4_194_304), "lwca": (2048, 576, 2_230_400, 4_194_304)}


def count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def fuser(config):
    return next(fuser for fuser, kind in FUSERS.values() if type(config) is kind)(config)


@pytest.mark.parametrize("name", NAMED)
def test_sizes_of_the_paper(name):
    """And what the README says of them."""
    kind, settings = NAMED[name]
    with torch.device("meta"):
        llm = Llama(
            LlamaConfig(vocab_size=8, hidden_size=4096, intermediate_size=8, num_hidden_layers=1,
                        num_attention_heads=32))
        model = VLM.build(CLIPVision(CLIPVisionConfig()), llm, kind(**settings))
    wider = count(model.projector) - 20_979_712
    assert (model.fuser.width, model.picture_rows, count(model.fuser), wider) == PAPER[name]
    row, = [
        line for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith(f"| `{name}` |")]
    width, tokens, own, wider = PAPER[name]
    assert row.split(" | ")[2:] == [f"{width} x {tokens}", f"{own:,}", f"{wider:,} |"]


def test_counts_that_were_published():
    with torch.device("meta"):
        # beside a sentence vector of 768
        assert count(IGVA(IGVAConfig(text_dim=768))) == 27_047_940
        mmfuser = MMFuser(MMFuserConfig())
        assert count(mmfuser.cross) == 2_886_400 and count(mmfuser.within) == 2_296_000
        widths = {layers: MLVF(MLVFConfig(layers=layers)).width for layers in MLVF_LAYERS}
    assert widths == {"18": 2048, "3-18-23": 3072, "former": 2048, "latter": 2048, "all": 3072}


# --------------------------------------------------------------------------------------------------
# Which layers

def squares(L, N=16, d=16):
    """hidden whose layer l is l^2 everywhere, so that a mean tells of which layers it is; CLS is
    something else."""
    hidden = (torch.arange(L + 1.0).double() ** 2)[:, None, None, None].repeat(1, 1, 1 + N, d)
    hidden[:, :, 0] = -1
    return hidden


def mean(start, stop):
    return sum(l ** 2 for l in range(start, stop)) / (stop - start)


@pytest.mark.parametrize("config, layers", [
    (LLaVAConfig(16), [529]), (LLaVAConfig(16, copies=2), [529, 529]),
    (DenseConnectorConfig(16, kind="sci"), [529, 49, 225]),
    # with the embeddings, without the last
    (DenseConnectorConfig(16), [529, mean(0, 12), mean(12, 24)]),
    (MLVFConfig(16, layers="18"), [324, 529]), (MLVFConfig(16), [9, 324, 529]),
    (MLVFConfig(16, layers="former"), [mean(1, 13), 529]),
    (MLVFConfig(16, layers="latter"), [mean(13, 25), 529]),
    (MLVFConfig(16, layers="all"), [mean(1, 13), mean(13, 25), 529]),
    (DenseConnectorConfig(16, n_layers=8, kind="sci"), [49, 4, 25]),  # another depth
    (DenseConnectorConfig(16, n_layers=8), [49, mean(0, 4), mean(4, 8)]),
    (MLVFConfig(16, n_layers=8, layers="all"), [mean(1, 5), mean(5, 9), 49])], ids=str)
def test_channels_are_the_published_layers(config, layers):
    model = fuser(config)
    features, maps = model(squares(config.n_layers)[:model.n_blocks + 1], None, None)
    assert features.shape == (1, 16, model.width) and not maps
    seen = features.view(16, len(layers), -1)
    assert torch.allclose(seen,
                          torch.tensor(layers, dtype=torch.float64)[:, None].expand_as(seen),
                          rtol=1e-12)


def test_depths():
    assert [at(l, 24) for l in range(25)] == list(range(25))
    for L in range(4, 49):
        for kind, settings in NAMED.values():
            if "text_dim" not in kind.__dataclass_fields__:
                model = fuser(kind(vision_dim=16, n_layers=L, **settings))
                assert model(torch.randn(model.n_blocks + 1, 1, 17, 16), None,
                             None)[0].isfinite().all()
        groups = IGVA(IGVAConfig(4, 8, L)).groups
        assert groups[0][0] == 1 and groups[-1][1] == L + 1 and all(a < b for a, b in groups)
        assert all(first[1] == second[0] for first, second in zip(groups, groups[1:]))


def test_wide_is_llava_twice():
    hidden = torch.randn(25, 2, 5, 8)
    once, _ = LLaVA(LLaVAConfig(8))(hidden, None, None)
    assert torch.equal(
        LLaVA(LLaVAConfig(8, copies=2))(hidden, None, None)[0], torch.cat([once, once], -1))


def test_sti_pools_eight_patches_that_follow_each_other():
    hidden, model = torch.randn(24, 2, 577, 4, dtype=torch.float64), DenseConnector(
        DenseConnectorConfig(4, kind="sti"))
    features, _ = model(hidden, None, None)
    assert features.shape == (2, 720, 4) and model.rows(576) == 720
    assert torch.equal(features[:, :576], hidden[23][:, 1:])
    for k, layer in enumerate((7, 15)):
        for i in range(72):                                              # 3 of them are a row of 24
            expected = sum(hidden[layer][:, 1 + 8 * i + j] for j in range(8)) / 8
            assert torch.allclose(features[:, 576 + 72 * k + i], expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# MMFuser

def deformable_by_hand(model, query, levels):
    """The same, point by point, with the four patches around a point."""
    (B, N, d), (H, K, P), side = query.shape, model.shape, math.isqrt(query.shape[1])
    offsets = (query @ model.offsets.weight.T + model.offsets.bias).view(B, N, H, K, P, 2)
    shares = (query @ model.shares.weight.T + model.shares.bias).view(B, N, H,
                                                                      K * P).softmax(-1).view(
                                                                          B, N, H, K, P)
    value = (levels @ model.value.weight.T + model.value.bias).view(B, K, side, side, H, d // H)
    out = torch.zeros(B, N, H, d // H, dtype=query.dtype)
    for b in range(B):
        for n in range(N):
            for h in range(H):
                for k in range(K):
                    for p in range(P):
                        x, y = n % side + offsets[b, n, h, k, p, 0], n // side + offsets[b, n, h, k,
                                                                                         p, 1]
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < side and 0 <= column < side:
                                    near = (1 - abs(x - column)) * (1 - abs(y - row))
                                    out[b, n, h] += shares[b, n, h, k, p] * near * value[b, k, row,
                                                                                         column, h]
    return out.view(B, N, d) @ model.out.weight.T + model.out.bias


def test_deformable_attention_point_by_point():
    torch.manual_seed(0)
    model = Deformable(6, heads=2, levels=2, points=2).double()
    query, levels = torch.randn(2, 9, 6).double(), torch.randn(2, 2, 9, 6).double()
    with torch.no_grad():
        at_first = model(query, levels)
        assert torch.allclose(at_first, deformable_by_hand(model, query, levels), rtol=1e-10,
                              atol=1e-12)
        for p in model.parameters():
            p.normal_(0, 0.7)
        later = model(query, levels)
        assert torch.allclose(later, deformable_by_hand(model, query, levels), rtol=1e-10,
                              atol=1e-12)
    assert not torch.allclose(at_first, later, atol=0.1)


def test_deformable_attention_starts_as_a_ring():
    model = Deformable(32, heads=16, levels=3, points=4)
    ring = model.offsets.bias.detach().view(16, 3, 4, 2)
    for h, (x, y) in {0: (1, 0), 2: (1, 1), 4: (0, 1), 8: (-1, 0), 14: (1, -1)}.items():
        for p in range(4):
            assert torch.allclose(ring[h, :, p], torch.tensor([x, y]) * (p + 1.0), atol=1e-5)
    assert torch.allclose(ring.abs().amax(-1), torch.arange(1, 5.0).expand(16, 3, 4))
    assert not model.offsets.weight.any() and not model.shares.weight.any(
    ) and not model.out.bias.any()


def test_mmfuser_starts_as_llava_and_reads_its_layers():
    torch.manual_seed(0)
    hidden, model = torch.randn(24, 2, 17, 32), MMFuser(MMFuserConfig(32))
    for dtype in (torch.float32, torch.bfloat16):
        out, maps = model(hidden.to(dtype), None, None)
        assert torch.equal(out, hidden.to(dtype)[23][:, 1:]) and not maps
    with torch.no_grad():
        model.gamma1.fill_(0.5), model.gamma2.fill_(0.5)
        plain, read = model(hidden, None, None)[0], []
        for l in range(24):
            other = hidden.clone()
            other[l] += torch.randn(2, 17, 32)
            read += [l] * (not torch.equal(model(other, None, None)[0], plain))
    assert read == [3, 8, 13, 18, 23]


def test_mmfuser_by_hand():
    torch.manual_seed(0)
    hidden, model = torch.randn(24, 1, 10, 32).double(), MMFuser(MMFuserConfig(32)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
        def norm(x, layer):
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias
        X, others = hidden[23][:, 1:], torch.stack([hidden[l][:, 1:] for l in (3, 8, 13, 18)], 1)
        A = deformable_by_hand(model.cross, norm(X, model.query_norm),
                               norm(others, model.level_norm))
        S = deformable_by_hand(model.within, norm(A, model.within_norm),
                               norm(A, model.within_norm)[:, None])
        expected = X + model.gamma1 * (A + model.gamma2 * S)
        assert torch.allclose(model(hidden, None, None)[0], expected, rtol=1e-9, atol=1e-11)


def test_mmfuser_is_not_computed_in_bfloat16():
    model, hidden = MMFuser(MMFuserConfig(32)), torch.randn(24, 1, 17, 32)
    with torch.no_grad():
        model.gamma1.fill_(0.5), model.gamma2.fill_(0.5)
        exact, _ = model(hidden, None, None)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(hidden, None, None)[0], exact)
        half, _ = model.bfloat16()(hidden.bfloat16(), None, None)
    assert half.dtype == torch.bfloat16 and (half - exact).norm() < 0.02 * exact.norm()


# --------------------------------------------------------------------------------------------------
# IGVA

def igva(seed=0):
    torch.manual_seed(seed)
    model, F_t = IGVA(IGVAConfig(6, 8)).double(), torch.randn(3, 4, 6).double()
    return model, torch.randn(25, 3, 5, 8).double(), F_t, torch.arange(4) < torch.tensor([[4], [2],
                                                                                          [0]])


def test_igva_without_text_is_the_mean_of_its_layers():
    model, hidden, F_t, mask = igva()
    for mode in ("off", "neutral"):
        out, maps = model(hidden, F_t, mask, mode)
        assert torch.equal(out,
                           model(hidden, F_t + 1, mask,
                                 mode)[0]) and maps["w_group"].eq(0.25).all()
        assert torch.equal(out[..., :8], hidden[23][:, 1:])
        assert torch.allclose(out[..., 8:], hidden[1:25, :, 1:].mean(0), rtol=1e-12)  # 24 in, 0 out


def test_igva_shares_out_by_the_question():
    model, hidden, F_t, mask = igva()
    out, maps = model(hidden, F_t, mask)
    w = maps["w_group"]
    assert w.shape == (3, 4) and torch.allclose(w.sum(1), torch.ones(3).double())
    expected = sum(w[:, k, None, None] * hidden[1 + 6 * k:7 + 6 * k, :, 1:].mean(0)
                   for k in range(4))
    assert torch.allclose(out[..., 8:], expected, rtol=1e-12) and torch.equal(
        out[..., :8], hidden[23][:, 1:])
    padded = F_t.masked_fill(~mask[..., None], 7.0)
    assert torch.equal(model(hidden, padded, mask)[1]["w_group"], w)
    asked = model(hidden, F_t.flip(2), mask)[1]["w_group"]
    # who says nothing asks nothing
    assert not torch.allclose(asked[:2], w[:2]) and torch.equal(asked[2], w[2])
    for row in (0, 1):  # the mean of its words alone
        alone = F_t[row, mask[row]].mean(0)[None, None]
        again = model(hidden[:, row, None], alone, torch.ones(1, 1, dtype=torch.bool))[1]["w_group"]
        assert torch.allclose(again, w[row], rtol=1e-12)
    assert torch.equal(model(hidden, F_t[:, :0], mask[:, :0])[1]["w_group"][2], w[2])


def test_igva_allocator_by_hand():
    """Four post-norm blocks, in each of which one query looks at the four groups' CLS with four
    heads."""
    model, hidden, F_t, mask = igva()
    def norm(x, layer):
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt(
        ) * layer.weight + layer.bias
    def apply(x, layer):
        return layer.weight @ x + layer.bias
    x = apply(F_t[0].mean(0), model.sentence)
    groups = [apply(hidden[1 + 6 * k:7 + 6 * k, 0, 0].mean(0), model.cls) for k in range(4)]
    for block in model.blocks:
        (q, k, v), (bq, bk, bv) = (p.chunk(3) for p in (block.attention.in_proj_weight,
                                                        block.attention.in_proj_bias))
        heads = []
        for h in (slice(i, i + 2) for i in range(0, 8, 2)):
            scores = torch.stack([
                (q @ x + bq)[h] @ (k @ g + bk)[h] / math.sqrt(2) for g in groups]).softmax(0)
            heads.append(sum(s * (v @ g + bv)[h] for s, g in zip(scores, groups)))
        x = norm(x + apply(torch.cat(heads), block.attention.out_proj), block.norm1)
        x = norm(x + apply(apply(x, block.ffn[0]).relu(), block.ffn[2]), block.norm2)
    expected = apply(x, model.out).softmax(0)
    assert torch.allclose(model(hidden, F_t, mask)[1]["w_group"][0], expected, rtol=1e-9)


@pytest.mark.parametrize("make, match", [
    (lambda: LLaVAConfig(copies=0), "copies"),
    (lambda: DenseConnectorConfig(kind="sdi"), "sti, sci, dci"),
    (lambda: MLVFConfig(layers="3"), "layers"),
    (lambda: MLVFConfig(n_layers=1.0), "MLVF: n_layers"),
    (lambda: MMFuserConfig(vision_dim=24), "multiple of heads"),
    (lambda: IGVAConfig(n_layers=3), "n_layers = 3"),
    (lambda: IGVAConfig(text_dim=True), "text_dim"),
    (lambda: IGVAConfig(vision_dim=6), "multiple of heads")])
def test_bad_settings(make, match):
    with pytest.raises(UserError, match=match):
        make()
