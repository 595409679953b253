"""ccra.py against the paper's equations written out, and the vision-language model against slow
twins."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import ccra
from ccra import CCRA, IGNORE, IMAGE_TOKEN, VLM, CCRAConfig, moments, smooth, standardise
from clip import CLIPVision, CLIPVisionConfig
from core.common import UserError
from llama import Llama, LlamaConfig, pick

TINY = CCRAConfig(text_dim=12, vision_dim=10, n_layers=4, d_hidden=6, kernel_size=3)
ABLATIONS = ({}, {"lpwca": False}, {"lwca": False}, {"pwca": False}, {"smooth": False})
pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------------------------------
# The oracle: eq. 1-14 as printed, one sample at a time, without padding, with every matrix the
# paper names

def literal_ln(x, norm, reading, layered):
    """x (L, N, d) if layered, else (N, d)."""
    axes = {"token": (-1, ), "joint": (-2, -1), "stack": (-3, -2, -1) if layered else
                                                         (-2, -1)}[reading]
    mean = x.mean(axes, keepdim=True)
    var = ((x - mean) ** 2).mean(axes, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * norm.weight + norm.bias


def literal_scores(part, F_t, X, cfg):
    """A = Q(F_t) K(X)^T / sqrt(h), (T, rows of X)."""
    return (F_t @ part.q.weight.T) @ (X @ part.k.weight.T).T / math.sqrt(cfg.d_hidden)


def literal_alpha(scorer, F_t):
    q, k, v = (F_t @ layer.weight.T for layer in (scorer.q, scorer.k, scorer.v))
    attended = torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v
    return torch.softmax((attended @ scorer.out.weight.T)[:, 0], dim=0)


def literal_lwca(model, F, alpha, F_t):
    """Eq. 6-10 on F (L, N, d)."""
    cfg, L = model.config, len(F)
    F_layer = F.mean(dim=1)                                                          # (6)
    A_l = literal_scores(model.lwca, F_t, F_layer, cfg)                              # (7)
    w_l = alpha @ A_l if cfg.lwca else F.new_zeros(L)                                # (8)
    w = w_l
    if cfg.smooth:
        g = [
            math.exp(-(j - (cfg.kernel_size - 1) / 2)**2 / (2 * cfg.sigma**2))
            for j in range(cfg.kernel_size)]
        w = torch.stack([
            sum(g[j] / sum(g) * w_l[min(max(l + j - (cfg.kernel_size - 1) // 2, 0), L - 1)]
                for j in range(cfg.kernel_size)) for l in range(L)])
    w_hat = torch.softmax(w, dim=0)
    F_hat = sum(w_hat[l] * F[l] for l in range(L))                                   # (9)
    x = F_hat + F_hat.mean(dim=0)
    return w_l, w_hat, literal_ln(x, model.lwca.norm, "token", False)                # (10)


def literal(model, F_stack, F_t):
    """F_stack (L, N, d), F_t (T, D) -> F_fused (N, 2d) and the maps."""
    cfg, (L, N, d) = model.config, F_stack.shape
    alpha = literal_alpha(model.scorer, F_t)                                         # (2)
    F_last = F_stack[cfg.anchor_layer]
    W_lp = F_stack.new_zeros(L, N)
    if cfg.order in ("progressive", "shuffled"):
        A_lp = literal_scores(model.lpwca, F_t, F_stack.reshape(L * N, d), cfg)      # (3) T x LN
        if cfg.lpwca:
            W_lp = (alpha @ A_lp).reshape(L, N)                                      # (4)
        F_lp = literal_ln(F_stack * W_lp[..., None] + F_stack, model.lpwca.norm, cfg.norm,
                          True)  # (5)
    if cfg.order == "progressive":
        w_l, w_hat, F_semantic = literal_lwca(model, F_lp, alpha, F_t)
        w_p = alpha @ literal_scores(model.pwca, F_t, F_semantic,
                                     cfg) if cfg.pwca else F_stack.new_zeros(N)  # (11, 12)
        left = literal_ln(F_semantic * (1 + w_p)[:, None], model.pwca.norm, cfg.norm, False)  # (13)
    elif cfg.order == "shuffled":
        w_p = torch.stack([alpha @ literal_scores(model.pwca, F_t, F_lp[l], cfg) for l in range(L)])
        w_p = w_p if cfg.pwca else torch.zeros_like(w_p)
        F_r = literal_ln(F_lp * (1 + w_p)[..., None], model.pwca.norm, cfg.norm, True)
        w_l, w_hat, left = literal_lwca(model, F_r, alpha, F_t)
    else:
        w_l, w_hat, S = literal_lwca(model, F_stack, alpha, F_t)
        w_p = alpha @ literal_scores(model.pwca, F_t, F_last,
                                     cfg) if cfg.pwca else F_stack.new_zeros(N)
        R = literal_ln(F_last * (1 + w_p)[:, None], model.pwca.norm, cfg.norm, False)
        left = {"decoupled": (S + R) / 2, "lwca_only": S, "pwca_only": R}[cfg.order]
        w_p = w_p if cfg.order != "lwca_only" else w_p * 0
        w_l, w_hat = (w_l, w_hat) if cfg.order != "pwca_only" else (w_l * 0, w_hat * 0 + 1 / L)
    F_fused = torch.cat([left, F_last], dim=1)                                       # (14)
    return F_fused, {"alpha": alpha, "W_lp": W_lp, "w_l": w_l, "w_hat": w_hat, "w_p": w_p}


def make(cfg, seed=0):
    """A CCRA in float64 whose norms and maps are far from trivial."""
    torch.manual_seed(seed)
    model = CCRA(cfg).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1 if name.endswith("norm.weight") else 0, 0.4)
    return model


def inputs(cfg, B=3, N=5, T=4, lengths=(4, 1, 3), dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    F_stack = torch.randn(B, cfg.n_layers, N, cfg.vision_dim, generator=g, dtype=torch.float64)
    F_stack = F_stack * torch.linspace(0.5, 3, cfg.n_layers)[:, None, None] + torch.randn(
        cfg.vision_dim, generator=g)
    F_t = torch.randn(B, T, cfg.text_dim, generator=g, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return F_stack.to(dtype), F_t.to(dtype), mask


def probe(features, maps):
    """A scalar that depends on everything, differently everywhere."""
    outputs = [features, *(maps[name] for name in sorted(maps))]
    return sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape).cos()).sum()
               for x in outputs)


def check_against_literal(cfg, anchor=-1):
    model = make(replace(cfg, anchor_layer=anchor))
    F_stack, F_t, mask = inputs(cfg)
    F_stack.requires_grad_(), F_t.requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    features, maps = model(F_stack, F_t, mask)
    rows = [literal(model, F_stack[b], F_t[b, mask[b]]) for b in range(len(F_stack))]
    expected = torch.stack([fused for fused, _ in rows])
    for _, row in rows:
        row["alpha"] = nn.functional.pad(row["alpha"], (0, F_t.shape[1] - len(row["alpha"])))
    expected_maps = {name: torch.stack([row[name] for _, row in rows]) for name in rows[0][1]}
    assert features.shape == (3, 5, 20) and set(maps) == set(expected_maps)
    assert (features - expected).abs().max() < 1e-9
    for name in maps:
        assert maps[name].shape == expected_maps[name].shape, name
        assert (maps[name] - expected_maps[name]).abs().max() < 1e-9, name
    leaves = {"F_stack": F_stack, "F_t": F_t, **trained}
    # raises if a trained part is unused
    ours = torch.autograd.grad(probe(features, maps), list(leaves.values()))
    theirs = torch.autograd.grad(probe(expected, expected_maps), list(leaves.values()))
    for name, a, b in zip(leaves, ours, theirs):
        assert (a - b).abs().max() < 1e-9, name
        assert b.abs().max() > 1e-9, f"{name} has no gradient: nothing was tested"
    return model, ours


@pytest.mark.parametrize("off", ABLATIONS, ids=lambda off: next(iter(off), "full"))
@pytest.mark.parametrize("order", ccra.ORDERS + ccra.ALONE)
@pytest.mark.parametrize("norm", ccra.NORMS)
def test_equals_the_equations_written_out(norm, order, off):
    if order == "decoupled" and "lpwca" in off:
        pytest.skip("there is no LPWCA to leave out")
    check_against_literal(replace(TINY, norm=norm, order=order, **off))


def test_equals_the_equations_with_other_settings():
    check_against_literal(replace(TINY, kernel_size=4, sigma=0.7), anchor=-2)
    check_against_literal(replace(TINY, kernel_size=9))               # wider than the tower is deep
    check_against_literal(replace(TINY, kernel_size=1), anchor=-4)


def test_a_strided_view_of_the_tower_gives_the_same():
    model, (F_stack, F_t, mask) = make(TINY), inputs(TINY)
    hidden = torch.randn(5, 3, 6, 10, dtype=torch.float64)
    hidden[1:, :, 1:] = F_stack.transpose(0, 1)
    view = hidden[1:, :, 1:].transpose(0, 1)
    assert not view.is_contiguous()
    assert torch.allclose(model(view, F_t, mask)[0], model(F_stack, F_t, mask)[0], atol=1e-12)


# --------------------------------------------------------------------------------------------------
# Parameters

def count(cfg):
    with torch.device("meta"):
        return sum(p.numel() for p in CCRA(cfg).parameters() if p.requires_grad)


def test_parameter_counts():
    assert count(CCRAConfig()) == 3_545_216
    with torch.device("meta"):
        names = [name for name, _ in CCRA(TINY).named_parameters()]
    assert names == [f"scorer.{x}.weight" for x in ("q", "k", "v", "out")] + [
        f"{part}.{x}" for part in ccra.PARTS
        for x in ("q.weight", "k.weight", "norm.weight", "norm.bias")]
    pair, norm = (4096 + 1024) * 128, 2 * 1024
    for part in ccra.PARTS:
        assert count(CCRAConfig(**{part: False})) == 3_545_216 - pair
    assert count(CCRAConfig(smooth=False)) == count(CCRAConfig(order="shuffled")) == 3_545_216
    assert count(CCRAConfig(order="decoupled")) == 3_545_216 - pair - norm
    assert count(CCRAConfig(lpwca=False, lwca=False, pwca=False)) == 3 * norm  # not even the scorer
    assert count(CCRAConfig(order="decoupled", lwca=False, pwca=False)) == 2 * norm
    for order in ccra.ALONE:
        assert count(CCRAConfig(order=order)) == 3_545_216 - 2 * (pair + norm)


def test_what_is_frozen_can_be_frozen_again():
    model = CCRA(replace(TINY, lwca=False)).requires_grad_(True)
    model.freeze_unused()
    assert [name for name, p in model.named_parameters()
            if not p.requires_grad] == ["lwca.q.weight", "lwca.k.weight"]


def test_norms_start_neutral():
    norm = CCRA(TINY).lpwca.norm
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all()


@pytest.mark.parametrize("bad", [dict(norm="layer"), dict(order="parallel"), dict(d_hidden=0), dict(kernel_size=2.0),
                                 dict(sigma=0), dict(sigma=math.nan), dict(anchor_layer=0), dict(anchor_layer=-25),
                                 dict(lwca=1), dict(n_layers=True)])
def test_bad_settings(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        CCRAConfig(**bad)


def test_wrong_sizes_and_modes():
    model, (F_stack, F_t, mask) = make(TINY), inputs(TINY)
    for bad in ((F_stack[:, 1:], F_t), (F_stack[..., 1:], F_t), (F_stack, F_t[..., 1:])):
        with pytest.raises(UserError, match="made for"):
            model(*bad, mask)
    with pytest.raises(UserError, match="mode"):
        model(F_stack, F_t, mask, mode="of")


# --------------------------------------------------------------------------------------------------
# Smoothing

def test_smoothing_by_hand():
    impulse = torch.tensor([[0, 0, 0, 1, 0, 0, 0]], dtype=torch.float64)
    e2, e1 = math.exp(-2), math.exp(-0.5)  # two layers and one layer from the centre, sigma 1
    total = 1 + 2 * e1 + 2 * e2
    expected = torch.tensor([[0, e2, e1, 1, e1, e2, 0]], dtype=torch.float64) / total
    assert torch.allclose(smooth(impulse, 5, 1.0), expected)
    assert expected[0, 3].item() == pytest.approx(0.4026, abs=1e-4)
    # at the end the first layer is repeated: w[-2] = w[-1] = w[0]
    end = torch.tensor([[1, 0, 0, 0, 0, 0]], dtype=torch.float64)
    expected = torch.tensor([[e2 + e1 + 1, e2 + e1, e2, 0, 0, 0]], dtype=torch.float64) / total
    assert torch.allclose(smooth(end, 5, 1.0), expected)


def test_even_smoothing_looks_half_a_layer_up():
    impulse = torch.tensor([[0, 0, 0, 1, 0, 0, 0]], dtype=torch.float64)
    outer, inner = math.exp(-1.5 ** 2 / (2 * 0.95 ** 2)), math.exp(-0.5 ** 2 / (2 * 0.95 ** 2))
    got = smooth(impulse, 4, 0.95)                # w'[l] reads w[l-1], w[l], w[l+1], w[l+2]
    expected = torch.tensor([[0, outer, inner, inner, outer, 0, 0]],
                            dtype=torch.float64) / (2 * (outer + inner))
    assert torch.allclose(got, expected)
    assert got[0, 1:3].tolist() == pytest.approx([0.1241, 0.3759], abs=1e-4)


def test_smoothing_leaves_constants():
    assert torch.allclose(smooth(torch.full((2, 3), 0.7), 6, 2.0), torch.full((2, 3), 0.7))


# --------------------------------------------------------------------------------------------------
# Padding, empty questions, modes

@pytest.mark.parametrize("order", ccra.ORDERS)
def test_a_batch_is_its_samples_alone(order):
    model, (F_stack, F_t, mask) = make(replace(TINY, order=order)), inputs(TINY)
    F_t = F_t.masked_fill(~mask[..., None], 1e3)  # whatever stands in the padding
    features, maps = model(F_stack, F_t, mask)
    for b in range(3):
        alone, maps_alone = model(F_stack[b:b + 1], F_t[b:b + 1, mask[b]], mask[b:b + 1, mask[b]])
        assert torch.allclose(features[b:b + 1], alone, atol=1e-12)
        for name in set(maps) - {"alpha"}:
            assert torch.allclose(maps[name][b:b + 1], maps_alone[name], atol=1e-12)
        assert torch.allclose(maps["alpha"][b:b + 1, mask[b]], maps_alone["alpha"], atol=1e-12)
        assert maps["alpha"][b, ~mask[b]].eq(
            0).all() and maps["alpha"][b].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("order", ccra.ORDERS)
def test_a_sample_without_question_is_neutral(order):
    model, (F_stack, F_t, mask) = make(replace(TINY, order=order)), inputs(TINY, lengths=(4, 0, 3))
    F_t.requires_grad_()
    features, maps = model(F_stack, F_t, mask)
    for name in ("alpha", "W_lp", "w_l", "w_p"):
        assert maps[name][1].eq(0).all(), name
        assert maps[name][0].ne(0).any() or (order, name) == ("decoupled", "W_lp")
    assert torch.allclose(maps["w_hat"][1], torch.full((4,), 0.25, dtype=torch.float64))
    probe(features, maps).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert F_t.grad[1].eq(0).all() and torch.isfinite(F_t.grad).all() and F_t.grad[0].ne(0).any()
    # all samples without: gradients of 0, not None, or DDP would wait for them
    model.zero_grad()
    features, maps = model(F_stack, F_t, torch.zeros_like(mask))
    probe(features, maps).backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or "norm" in name or p.grad.eq(0).all(), name
    # no column at all, and the mode, give the same
    assert torch.equal(model(F_stack, F_t[:, :0], mask[:, :0])[0], features)
    assert torch.equal(model(F_stack, F_t, mask, mode="neutral")[0], features)


def test_off_repeats_the_anchor():
    model, (F_stack, F_t, mask) = make(replace(TINY, anchor_layer=-2)), inputs(TINY)
    features, maps = model(F_stack, F_t, mask, mode="off")
    assert torch.equal(features, torch.cat([F_stack[:, 2]] * 2, -1))
    on = model(F_stack, F_t, mask)[1]
    assert {name: m.shape for name, m in maps.items()} == {name: m.shape for name, m in on.items()}
    assert maps["w_hat"].eq(0.25).all() and not any(maps[name].any()
                                                    for name in ("alpha", "W_lp", "w_l", "w_p"))


def test_all_parts_off_is_neutral():
    cfg = replace(TINY, lpwca=False, lwca=False, pwca=False)
    model, (F_stack, F_t, mask) = make(cfg), inputs(cfg)
    assert torch.allclose(
        model(F_stack, F_t, mask)[0],
        model(F_stack, F_t, mask, mode="neutral")[0], atol=1e-12)


# --------------------------------------------------------------------------------------------------
# The finding: with LayerNorm as everybody codes it, LPWCA and PWCA do nothing

def test_under_the_token_norm_attention_cannot_be_felt():
    F_stack, F_t, mask = inputs(TINY)
    F_stack, reached, moved = 4 * F_stack, {}, {}  # far above EPS, as a real tower's features are
    for norm in ccra.NORMS:
        torch.manual_seed(0)
        model = CCRA(replace(TINY, norm=norm)).double()
        model.lpwca.q.weight.data /= 4
        model.pwca.q.weight.data /= 4
        features, maps = model(F_stack, F_t, mask)
        assert maps["W_lp"].abs().max() > 0.05 and (1 + maps["W_lp"]).min() > 0 and (
            1 + maps["w_p"]).min() > 0
        probe(features, {}).backward()
        reached[norm] = [model.lpwca.q.weight.grad.norm(), model.pwca.q.weight.grad.norm()]
        model.lwca.q.weight.data.zero_()  # LWCA apart, whose weights follow F_lp in any case
        before = model(F_stack, F_t, mask)[0]
        model.lpwca.q.weight.data *= -0.5          # another W_lp, and another w_p
        model.pwca.q.weight.data *= -0.5
        moved[norm] = (model(F_stack, F_t, mask)[0] - before).abs().max()
    for norm in ("joint", "stack"):
        assert all(token < 1e-3 * other for token, other in zip(reached["token"], reached[norm]))
        assert moved["token"] < 1e-5 and moved[norm] > 1e-2


def test_joint_is_group_norm():
    model, (F_stack, _, _) = make(TINY), inputs(TINY)
    W = torch.rand(3, 4, 5, dtype=torch.float64)
    got = model.lpwca.norm(F_stack, 1 + W, "joint")
    group = nn.GroupNorm(1, 10, eps=ccra.EPS, dtype=torch.float64)
    group.weight, group.bias = model.lpwca.norm.weight, model.lpwca.norm.bias
    expected = group(
        (F_stack * (1 + W)[..., None]).flatten(0,
                                               1).transpose(1,
                                                            2)).transpose(1,
                                                                          2).unflatten(0, (3, 4))
    assert torch.allclose(got, expected, atol=1e-12)


def test_only_stack_lets_a_layer_as_a_whole_weigh_more():
    F_stack, c = inputs(TINY)[0] * 10, torch.rand(3, 4, 5, dtype=torch.float64) + 0.5
    louder = c * torch.tensor([1, 3, 1, 1])[:, None]
    for norm, changes in (("joint", False), ("token", False), ("stack", True)):
        (a, b), (a2, b2) = (standardise(x, *moments(F_stack), norm) for x in (c, louder))
        assert torch.allclose(a, a2, rtol=1e-5) != changes and torch.allclose(b, b2,
                                                                              rtol=1e-5) != changes


# --------------------------------------------------------------------------------------------------
# Numerics

def test_float32_survives_features_far_from_zero():
    cfg = replace(TINY, vision_dim=64)
    model, (F_stack, F_t, mask) = make(cfg), inputs(cfg, N=20)
    for part in (model.lpwca, model.lwca, model.pwca):     # the scores themselves stay moderate
        part.k.weight.data -= part.k.weight.data.mean(1, keepdim=True)
    F_stack = (F_stack + 300).float()                      # rounded here, the same numbers for both
    exact = model(F_stack.double(), F_t, mask)[0]
    error = (model.float()(F_stack, F_t.float(), mask)[0] - exact).abs().max()
    assert error < 2e-3
    # what the textbook formula would have made of it
    mean, var = moments(F_stack)
    true = F_stack.double().var(-1, correction=0)
    assert ((var - true) / true).abs().max() < 1e-5
    assert ((F_stack.square().mean(-1) - mean.square() - true) / true).abs().max() > 1e-2


def test_autocast_and_bfloat16():
    model, (F_stack, F_t, mask) = make(TINY).float(), inputs(TINY, dtype=torch.float32)
    features, maps = model(F_stack, F_t, mask)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_maps = model(F_stack, F_t, mask)
    assert torch.equal(features, cast) and all(
        torch.equal(maps[name], cast_maps[name]) for name in maps)
    probe(cast, cast_maps).backward()
    half, half_maps = model.bfloat16()(F_stack.bfloat16(), F_t.bfloat16(), mask)
    assert half.dtype == torch.bfloat16 and half_maps["W_lp"].dtype == torch.float32
    assert (half.float() - features).abs().max() < 0.3 and half.isfinite().all()


def test_a_frozen_tower_costs_no_copy_of_the_features():
    """What autograd keeps must be F_stack itself (by reference), the maps and a few (B, N, d): F_lp
    must not exist."""
    cfg = replace(TINY, n_layers=12, vision_dim=64)
    model, (F_stack, F_t, mask) = make(cfg), inputs(cfg, N=40)
    base, kept = F_stack.untyped_storage().data_ptr(), {}

    def keep(x):
        if x.untyped_storage().data_ptr() != base:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(F_stack, F_t, mask)[0]
    assert out.requires_grad and sum(kept.values()) < 2 * F_stack.nbytes


# --------------------------------------------------------------------------------------------------
# The vision-language model

N_PATCHES, VOCAB, WIDTH, CONTEXT = 4, 50, 24, 64


def tiny_vlm(tied=True, seed=0, **ccra_settings):
    torch.manual_seed(seed)
    vision = CLIPVision(
        CLIPVisionConfig(image_size=8, patch_size=4, hidden_size=16, intermediate_size=24,
                         num_hidden_layers=3, num_attention_heads=2))
    llm = Llama(
        LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
                    tie_word_embeddings=tied))
    cfg = CCRAConfig(text_dim=WIDTH, vision_dim=16, n_layers=3, d_hidden=8, **ccra_settings)
    model = VLM.build(vision, llm, cfg).double()
    with torch.no_grad():
        for p in model.parameters():  # away from 0.02: so that pictures and words make a difference
            if p.ndim >= 2:
                p.normal_(0, 0.25)
    model.vision.requires_grad_(False)
    return model


def tiny_batch():
    """Row 0: a picture, its answer is 30 31. Row 1: text only, shorter. Row 2: a picture first, no
    question."""
    ids = torch.tensor([[1, 5, IMAGE_TOKEN, 6, 7, 30, 31], [1, 8, 9, 32, 2, 0, 0],
                        [1, IMAGE_TOKEN, 10, 11, 33, 2, 0]])
    mask = torch.arange(7) < torch.tensor([[7], [5], [6]])
    labels = torch.full_like(ids, IGNORE)
    labels[0, 5:], labels[1, 3:5], labels[2, 4:6] = ids[0, 5:], ids[1, 3:5], ids[2, 4:6]
    query = torch.tensor([[6, 7, 12], [8, 9, 0], [0, 0, 0]])
    query_mask = torch.arange(3) < torch.tensor([[3], [2], [0]])
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3),
                         dtype=torch.float64)
    pixels[1] = 0                     # the dummy picture of a text-only row
    return dict(pixels=pixels, ids=ids, query=query, query_mask=query_mask, mask=mask,
                labels=labels)


def test_merged_layout_by_hand():
    model = tiny_vlm()
    visual = torch.arange(2 * 2 * WIDTH, dtype=torch.float64).view(2, 2, WIDTH)  # N' = 2
    ids = torch.tensor([[1, IMAGE_TOKEN, 6, 30], [1, 8, 32, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    labels = torch.tensor([[IGNORE, IGNORE, IGNORE, 30], [IGNORE, IGNORE, 32, IGNORE]])
    word, zero = model.llm.embed_tokens.weight, torch.zeros(WIDTH, dtype=torch.float64)
    rows = [[word[1], visual[0, 0], visual[0, 1], word[6], word[30]], [word[1], word[8], word[32]]]

    embeds, real, merged = model.merge(visual, ids, mask, labels)
    assert torch.equal(embeds,
                       torch.stack([torch.stack(rows[0]),
                                    torch.stack(rows[1] + [zero] * 2)]))
    assert real.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert merged.tolist() == [[IGNORE, IGNORE, IGNORE, IGNORE, 30],
                               [IGNORE, IGNORE, 32, IGNORE, IGNORE]]

    embeds, real, none = model.merge(visual, ids, mask, left=True)
    assert torch.equal(embeds,
                       torch.stack([torch.stack(rows[0]),
                                    torch.stack([zero] * 2 + rows[1])]))
    assert real.tolist() == [[True] * 5, [False] * 2 + [True] * 3] and none is None
    # prompts may come padded on the left as well, with anything as padding
    other = torch.tensor([[1, IMAGE_TOKEN, 6, 30], [IMAGE_TOKEN, 1, 8, 32]])
    again = model.merge(visual, other, mask.flip(1), left=True)
    assert torch.equal(again[0], embeds) and torch.equal(again[1], real)

    # in the middle of the picture
    cut, real, merged = model.merge(visual, ids, mask, labels, max_length=2)
    assert torch.equal(cut[0], torch.stack(rows[0][:2])) and merged.eq(IGNORE).all() and real.all()
    assert torch.equal(model.merge(None, ids[1:], mask[1:])[0][0], torch.stack(rows[1]))


def test_loss_is_cross_entropy_of_the_full_logits():
    model, batch = tiny_vlm(), tiny_batch()
    loss = model(**batch)
    logits = model(**{**batch, "labels": None})
    assert logits.shape == (3, 7 + N_PATCHES - 1, VOCAB)
    visual = model.look(batch["pixels"], batch["query"], batch["query_mask"])[0]
    labels = model.merge(visual, batch["ids"], batch["mask"], batch["labels"])[2]
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                                           ignore_index=IGNORE, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and (labels
                                                                         != IGNORE).sum() == 6
    parts = sum(model(**{k: v[i:i + 1] for k, v in batch.items()}) for i in range(3))
    assert loss.item() == pytest.approx(parts.item(), rel=1e-12)
    assert tiny_vlm().float()(**{**batch, "pixels": batch["pixels"].float()}).dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()
               if p.requires_grad)
    assert all(p.grad is None for p in model.vision.parameters())


def test_a_loss_in_pieces_is_the_loss(monkeypatch):
    """Many supervised positions go piece by piece, and their logits are computed again in the
    backward."""
    found = []
    for rows in (4096, 4):                                         # 6 positions: one piece; 4 and 2
        monkeypatch.setattr(ccra, "LOSS_ROWS", rows)
        model = tiny_vlm()
        loss = model(**tiny_batch())
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 20 and all(
        torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*found, strict=True))


def test_nothing_supervised_is_a_loss_of_zero():
    model, batch = tiny_vlm(), tiny_batch()
    loss = model(**{**batch, "labels": torch.full_like(batch["labels"], IGNORE)})
    loss.backward()
    assert loss.item() == 0 and all(p.grad.eq(0).all() for p in model.fuser.parameters())


def test_training_cuts_and_inference_refuses():
    model, batch = tiny_vlm(), tiny_batch()
    # cut before the last word of row 0: one label less
    full, short = model(**batch), model(**batch, max_length=9)
    logits = model(**{**batch, "labels": None})
    assert (full - short).item() == pytest.approx(-logits[0, 8].log_softmax(-1)[31].item(),
                                                  rel=1e-9)
    long = torch.randint(3, VOCAB, (1, CONTEXT + 5))
    one = {k: batch[k][:1] for k in ("pixels", "query", "query_mask")}
    assert model(**one, ids=long, labels=long).isfinite()                    # the context cuts, too
    with pytest.raises(UserError, match="language model has 64"):
        model(**one, ids=long)
    with pytest.raises(UserError, match="no room"):
        list(model.generate(**one, ids=long))
    with pytest.raises(UserError, match="no room"):
        list(model.generate(**one, ids=long[:, :CONTEXT]))


def test_a_text_only_batch_keeps_the_vision_path_in_the_graph():
    model, batch = tiny_vlm(), {k: v[1:2] for k, v in tiny_batch().items()}
    loss = model(**batch)
    loss.backward()
    for part in (model.projector, model.fuser):
        assert all(p.grad is not None and p.grad.eq(0).all() for p in part.parameters())
    assert loss.item() == pytest.approx(model(**{**batch, "pixels": None}).item(), rel=1e-12)


def test_no_answer_reaches_the_visual_features():
    model, batch = tiny_vlm(tied=False), tiny_batch()
    visual, maps = model.look(batch["pixels"], batch["query"], batch["query_mask"])
    grad, = torch.autograd.grad(visual.square().sum(), model.llm.embed_tokens.weight)
    touched = set(grad.abs().sum(1).nonzero()[:, 0].tolist())
    assert touched == {6, 7, 12, 8, 9}                       # the questions' words, and no answer's
    # and through the whole model: other answers, the same rows where the picture stands
    def picture_rows(batch):
        seen = {}
        hook = model.projector.register_forward_hook(lambda module, args, out: seen.update(out=out))
        model(**batch)
        hook.remove()
        return seen["out"]
    other = {**batch, "ids": batch["ids"].clone(), "labels": batch["labels"].clone()}
    for name in ("ids", "labels"):
        other[name][batch["labels"] != IGNORE] = 40
    assert torch.equal(picture_rows(batch), picture_rows(other))
    assert not torch.equal(picture_rows(batch), picture_rows({**batch, "query": batch["query"] + 1
                                                              }))  # it can fail


def test_the_vision_tower_learns_only_when_asked():
    model, batch = tiny_vlm(), tiny_batch()
    states = []
    model.vision.register_forward_hook(lambda module, args, out: states.append(out))
    model(**batch)
    model.vision.requires_grad_(True)
    model(**batch).backward()
    assert [hidden.requires_grad for hidden in states] == [False, True]
    unused = {"post_layernorm.weight", "post_layernorm.bias"}
    for name, p in model.vision.named_parameters():
        assert (p.grad is None) == (name in unused), name
        assert p.grad is None or (p.grad.isfinite().all() and p.grad.any()), name


def test_modes_reach_ccra():
    model, batch = tiny_vlm(), tiny_batch()
    losses = {mode: model(**batch, mode=mode).item() for mode in ccra.MODES}
    assert len(set(losses.values())) == 3 and model(**batch).item() == losses["on"]
    other = {**batch, "query": batch["query"] + 1}
    for mode in ("off", "neutral"):
        assert model(**other, mode=mode).item() == losses[mode]
    said = [answer(model, **prompt(batch, 0), max_new_tokens=12, mode=mode) for mode in ccra.MODES]
    assert said[0] != said[2]


def test_another_fuser_in_the_slot():
    class Last(nn.Module):
        n_blocks = 3

        def forward(self, hidden, F_t, mask, mode):
            assert hidden.shape == (4, 3, 1 + N_PATCHES,
                                    16) and F_t.shape == (3, 3, WIDTH) and mask.dtype == torch.bool
            return hidden[-2][:, 1:], {}
    model, batch = tiny_vlm(), tiny_batch()
    other = VLM(model.vision, model.llm, Last(), nn.Linear(16, WIDTH).double())
    assert other(**batch).isfinite()


@pytest.mark.parametrize("ids, pixels, match", [
    ([[1, IMAGE_TOKEN, IMAGE_TOKEN]], True, "more than one"), ([[1, IMAGE_TOKEN, 3]], False, "no pixels"),
    ([[1, -100, 3]], True, "outside of the vocabulary"), ([[1, VOCAB, 3]], True, "outside of the vocabulary")])
def test_bad_ids(ids, pixels, match):
    model, batch = tiny_vlm(), {k: v[:1] for k, v in tiny_batch().items()}
    ids, pixels = torch.tensor(ids), batch["pixels"] if pixels else None
    with pytest.raises(UserError, match=match):
        model(pixels, ids, batch["query"], batch["query_mask"])
    with pytest.raises(UserError, match=match):
        next(model.generate(pixels, ids, batch["query"], batch["query_mask"]))
    for id in (IMAGE_TOKEN, VOCAB):
        with pytest.raises(UserError, match="query"):
            model(batch["pixels"], batch["ids"], torch.full_like(batch["query"], id),
                  batch["query_mask"])


def test_padding_of_any_value_never_reaches_the_table():
    model, batch = tiny_vlm(), tiny_batch()
    other = {**batch, "ids": batch["ids"].masked_fill(~batch["mask"], IMAGE_TOKEN),
             "query": batch["query"].masked_fill(~batch["query_mask"], IMAGE_TOKEN)}
    assert model(**batch).item() == model(**other).item()


# --------------------------------------------------------------------------------------------------
# Generation

def prompt(batch, row):
    """Row's prompt alone, without its answer and without padding."""
    real = batch["mask"][row] & (batch["labels"][row] == IGNORE)
    return dict(pixels=batch["pixels"][row:row + 1], ids=batch["ids"][row:row + 1, real],
                query=batch["query"][row:row + 1], query_mask=batch["query_mask"][row:row + 1])


def prompts(batch):
    """All of them, padded on the right to the length of the samples."""
    mask = batch["mask"] & (batch["labels"] == IGNORE)
    return {**{k: batch[k] for k in ("pixels", "ids", "query", "query_mask")}, "mask": mask}


def answer(model, **kwargs):
    return torch.stack(list(model.generate(**kwargs)), 1).tolist()                   # B lists


def test_generate_equals_the_loop_without_cache():
    for seed in range(3):
        model, batch = tiny_vlm(tied=False, seed=seed), tiny_batch()
        for row in range(3):
            p = prompt(batch, row)
            got, ids = answer(model, **p, max_new_tokens=8), p["ids"]
            for _ in range(8):
                logits = model(p["pixels"], ids, p["query"], p["query_mask"])
                ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
            assert got == ids[:, -8:].tolist() and len(set(got[0])) > 1


def test_a_left_padded_batch_says_what_each_says_alone():
    model, batch = tiny_vlm(tied=False, seed=1), tiny_batch()
    together = answer(model, **prompts(batch), max_new_tokens=8)
    alone = [answer(model, **prompt(batch, row), max_new_tokens=8)[0] for row in range(3)]
    assert together == alone and len(set(map(tuple, alone))) == 3


def test_eos():
    model, batch = tiny_vlm(tied=False, seed=1), tiny_batch()
    alone = [answer(model, **prompt(batch, row), max_new_tokens=8)[0] for row in range(3)]
    eos = next(t for t in alone[0][1:] if t != alone[0][0])
    assert answer(model, **prompt(batch, 0), max_new_tokens=8,
                  eos_ids=[eos, 49])[0] == alone[0][:alone[0].index(eos)]
    assert list(model.generate(**prompt(batch, 0), eos_ids={alone[0][0]})) == []   # an empty answer
    got = answer(model, **prompts(batch), max_new_tokens=8, eos_ids=[eos])
    lengths = [row.index(eos) if eos in row else 8 for row in alone]
    assert len(set(lengths)) > 1
    steps = min(8, max(lengths))
    assert got == [(row[:n] + [eos] * 8)[:steps] for row, n in zip(alone, lengths)]


def test_the_end_of_the_context_ends_an_answer():
    model, batch = tiny_vlm(), tiny_batch()
    p = prompt(batch, 0)
    room = CONTEXT - (p["ids"].shape[1] - 1 + N_PATCHES)
    assert len(answer(model, **p, max_new_tokens=10 ** 6)[0]) == room
    assert list(model.generate(**p, max_new_tokens=0)) == []


def test_picture_and_prompt_are_read_once():
    model, batch, calls = tiny_vlm(), tiny_batch(), []
    model.vision.register_forward_hook(lambda *_: calls.append("vision"))
    model.fuser.register_forward_hook(lambda *_: calls.append("fuser"))
    model.llm.lm_head.register_forward_hook(
        lambda module, args, out: calls.append(tuple(out.shape)))
    answer(model, **prompt(batch, 0), max_new_tokens=4)
    assert calls == ["vision", "fuser"] + [(1, VOCAB)] * 4
    assert not any(token.requires_grad
                   for token in model.generate(**prompt(batch, 0), max_new_tokens=2))


def test_sampling():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().repeat(4000, 1)
    g = torch.Generator().manual_seed(0)
    for top_p, expected in ((1.0, [0.2, 0.5, 0.3]), (0.79, [0, 0.625,
                                                            0.375]), (0.5, [0, 1,
                                                                            0]), (1e-6, [0, 1, 0])):
        shares = pick(logits, 1.0, top_p, g).bincount(minlength=3) / 4000
        assert (shares - torch.tensor(expected)).abs().max() < 0.03
    assert (pick(logits, 0.5, 1.0, g).bincount(minlength=3) / 4000 -
            torch.tensor([4, 25, 9]) / 38).abs().max() < 0.03
    model, p = tiny_vlm(), prompt(tiny_batch(), 0)
    draws = [
        answer(model, **p, max_new_tokens=12, temperature=2.0,
               generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert answer(model, **p, max_new_tokens=6, temperature=1.0,
                  top_p=1e-9) == answer(model, **p, max_new_tokens=6)
    for bad in (dict(temperature=-1), dict(top_p=0), dict(top_p=1.5)):
        with pytest.raises(UserError, match="temperature"):
            next(model.generate(**p, **bad))


# --------------------------------------------------------------------------------------------------
# Saving and loading

@pytest.mark.parametrize("tied", (True, False))
def test_save_and_load_bit_for_bit(tmp_path, tied):
    model, batch = tiny_vlm(tied, norm="stack", order="decoupled", sigma=2), tiny_batch()
    model.image["pad"], model.query = False, "first"
    (tmp_path / "words.model").write_bytes(b"pieces")
    model.save_pretrained(tmp_path / "out", tokenizer_file=tmp_path / "words.model")
    again = VLM.from_pretrained(tmp_path / "out")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    assert (again.llm.lm_head.weight is again.llm.embed_tokens.weight) == tied
    assert again.fuser.config == model.fuser.config and again.llm.config == model.llm.config
    assert again.image == {"size": 8, "pad": False} and again.query == "first"
    assert not again.fuser.lpwca.norm.weight.requires_grad and again.fuser.lwca.q.weight.requires_grad
    # not bit for bit: the weights lie at other addresses, and alignment decides how products are
    # summed
    assert again(**batch).item() == pytest.approx(model(**batch).item(), rel=1e-12)
    assert (tmp_path / "out" / "words.model").read_bytes() == b"pieces"
    again.save_pretrained(tmp_path / "out",
                          tokenizer_file=tmp_path / "out" / "words.model")  # onto itself
    assert (tmp_path / "out" / "words.model").read_bytes() == b"pieces"
    assert VLM.from_pretrained(tmp_path / "out",
                               dtype=torch.float32).projector[0].weight.dtype == torch.float32
    # its towers can be read out of it
    vision = CLIPVision.from_pretrained(tmp_path / "out", dtype=torch.float64)
    llm = Llama.from_pretrained(tmp_path / "out", dtype=torch.float64)
    for tower, own in ((vision, model.vision), (llm, model.llm)):
        assert all(
            torch.equal(p, q) for p, q in zip(tower.parameters(), own.parameters(), strict=True))


@pytest.mark.parametrize("old, new, match", [
    ('"nanoccra"', '"llava"', "model_type"), ('"ccra"', '"other"', "fuser 'other'"), ('"sigma"', '"sgima"', "sgima"),
    ('"joint"', '"batch"', "norm"), ('"n_layers": 3', '"n_layers": 2', "n_layers"),
    ('"d_hidden": 8', '"d_hidden": 9', "misshapen"), ('"size": 8', '"size": 16', "image"),
    ('"query": "all"', '"query": "last"', "query"), ('"vision": {', '"eyes": {', "vision")])
def test_a_config_that_does_not_fit(tmp_path, old, new, match):
    tiny_vlm().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert old in text
    (tmp_path / "config.json").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=match):
        VLM.from_pretrained(tmp_path)


def test_build_wants_fitting_sizes():
    model = tiny_vlm()
    for name in ("text_dim", "vision_dim", "n_layers"):
        with pytest.raises(UserError, match=name):
            VLM.build(model.vision, model.llm, replace(model.fuser.config, **{name: 5}))
    assert [tuple(p.shape) for p in model.projector.parameters()] == [(WIDTH, 32), (WIDTH, ),
                                                                      (WIDTH, WIDTH), (WIDTH, )]
    assert isinstance(model.projector[1], nn.GELU) and model.projector[1].approximate == "none"
