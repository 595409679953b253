"""What is noted is what was looked at."""
import pytest
import torch

import fast
from ccra import VLM, CCRAConfig
from clip import CLIPVision
from core.common import UserError
from fast.packed import Columns
from fusers.llava import LLaVAConfig
from llama import Llama, LlamaConfig
from tests.viz.helpers import batch_of, build, scene
from viz import explorer, figures, maps

pytestmark = pytest.mark.usefixtures("one_thread")


def eager(llm, embeds):
    """All attention weights (layers, H, T, T), by transformers' own written-out attention."""
    transformers = pytest.importorskip("transformers")
    fields = {**llm.config.to_dict(), "attn_implementation": "eager"}
    oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    names = {n if n == "lm_head.weight" else f"model.{n}": p for n, p in llm.named_parameters()}
    oracle.load_state_dict({**names, "lm_head.weight": llm.lm_head.weight})
    with torch.no_grad():
        found = oracle(inputs_embeds=embeds, output_attentions=True).attentions
    return torch.stack(found)[:, 0]


@torch.no_grad()
def slow_rows(model, batch, tokens):
    """What `watch` should see: prompt and answer read once, as one row, and the rows from which the
    tokens are said."""
    visual, _ = model.look(batch["pixels"], batch["query"], batch["query_mask"])
    embeds = model.merge(visual, batch["ids"])[0]
    embeds = torch.cat([embeds, model.llm.embed(torch.tensor([tokens]))], 1)
    weights = eager(model.llm, embeds).mean(1)                           # (layers, T, T)
    start = embeds.shape[1] - len(tokens) - 1
    return [[weights[l, start + i, :start + i + 1] for i in range(len(tokens))]
            for l in range(len(weights))]


def watched(model, batch, n):
    """(rows of both blocks, the n tokens that were said)."""
    with maps.watch(model, range(2)) as seen:
        tokens = [int(token) for token in model.generate(**batch, max_new_tokens=n)]
    return seen.rows, tokens


@pytest.mark.parametrize("prepared", [False, True])
def test_attention_equals_the_slow_path(towers, tokenizer, prepared):
    """Grouped heads, a cache, twelve tokens: each row against transformers; rows sum to 1; the
    picture's part. Of the plain model, and with the fast ways in it."""
    model, question = build(towers), "Where is the cat?"
    if prepared:
        fast.prepare(model)
    batch = batch_of(model, tokenizer, question, scene())
    rows, tokens = watched(model, batch, 12)
    expected = slow_rows(model, batch, tokens)
    assert len(tokens) == 12
    for l in range(2):
        for got, right in zip(rows[l], expected[l], strict=True):
            torch.testing.assert_close(got, right, atol=1e-5, rtol=0)
            assert abs(got.sum().item() - 1) < 1e-5
    assert max(row.max().item() for row in rows[1]) > 0.05          # not an even map, which any is
    at = batch["ids"][0].tolist().index(-200)
    sight = maps.ask(model, tokenizer, scene(), question, layers=[1], max_new_tokens=12)
    right = torch.stack([row[at:at + 4] for row in expected[1]])
    torch.testing.assert_close(sight.llm[0], right, atol=1e-5, rtol=0)
    torch.testing.assert_close(sight.looked(), right.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(sight.looked(3), right[3], atol=1e-5, rtol=0)
    assert sight.layers == [2] and "".join(sight.words).strip() == question


def unpacked(model, packed):
    """Give a model the numbers that an int8 one stands for."""
    for block, new in zip(model.llm.layers, packed.llm.layers):
        attn, mlp = block.self_attn, block.mlp
        pairs = [([attn.q_proj, attn.k_proj, attn.v_proj], new.self_attn.qkv_proj),
                 ([attn.o_proj], new.self_attn.o_proj),
                 ([mlp.gate_proj, mlp.up_proj], new.mlp.gate_up_proj),
                 ([mlp.down_proj], new.mlp.down_proj)]
        for layers, one in pairs:
            whole = one.weight * one.scale.float()[:, None]
            parts = whole.split([len(layer.weight) for layer in layers])
            for layer, part in zip(layers, parts, strict=True):
                layer.weight.data.copy_(part)


def test_attention_of_int8_models(towers, tokenizer):
    """Their q, k and v are one layer. int8 against transformers on the numbers that int8 stands
    for."""
    model, twin = fast.prepare(build(towers), int8=True), build(towers)
    # up to 16 rows int8's kernel rounds x
    batch = batch_of(model, tokenizer, "Where is it? " * 6, scene())
    rows, tokens = watched(model, batch, 3)
    unpacked(twin, model)
    expected = slow_rows(twin, batch, tokens)
    for l in range(2):
        torch.testing.assert_close(rows[l][0], expected[l][0], atol=1e-5, rtol=0)
        for got, right in zip(rows[l], expected[l], strict=True):   # as it does from the second on
            torch.testing.assert_close(got, right, atol=2e-2, rtol=0)


def test_attention_of_models_laid_out_anew(towers, tokenizer, monkeypatch):
    """`Columns`, in whose widths (of 64) and on whatever CPU: the rows are those of the model as it
    was."""
    monkeypatch.setattr(Columns, "fit", staticmethod(lambda weights: True))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=896, hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4)
    llm = Llama(config).requires_grad_(False)
    vision = CLIPVision.from_pretrained(towers / "clip")
    model = VLM.build(vision, llm, CCRAConfig(64, 16, 3, 8)).bfloat16().eval()
    for block in llm.layers:
        block.self_attn.q_proj.weight.normal_(std=0.3)
        block.self_attn.k_proj.weight.normal_(std=0.3)
    rows = []
    for pack in (False, True):
        fast.prepare(model, pack=pack)
        assert hasattr(llm.layers[0].self_attn, "qkv_proj") == pack
        sight = maps.ask(model, tokenizer, scene(), "Is it red?", [0, 1], max_new_tokens=1)
        rows.append(sight.llm)
    assert type(llm.layers[0].self_attn.qkv_proj) is Columns
    torch.testing.assert_close(*rows, atol=1e-2, rtol=0)
    assert rows[0].max() > 2 * rows[0].mean()


@pytest.mark.parametrize("int8", [False, True])
def test_watching_changes_no_answer_and_leaves_nothing(towers, tokenizer, int8):
    """Draws at temperature 1 are the same tokens; afterwards, also after an error, no hook is left
    anywhere, and the decoder is what it was."""
    model = fast.prepare(build(towers), int8=int8)
    decoder = model.llm.decoder
    batch = batch_of(model, tokenizer, "What color is the square?", scene())

    def draws():
        answer = model.generate(**batch, max_new_tokens=40, temperature=1.0,
                                generator=torch.Generator().manual_seed(5))
        return [int(token) for token in answer]

    before = draws()
    with maps.watch(model, range(2)):
        during = draws()
        assert model.llm.decoder is not decoder                     # which would replay
    with pytest.raises(KeyError), maps.watch(model):
        raise KeyError
    assert before == during == draws() and len(set(before)) > 5
    assert model.llm.decoder is decoder
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("changes", [
    dict(), dict(order="shuffled"), dict(order="decoupled"), dict(smooth=False),
    dict(norm="stack"), dict(lwca=False), dict(order="lwca_only"), dict(order="pwca_only")])
def test_the_layers_scores_come_apart_into_patches(towers, tokenizer, changes):
    """LWCA mapped back: the softmax of the patches' means is w_hat, in every arrangement."""
    model = build(towers, **changes)
    sight = maps.ask(model, tokenizer, scene(1), "Is there a cat?", max_new_tokens=2)
    found = sight.maps
    w_hat = found["layer_map"].mean(-1).softmax(-1)
    torch.testing.assert_close(w_hat, found["w_hat"], atol=1e-5, rtol=0)
    assert found["layer_map"].shape == (3, 4) and found["w_p"].shape == (4,)
    assert abs(found["alpha"].sum().item() - 1) < 1e-5
    assert abs(found["w_hat"].sum().item() - 1) < 1e-5
    assert figures.figure3(sight).size > (300, 300)
    assert figures.figure4([sight, sight]).size > (300, 200)


def test_a_model_without_maps(towers, tokenizer):
    """Plain LLaVA weighs nothing: the picture and the language model's attention are left."""
    vision = CLIPVision.from_pretrained(towers / "clip")
    llm = Llama.from_pretrained(towers / "llama")
    model = VLM.build(vision, llm, LLaVAConfig(16, 3)).eval()
    sight = maps.ask(model, tokenizer, scene(), "Is there a cat?", max_new_tokens=2, name="LLaVA")
    assert figures.figure3(sight).width > 300
    assert figures.side_by_side([[sight, sight]]).width > 600
    assert '"layers": 0' in explorer.explorer(sight)
    with pytest.raises(UserError, match="doesn't weigh layers"):
        figures.figure4([sight])


def test_middle():
    found = [list(maps.middle(n)) for n in (1, 2, 3, 4, 6)]
    assert found == [[0], [0], [0, 1], [1], [1, 2, 3]]
    # n/3 = 10.7 to 2n/3 = 21.3
    assert [layer + 1 for layer in maps.middle(32)] == list(range(11, 22))


def test_pieces_put_together_are_the_text(tokenizer):
    text = "Where is the caf\u00e9 \U0001f600, <b>cat</b>?\nHere"
    ids = tokenizer.encode(text)
    found = maps.pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids) == text
    assert "\U0001f600" in found and maps.pieces(tokenizer, []) == []
