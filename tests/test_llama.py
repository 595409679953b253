"""llama.py against transformers (tiny random models, SmolLM2 where it is at hand), each fast path
against a slow one.

Environment: NANOCCRA_SMOLLM2, a folder with SmolLM2-135M in the Hugging Face layout;
NANOCCRA_LLAMA2_TOKENIZER and NANOCCRA_LLAMA3_TOKENIZER, the paths of Llama 2's and Llama 3's
tokenizer.model. What isn't set is skipped.
"""
import base64
import io
import json
import os
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch

import llama
from core.common import UserError
from core.tokenizer import Tokenizer
from core.weights import Tensors, save
from fast.graph import Replay
from llama import KVCache, Llama, LlamaConfig, RMSNorm, frequencies, rope, rotate

TINY = LlamaConfig(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                   num_attention_heads=4, rms_norm_eps=1e-5)
SHAPES = {
    "llama2": TINY, "tied+gqa": replace(TINY, num_key_value_heads=2, tie_word_embeddings=True,
                                        rope_theta=5e5),
    "one kv head, wide heads": replace(TINY, num_key_value_heads=1, head_dim=16)}


def model(config=TINY, seed=0):
    """Random, with weights large enough for every part to matter (at std 0.02 the blocks would
    hardly show)."""
    torch.manual_seed(seed)
    net = Llama(config).eval().requires_grad_(False)
    for p in net.parameters():
        p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
    return net


def greedy_without_cache(net, ids, mask, n):
    """The slow twin of decoding: everything again for each new token. ids (B, T) -> (B, n)."""
    for _ in range(n):
        new = net(ids, mask=mask)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat((ids, new), 1), torch.cat(
            (mask, torch.ones_like(new, dtype=torch.bool)), 1)
    return ids[:, -n:]


def greedy_with_cache(net, ids, mask, n):
    """The same with a KVCache: the prompt at once, then one position a token."""
    cache, out = KVCache(net.config, len(ids), ids.shape[1] + n), []
    for _ in range(n):
        ids = net(ids, mask=mask, cache=cache)[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat((mask, torch.ones_like(ids, dtype=torch.bool)), 1)
        out.append(ids)
    return torch.cat(out, 1)


def left_padded(lengths, vocab=97):
    torch.manual_seed(1)
    T = max(lengths)
    mask = torch.arange(T) >= T - torch.tensor(lengths)[:, None]           # (B, T)
    return torch.randint(vocab, mask.shape), mask


# --------------------------------------------------------------------------------------------------
# Parts

def test_rope_against_complex_numbers():
    """A pair (x[j], x[j + hd/2]) is a complex number, turned by a factor exp(i p theta^(-2j/hd)).
    In float64."""
    config, hd = replace(TINY, head_dim=12), 12
    positions = torch.tensor([[0, 1, 7, 100], [3, 5, 1000, 4095]])
    x = torch.randn(2, 3, 4, hd, dtype=torch.float64)
    freq = config.rope_theta ** (-2 * torch.arange(hd // 2, dtype=torch.float64) / hd)
    turn = torch.polar(torch.ones(()).double(), positions[:, None, :, None] * freq)
    y = torch.complex(x[..., :hd // 2], x[..., hd // 2:]) * turn
    cos, sin = rope(config, positions)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat((y.real, y.imag), -1), atol=1e-3,
                               rtol=0)
    few = (positions <= 7).double()[:, None, :, None]   # float32 angles: exact while they are small
    torch.testing.assert_close(
        rotate(x, cos, sin) * few,
        torch.cat((y.real, y.imag), -1) * few, atol=5e-6, rtol=0)


def llama3_scaling(factor):
    return dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)


@pytest.mark.parametrize("hd, factor, kept, blended, slowed, first, golden", [
    (128, 8.0, 29, 6, 29, 28, [3.21145e-3, 2.16657e-3, 1.37189e-3, 8.56751e-4]),      # Llama-3.1-8B
    (64, 32.0, 15, 3, 14, 15, [1.29055e-3, 4.29557e-4, 9.70829e-5])])                 # Llama-3.2-1B
def test_llama3_frequencies(hd, factor, kept, blended, slowed, first, golden):
    config = LlamaConfig(**{
        **TINY.__dict__, "head_dim": hd, "rope_theta": 5e5, "rope_scaling": llama3_scaling(factor)})
    before, after = frequencies(replace(config, rope_scaling=None),
                                "cpu"), frequencies(config, "cpu")
    ratio = before / after
    same, whole = ratio < 1.0001, ratio > factor * 0.9999
    assert [same.sum(), (~same & ~whole).sum(), whole.sum()] == [kept, blended, slowed]
    torch.testing.assert_close(after[first:first + len(golden)], torch.tensor(golden), rtol=1e-5,
                               atol=0)


def test_rope_keeps_float32_angles_in_a_bfloat16_model():
    net = model().to(torch.bfloat16)
    assert not list(net.buffers())
    cos, _ = rope(net.config, torch.tensor([[4095]]))
    assert cos.dtype == torch.float32
    x = torch.ones(1, 1, 1, 12, dtype=torch.bfloat16)
    assert rotate(x, *rope(TINY, torch.tensor([[3]]))).dtype == torch.bfloat16


def test_rmsnorm_computes_in_float32_and_casts_before_the_weight():
    torch.manual_seed(0)
    norm = RMSNorm(256, 1e-5).to(torch.bfloat16).requires_grad_(False)
    norm.weight.copy_(torch.randn(256))
    x = (torch.randn(64, 256) * 30).bfloat16()
    wide = x.double()
    quotient = (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert (y != quotient * norm.weight).float().mean() < 1e-3  # a rounding tie of float32 at most
    assert (y != (quotient.double() * norm.weight.double() *
                  (1 + 2**-9)).bfloat16()).float().mean() > 0.1


def test_initial_weights():
    torch.manual_seed(0)
    net = Llama(replace(TINY, hidden_size=256, tie_word_embeddings=True))
    assert net.lm_head.weight is net.embed_tokens.weight
    assert abs(net.embed_tokens.weight.std() - 0.02) < 1e-3
    assert abs(net.layers[1].mlp.up_proj.weight.std() - 0.02) < 1e-3
    for residual in (net.layers[0].self_attn.o_proj, net.layers[2].mlp.down_proj):
        assert abs(residual.weight.std() - 0.02 / 6 ** 0.5) < 1e-3
    assert net.norm.weight.eq(1).all()
    ids = torch.randint(97, (4, 16))
    loss = torch.nn.functional.cross_entropy(net(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss - torch.tensor(97.).log()) < 1  # near chance; N(0, 1) embeddings: far above


# --------------------------------------------------------------------------------------------------
# Masks, positions, cache

@pytest.mark.parametrize("name", SHAPES)
def test_decoding_with_and_without_cache(name):
    net = model(SHAPES[name])
    ids, mask = left_padded([9, 4, 1])
    fast, slow = greedy_with_cache(net, ids, mask, 12), greedy_without_cache(net, ids, mask, 12)
    assert torch.equal(fast, slow)
    for row, n in enumerate([9, 4, 1]):                         # and each row as if it were alone
        alone = ids[row:row + 1, -n:]
        assert torch.equal(
            greedy_with_cache(net, alone,
                              torch.ones_like(alone).bool(), 12)[0], slow[row])


@pytest.mark.parametrize("cuts", [(1, 12), (5, 6, 12), (12,), (7, 12)])
def test_cache_in_pieces_without_a_mask(cuts):
    net, ids = model(SHAPES["tied+gqa"]), torch.randint(97, (2, 12))
    cache, parts = KVCache(net.config, 2, 12), []
    for start, end in zip((0, *cuts), cuts):
        parts.append(net(ids[:, start:end], cache=cache))
        assert cache.length == end
    torch.testing.assert_close(torch.cat(parts, 1), net(ids), atol=1e-4, rtol=1e-4)


def test_cache_in_pieces_with_padding():
    net = model()
    ids, mask = left_padded([12, 7])
    cache = KVCache(net.config, 2, 12)
    parts = [
        net(ids[:, a:b], mask=mask[:, :b], cache=cache)
        for a, b in ((0, 4), (4, 9), (9, 10), (10, 12))]
    whole = net(ids, mask=mask)
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not llama.SUMS, reason="FBGEMM is x86's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_new_token_attends_by_sums(kind, padded, dtype, monkeypatch):
    """A turned cache against the equation in float64, keys shared by heads or not; what isn't
    filled yet is NaN."""
    monkeypatch.setattr(llama, "MANY", 0)
    config = SHAPES[kind]
    cache, B, n_kv, hd = KVCache(config, 2, 9,
                                 dtype), 2, config.num_key_value_heads, config.head_dim
    assert cache.turned and cache.keys[1].shape == cache.values[1].shape == (B, n_kv, 9, hd)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)
    torch.manual_seed(0)
    k, v = (torch.randn(B, n_kv, 6, hd, dtype=dtype) for _ in range(2))
    q = torch.randn(B, config.num_attention_heads, 1, hd, dtype=dtype)
    cache.append(1, k[:, :, :5], v[:, :, :5])
    cache.length = 5
    seen = cache.append(1, k[:, :, 5:], v[:, :, 5:])
    assert torch.equal(seen[0], k) and torch.equal(seen[1], v)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()[:, None,
                                                                         None] if padded else None
    group = config.num_attention_heads // n_kv
    wide_k, wide_v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.double() @ wide_k.mT / hd ** 0.5
    want = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ wide_v
    got = cache.attend(1, q, mask)
    assert got.dtype == dtype and (got -
                                   want).abs().max() < 4 * torch.finfo(dtype).eps * v.abs().max()


@pytest.mark.skipif(not llama.SUMS, reason="FBGEMM is x86's")
@pytest.mark.parametrize("kind", SHAPES)
def test_a_turned_cache_decodes_as_one_that_is_not(kind, monkeypatch):
    """In pieces, padded on the left, in bfloat16, beside the same model in float32 without a cache.
    """
    net = model(SHAPES[kind])
    ids, mask = left_padded([12, 7])
    whole, half = net(ids, mask=mask)[mask], net.bfloat16()
    off = []
    for many in (0, 2 ** 30):
        monkeypatch.setattr(llama, "MANY", many)
        cache = KVCache(net.config, 2, 12, torch.bfloat16)
        assert cache.turned == (many == 0)
        steps = [half(ids[:, a:b], mask=mask[:, :b], cache=cache)
                 for a, b in ((0, 4), (4, 9), (9, 10), (10, 11), (11, 12))]
        off.append((torch.cat(steps, 1)[mask].float() - whole).norm() / whole.norm())
    assert off[0] < 1.3 * off[1] and off[1] < 0.1


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("padded", [False, True])
def test_what_a_gpu_replays(kind, padded):
    """The same work at shapes that never change, up to the last place of the cache: the logits of
    `hidden` as it is, in a cache that is filled with NaN to begin with. (test_gpu.py replays
    recordings of it.)"""
    net = model(SHAPES[kind]).double()
    ids, mask = left_padded([12, 7])
    cache = KVCache(net.config, 2, 24, torch.float64)
    for memory in (*cache.keys, *cache.values):
        memory.fill_(torch.nan)
    mask = mask if padded else torch.ones_like(mask)
    net(ids, mask=mask, cache=cache)
    step = Replay(net, cache, mask if padded else None)
    for _ in range(12):
        new = torch.randint(97, (2, 1))
        ids, mask = torch.cat([ids, new],
                              1), torch.cat([mask, torch.ones_like(new, dtype=torch.bool)], 1)
        assert torch.allclose(step(net.embed(new)), net(ids, mask=mask)[:, -1], rtol=1e-10)
    assert cache.length == cache.room == 24


def test_a_full_cache_says_so():
    net = model()
    cache = KVCache(net.config, 1, 4)
    net(torch.ones(1, 4, dtype=torch.long), cache=cache)
    with pytest.raises(UserError, match="room for 4 positions, not for 5"):
        net(torch.ones(1, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(side):
    net = model(SHAPES["tied+gqa"])
    text, junk = torch.randint(97, (2, 6)), torch.randint(97, (2, 5))
    real = {
        "left": [0] * 5 + [1] * 6, "right": [1] * 6 + [0] * 5,
        "middle": [1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1]}[side]
    mask = torch.tensor([real, real], dtype=torch.bool)
    ids = torch.empty(2, 11, dtype=torch.long).masked_scatter(mask,
                                                              text).masked_scatter(~mask, junk)
    torch.testing.assert_close(
        net(ids, mask=mask)[mask].view(2, 6, -1), net(text), atol=1e-4, rtol=1e-4)


def test_no_nan_even_in_an_empty_row():
    net = model().requires_grad_(True)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    logits = net(torch.ones(2, 5, dtype=torch.long), mask=mask)
    logits.square().sum().backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters())


def test_nobody_sees_the_future():
    net, ids = model(), torch.randint(97, (1, 10))
    other = ids.clone()
    other[0, 6] = (other[0, 6] + 1) % 97
    a, b = net(ids), net(other)
    torch.testing.assert_close(a[:, :6], b[:, :6], atol=1e-5, rtol=1e-5)
    assert ((a - b)[:, 6:].abs().amax(-1) > 1e-2).all()


def test_only_distances_matter_and_positions_are_obeyed():
    net, ids = model(), torch.randint(97, (1, 10))
    at = torch.arange(10)[None]
    torch.testing.assert_close(net(ids, positions=at + 37), net(ids), atol=1e-3, rtol=1e-3)
    assert (net(ids, positions=at * 2) - net(ids)).abs().max() > 1e-2


def test_embeds_are_tokens_looked_up():
    net, ids = model(), torch.randint(97, (2, 7))
    assert torch.equal(net(embeds=net.embed(ids)), net(ids))
    assert torch.equal(net.lm_head(net.hidden(ids)), net(ids))
    for wrong in ({}, {"tokens": ids,
                       "embeds": net.embed(ids)}, {"tokens": ids, "mask": torch.ones(2, 6).bool()}):
        with pytest.raises(ValueError):
            net(**wrong)


# --------------------------------------------------------------------------------------------------
# Public folders

def hf_folder(config, dir):
    """A random model made and saved by transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    d = config.to_dict()
    theta, scaling, _ = d.pop("rope_theta"), d.pop("rope_scaling"), d.pop("architectures")
    rope_parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **d, rope_parameters=rope_parameters, attn_implementation="eager"))
    for p in oracle.parameters():
        p.data.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
    oracle.save_pretrained(dir)
    return oracle.eval().requires_grad_(False)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_transformers(name, tmp_path):
    oracle = hf_folder(SHAPES[name], tmp_path)
    net = Llama.from_pretrained(tmp_path).requires_grad_(False)
    assert net.config == SHAPES[name]
    ids, mask = left_padded([9, 4, 2])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours = net(ids, mask=mask)
    theirs = oracle(ids, attention_mask=mask, position_ids=positions).logits
    assert theirs[mask].std() > 0.5
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net(ids), oracle(ids).logits, atol=1e-4, rtol=1e-4)
    generated = oracle.generate(ids, attention_mask=mask.long(), max_new_tokens=12,
                                min_new_tokens=12, do_sample=False, eos_token_id=None,
                                pad_token_id=0)
    assert torch.equal(generated[:, 9:], greedy_with_cache(net, ids, mask, 12))


@pytest.mark.parametrize("factor, tied", [(8.0, False), (32.0, True)])
def test_llama3_equals_transformers_over_1500_positions(factor, tied, tmp_path):
    """Tiny Llama-3.1 and 3.2 configs; the old context is short, so that all three kinds of
    frequency matter."""
    scaling = {**llama3_scaling(factor), "original_max_position_embeddings": 256}
    config = replace(TINY, num_key_value_heads=2, tie_word_embeddings=tied, rope_theta=5e5,
                     rope_scaling=scaling, max_position_embeddings=2048)
    oracle = hf_folder(config, tmp_path)
    net = Llama.from_pretrained(tmp_path).requires_grad_(False)
    assert net.config.rope_scaling == scaling and net.config.rope_theta == 5e5
    ids = torch.randint(0, config.vocab_size, (1, 1500), generator=torch.Generator().manual_seed(0))
    theirs = oracle(ids).logits
    torch.testing.assert_close(net(ids), theirs, atol=1e-3, rtol=1e-3)
    plain = Llama(replace(config, rope_scaling=None))
    plain.load_state_dict(net.state_dict())
    assert (plain(ids) - theirs).abs().max() > 0.1                                     # it matters


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_reads_what_we_save(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    net, ids = model(SHAPES[name]), torch.randint(97, (2, 9))
    net.save_pretrained(tmp_path)
    assert ("lm_head.weight" in Tensors(tmp_path)) != SHAPES[name].tie_word_embeddings
    oracle, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(oracle(ids).logits, net(ids), atol=1e-4, rtol=1e-4)
    assert torch.equal(Llama.from_pretrained(tmp_path)(ids), net(ids))


def test_reads_the_language_model_of_a_vlm_folder(tmp_path):
    net, ids = model(), torch.randint(97, (1, 5))
    own = {"llm." + name: p for name, p in net.named_parameters()}
    rest = {
        "vision.x": torch.ones(1), "fuser.q.weight": torch.ones(1),
        "projector.0.weight": torch.ones(1)}
    save(tmp_path, own | rest, {"model_type": "nanoccra", "llm": net.config.to_dict()})
    assert torch.equal(Llama.from_pretrained(tmp_path)(ids), net(ids))
    save(tmp_path, own | rest | {"stray": torch.ones(1)},
         {"model_type": "nanoccra", "llm": net.config.to_dict()})
    with pytest.raises(UserError, match="1 unknown .stray in model.safetensors"):
        Llama.from_pretrained(tmp_path)
    save(tmp_path, own, {"model_type": "nanoccra", "vision": {}})
    with pytest.raises(UserError, match="config.json: .*no 'llm'"):
        Llama.from_pretrained(tmp_path)


def rewrite(dir, change):
    tensors = {name: t.clone() for name, t in Tensors(dir).items()}
    change(tensors)
    save(dir, tensors, json.loads((dir / "config.json").read_text()))


def test_needless_tensors_are_known(tmp_path):
    net = model(SHAPES["tied+gqa"])
    net.save_pretrained(tmp_path)
    rewrite(
        tmp_path, lambda t: t.update({
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6), "lm_head.weight": t[
                "model.embed_tokens.weight"].clone()}))
    assert torch.equal(Llama.from_pretrained(tmp_path).norm.weight, net.norm.weight)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(
            UserError,
            match="lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "1 missing .layers.1.mlp.up_proj.weight"),
    (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}), "1 unknown .*3.mlp.up_proj.weight in m"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}), "1 unknown .*q_proj.bias in m"),
    (lambda t: t.update({"model.norm.weight": torch.ones(9)}), "1 misshapen .model.norm.weight in model.saf.* is .9"),
])
def test_strict_about_tensors(change, words, tmp_path):
    model().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=words):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, word", [
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "config.json: rope_scaling: low_freq_factor"),
    ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "linear"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}}, "yarn"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"), ({"model_type": "qwen2"}, "qwen2"), ({"model_type": None}, "model_type"),
    ({"quantization_config": {}}, "quantization_config"), ({"num_hidden_layers": None}, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, "key/value heads"), ({"head_dim": 7}, "head_dim")])
def test_other_architectures_are_refused(change, word):
    with pytest.raises(UserError, match=word):
        LlamaConfig.from_dict({**TINY.to_dict(), **change})


def test_absent_settings_mean_what_they_mean_in_transformers():
    transformers = pytest.importorskip("transformers")
    d = {
        "model_type": "llama", "vocab_size": 9, "hidden_size": 24, "intermediate_size": 5,
        "num_hidden_layers": 1, "num_attention_heads": 3}
    ours, theirs = LlamaConfig.from_dict(d), transformers.LlamaConfig(**d)
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
                "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert LlamaConfig.from_dict({**d, "rope_theta": 5e5}).rope_theta == 5e5
    assert LlamaConfig.from_dict({**d, "eos_token_id": [3, 4]}).eos_token_id == [3, 4]


# --------------------------------------------------------------------------------------------------
# Sentencepiece

TEXTS = [
    "Hello, world!", "a  cat\n\n\tsat", "12345 67", " leading", "  two", "trailing ", "", "\n", " ",
    "é 世界 🙂 ½ ٣", "it's  don't", "x = [1, 2];\r\n", "<s></s><unk><0x0A><pad>",
    "naïve façade — “quoted”", "\u00a0\u3000wide", "</s>USER: hi"]


@pytest.fixture(scope="module")
def tiny_sp(tmp_path_factory):
    dir, out = tmp_path_factory.mktemp("sp"), io.BytesIO()
    words = "the cat sat on a mat USER : ASSISTANT what is this picture of two dogs and red square".split(
    )
    lines = [" ".join(random.Random(i).choices(words, k=8)) for i in range(300)]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out,
                                             vocab_size=340, model_type="bpe", byte_fallback=True,
                                             unk_id=0, bos_id=1, eos_id=2,
                                             normalization_rule_name="identity",
                                             remove_extra_whitespaces=False, minloglevel=2)
    (dir / "tokenizer.model").write_bytes(out.getvalue())
    return dir


def check_sentencepiece(tok):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tok.file))
    assert tok.vocab_size == sp.vocab_size() and (tok.bos_id, tok.eos_ids) == (1, {2})
    r = random.Random(0)
    texts = TEXTS + [
        "".join(r.choices("ab \n\t'US2é🙂<s>/", k=r.randint(1, 12))) for _ in range(500)]
    for text in texts:
        ids, on = tok.encode(text), tok.encode(text, continues=True)
        assert ids == sp.encode(text) and tok.encode(text, bos=True) == [1] + ids
        assert not {0, 1, 2} & {*ids, *on}
        assert tok.decode(ids) == text == sp.decode(ids)
        # nothing between, control ids are silent
        assert tok.decode([1, *tok.encode("x"), *on, 2]) == "x" + text
        pieces = list(tok.stream(iter(torch.tensor(ids))))
        assert "".join(pieces) == text and "" not in pieces and not any("\ufffd" in piece
                                                                        for piece in pieces)


def test_sentencepiece(tiny_sp):
    tok = Tokenizer.from_pretrained(tiny_sp)
    check_sentencepiece(tok)
    assert tok.encode("USER:", continues=True) != tok.encode("USER:")


def test_a_tokenizer_goes_to_other_processes(tiny_sp):
    """As a reading process that isn't forked takes it: by its file."""
    tok = Tokenizer.from_pretrained(tiny_sp)
    again = pickle.loads(pickle.dumps(tok))
    assert again.encode("a cat") == tok.encode("a cat") and again.eos_ids == tok.eos_ids


def test_streaming_is_immediate(tiny_sp):
    """A piece is handed out as soon as its last id is in, not at the end."""
    tok, seen = Tokenizer.from_pretrained(tiny_sp), []

    def ids():
        for id in tok.encode("a é 🙂 cat"):
            seen.append(id)
            yield id

    behind = [(piece, len(seen)) for piece in tok.stream(ids())]
    assert "".join(piece for piece, _ in behind) == "a é 🙂 cat"
    assert [n for _, n in behind] == sorted({n for _, n in behind}) and behind[0] == ("a", 1)
    cut = tok.encode("é")[:-1]
    assert tok.decode(cut) == "\ufffd"


def test_eos_of_the_config_counts(tiny_sp, tmp_path):
    shutil.copy(tiny_sp / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text('{"llm": {"eos_token_id": [2, 7]}}')
    tok = Tokenizer.from_pretrained(tmp_path)
    assert tok.eos_ids == {2, 7} and tok.decode([7]) == ""


def test_wrong_tokenizer_files(tmp_path):
    with pytest.raises(UserError, match="no tokenizer here"):
        Tokenizer.from_pretrained(tmp_path)
    for content, words in ((b"IQ== 0\nIg== 1\n", "every single byte"), (b"IQ== 0\nIg== x\n",
                                                                        "not tiktoken's format"),
                           (b"hello", "neither a sentencepiece model nor")):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=words):
            Tokenizer.from_pretrained(tmp_path)
    for fallback, words in ((False, "byte fallback"), (True, "changes line breaks")):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c d e f"] * 9),
                                                 model_writer=out, model_type="bpe",
                                                 byte_fallback=fallback,
                                                 vocab_size=12 + 256 * fallback,
                                                 normalization_rule_name="nmt_nfkc", minloglevel=2)
        (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
        with pytest.raises(UserError, match=words):
            Tokenizer.from_pretrained(tmp_path)


def test_ids_outside_the_vocabulary(tiny_sp):
    tok = Tokenizer.from_pretrained(tiny_sp)
    for id in (-1, tok.vocab_size):
        with pytest.raises(UserError, match=f"no token {id}"):
            tok.decode([id])


def test_llama2_tokenizer(tmp_path):
    path = os.environ.get("NANOCCRA_LLAMA2_TOKENIZER")
    if not path:
        pytest.skip("NANOCCRA_LLAMA2_TOKENIZER is not set (path to Llama 2's tokenizer.model)")
    shutil.copy(path, tmp_path / "tokenizer.model")
    tok = Tokenizer.from_pretrained(tmp_path)
    check_sentencepiece(tok)
    assert tok.vocab_size == 32000
    assert tok.encode("USER:") == [3148, 1001, 29901] and tok.encode("USER:", continues=True) == [
        11889, 29901]
    assert tok.encode("2") == [29871, 29906] and tok.encode("\n") == [29871, 13]
    assert tok.encode("\nWhat is", continues=True) == [13, 5618, 338]
    assert tok.encode(" ASSISTANT:", continues=True) == [319, 1799, 9047, 13566, 29901]
    assert tok.encode("hi</s><s>") == [7251, 829, 29879, 5299, 29879, 29958]
    assert tok.decode(tok.encode("2") + [2]) == "2"


GOLDEN3 = {"Hello world": [9906, 1917], " ": [220], "\n": [198],
           "  12345 dogs\n\n\tdon't": [220, 220, 4513, 1774, 12875, 271, 2765, 263, 956],
           "h\u00e9llo \u4e16\u754c \U0001f642": [71, 19010, 385, 127365, 28584]}


def test_llama3_tokenizer(tmp_path):
    path = os.environ.get("NANOCCRA_LLAMA3_TOKENIZER")
    if not path:
        pytest.skip(
            "NANOCCRA_LLAMA3_TOKENIZER is not set (tokenizer.model; the PyPI wheel llama-models holds it)"
        )
    shutil.copy(path, tmp_path / "tokenizer.model")
    tok = Tokenizer.from_pretrained(tmp_path)
    assert (tok.vocab_size, tok.bos_id, tok.eos_ids) == (128256, 128000, {128001, 128008, 128009})
    for text, ids in GOLDEN3.items():
        assert tok.encode(text) == tok.encode(text,
                                              continues=True) == ids and tok.decode(ids) == text
    typed = tok.encode("<|eot_id|><|begin_of_text|>", bos=True)
    assert typed[0] == 128000 and max(
        typed[1:]) < 128000 and tok.decode(typed) == "<|eot_id|><|begin_of_text|>"


def test_tiktoken_file(tmp_path):
    """A small file in Meta's format: 256 bytes, then "he" and "hel", the lower rank merging first.
    """
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"hel", b" w"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    tok = Tokenizer.from_pretrained(tmp_path)
    assert tok.encode("hello w") == [257, 108, 111, 258] and tok.decode([257, 108, 111, 258
                                                                         ]) == "hello w"
    assert (tok.vocab_size, tok.bos_id, tok.eos_ids) == (259 + 256, 259, {260, 267, 268})
    assert tok.decode([259, 257, 268]) == "hel"


# --------------------------------------------------------------------------------------------------
# Byte-level BPE

def bpe_folder(dir, kind, shuffle=False):
    """A tiny tokenizer.json trained by the tokenizers library; `shuffle`: ids say nothing about the
    order of merges."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, trainers

    from core.tokenizer import LLAMA3
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    first = {"gpt2": [], "digits": [pre_tokenizers.Digits(individual_digits=True)],
             "llama3": [pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")]}[kind]
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<|end|>",
                                                                  "<|start|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator([Path(__file__).read_text()] + TEXTS, trainer)
    spec = json.loads(fast.to_str())
    if shuffle:
        ids = list(range(2, len(spec["model"]["vocab"])))
        random.Random(0).shuffle(ids)
        spec["model"]["vocab"] = {
            token: id if id < 2 else ids[id - 2] for token, id in spec["model"]["vocab"].items()}
    (dir / "tokenizer.json").write_text(json.dumps(spec))
    (dir / "tokenizer_config.json"
     ).write_text('{"eos_token": "<|end|>", "bos_token": {"content": "<|start|>"}}')
    fast = tokenizers.Tokenizer.from_str(json.dumps(spec))
    fast.encode_special_tokens = True                                  # "<|end|>" in a text is text
    return fast


def check_byte_level(tok, expected, controls):
    r = random.Random(0)
    texts = TEXTS + [controls, "x" + controls + " 1"] + \
        ["".join(r.choices("aab tdre  \n\t'123½é🙂.,!<|end|>", k=r.randint(1, 14))) for _ in range(1500)] + \
        ["".join(r.choices(" abcdefghijklmnopqrstuvwxyz", k=40)) for _ in range(300)]
    for text in texts:
        ids = tok.encode(text)
        assert ids == expected(text), text
        assert ids == tok.encode(text, continues=True) and tok.encode(
            text, bos=True) == [tok.bos_id] + ids
        assert not {tok.bos_id, *tok.eos_ids} & {*ids}
        assert tok.decode([tok.bos_id] + ids + list(tok.eos_ids)) == text
        assert not any("\ufffd" in piece or not piece for piece in tok.stream(ids))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "digits", "llama3"])
def test_byte_level_bpe(kind, shuffle, tmp_path):
    fast = bpe_folder(tmp_path, kind, shuffle)
    tok = Tokenizer.from_pretrained(tmp_path)
    assert (tok.bos_id, tok.eos_ids, tok.vocab_size) == (1, {0}, 700)
    check_byte_level(tok, lambda text: fast.encode(text, add_special_tokens=False).ids,
                     "<|end|><|start|>")


@pytest.mark.parametrize("change, words", [
    (lambda s: s.update(normalizer={"type": "NFC"}), "not a byte-level BPE of a kind known"),
    (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "not a byte-level BPE of a kind known"),
    (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "not a byte-level BPE of a kind known"),
    (lambda s: s["model"].update(byte_fallback=True), "tokenizer.model"),
    (lambda s: s["added_tokens"][0].update(special=False), "added tokens that are not special"),
    (lambda s: s["model"]["vocab"].update({"日": 700}), "not a letter of the byte alphabet"),
    (lambda s: s["added_tokens"].pop(0), "eos_token '<.end.>' is not among the added tokens"),
])
def test_unknown_tokenizers_are_refused(change, words, tmp_path):
    bpe_folder(tmp_path, "gpt2")
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=words):
        Tokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_must_know_its_eos(tmp_path):
    bpe_folder(tmp_path, "gpt2")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="which token ends a text"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 0, "bos_token_id": null}')
    tok = Tokenizer.from_pretrained(tmp_path)
    assert tok.eos_ids == {0} and tok.bos_id is None
    with pytest.raises(UserError, match="no bos token"):
        tok.encode("a", bos=True)


# --------------------------------------------------------------------------------------------------
# The real SmolLM2-135M

@pytest.fixture(scope="module")
def smol():
    dir = os.environ.get("NANOCCRA_SMOLLM2")
    if not dir:
        pytest.skip("NANOCCRA_SMOLLM2 is not set (a folder with SmolLM2-135M, Hugging Face layout)")
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        dir, dtype=torch.float32).eval().requires_grad_(False)
    return dir, Llama.from_pretrained(dir).requires_grad_(False), oracle


def test_smollm2_model(smol):
    dir, net, oracle = smol
    tok = Tokenizer.from_pretrained(dir)
    prompts = [
        "The capital of France is", "def fibonacci(n):\n", "Once upon a time, there was a cat",
        "Q: What is 2 + 3?\nA:", "Water"]
    for prompt in prompts:
        ids = torch.tensor([tok.encode(prompt)])
        torch.testing.assert_close(net(ids), oracle(ids).logits, atol=2e-3, rtol=0)
        ours = greedy_with_cache(net, ids, torch.ones_like(ids, dtype=torch.bool), 64)
        # If transformers' choice after every beginning of ours is our next token, then its own
        # greedy text is ours.
        theirs = oracle(torch.cat((ids, ours), 1)).logits.argmax(-1)[:, ids.shape[1] - 1:-1]
        assert torch.equal(ours, theirs), prompt


def test_smollm2_tokenizer(smol):
    transformers = pytest.importorskip("transformers")
    dir, tok = smol[0], Tokenizer.from_pretrained(smol[0])
    fast = transformers.AutoTokenizer.from_pretrained(dir)

    def expected(text):
        return fast.encode(text, add_special_tokens=False, split_special_tokens=True)

    assert (tok.bos_id, tok.eos_ids, tok.vocab_size) == (1, {2}, 49152)
    check_byte_level(tok, expected, "<|im_start|>user<|im_end|>")
    words = [word for id in range(tok.vocab_size) if "\ufffd" not in (word := tok.decode([id]))]
    assert len(words) > 48000 and all(tok.encode(word) == expected(word) for word in words)
    mix = ["".join(random.Random(i).choices(words, k=6)) for i in range(1500)]
    assert all(tok.encode(text) == expected(text) for text in mix)
