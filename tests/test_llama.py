"""llama.py against transformers (tiny random models, SmolLM2 where it is at hand), and decoding
against its slow twin, plain and as fast.prepare makes it.

Real weights, skipped where it isn't set: NANOCCRA_SMOLLM2, a folder with SmolLM2-135M in the
Hugging Face layout.
"""
import json
import os
from dataclasses import replace

import pytest
import torch

import fast
from core.common import UserError
from core.tokenizer import Tokenizer
from core.weights import Tensors, save
from llama import KVCache, Llama, LlamaConfig, RMSNorm, frequencies, rope, rotate
from tests.llamas import SHAPES, TINY, greedy_without_cache, left_padded, longer, random_llama


def greedy_with_cache(net, ids, mask, n):
    """greedy_without_cache, with a KVCache: the prompt at once, then one position a token."""
    cache, out = KVCache(net.config, len(ids), ids.shape[1] + n), []
    for _ in range(n):
        ids = net(ids, mask=mask, cache=cache)[:, -1].argmax(-1, keepdim=True)
        mask = longer(ids, mask, ids)[1]
        out.append(ids)
    return torch.cat(out, 1)


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
    turned, right = rotate(x, cos, sin), torch.cat((y.real, y.imag), -1)
    torch.testing.assert_close(turned, right, atol=1e-3, rtol=0)
    few = (positions <= 7).double()[:, None, :, None]   # float32 angles: exact while they are small
    torch.testing.assert_close(turned * few, right * few, atol=5e-6, rtol=0)


def llama3_scaling(factor):
    return dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)


@pytest.mark.parametrize("hd, factor, kept, blended, slowed, first, golden", [
    (128, 8.0, 29, 6, 29, 28, [3.21145e-3, 2.16657e-3, 1.37189e-3, 8.56751e-4]),      # Llama-3.1-8B
    (64, 32.0, 15, 3, 14, 15, [1.29055e-3, 4.29557e-4, 9.70829e-5])])                 # Llama-3.2-1B
def test_llama3_frequencies(hd, factor, kept, blended, slowed, first, golden):
    config = replace(TINY, head_dim=hd, rope_theta=5e5, rope_scaling=llama3_scaling(factor))
    before = frequencies(replace(config, rope_scaling=None), "cpu")
    after = frequencies(config, "cpu")
    ratio = before / after
    same, whole = ratio < 1.0001, ratio > factor * 0.9999
    assert [same.sum(), (~same & ~whole).sum(), whole.sum()] == [kept, blended, slowed]
    some = after[first:first + len(golden)]
    torch.testing.assert_close(some, torch.tensor(golden), rtol=1e-5, atol=0)


def test_rope_keeps_float32_angles_in_a_bfloat16_model():
    net = random_llama().to(torch.bfloat16)
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
    near = (quotient.double() * norm.weight.double() * (1 + 2 ** -9)).bfloat16()
    assert (y != near).float().mean() > 0.1


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

@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_decoding_with_and_without_cache(name, prepared):
    net = random_llama(SHAPES[name])
    ids, mask = left_padded([9, 4, 1])
    slow = greedy_without_cache(net, ids, mask, 12)
    if prepared:
        fast.prepare(net)
    assert torch.equal(greedy_with_cache(net, ids, mask, 12), slow)
    generated = list(net.generate(net.embed(ids), mask, max_new_tokens=12))
    assert torch.equal(torch.stack(generated, 1), slow)
    for row, n in enumerate([9, 4, 1]):                         # and each row as if it were alone
        alone = ids[row:row + 1, -n:]
        real = torch.ones_like(alone, dtype=torch.bool)
        assert torch.equal(greedy_with_cache(net, alone, real, 12)[0], slow[row])


@pytest.mark.parametrize("cuts", [(1, 12), (5, 6, 12), (12,), (7, 12)])
def test_cache_in_pieces_without_a_mask(cuts):
    net, ids = random_llama(SHAPES["tied+gqa"]), torch.randint(97, (2, 12))
    cache, parts = KVCache(net.config, 2, 12), []
    for start, end in zip((0, *cuts), cuts):
        parts.append(net(ids[:, start:end], cache=cache))
        assert cache.length == end
    torch.testing.assert_close(torch.cat(parts, 1), net(ids), atol=1e-4, rtol=1e-4)


def test_cache_in_pieces_with_padding():
    net = random_llama()
    ids, mask = left_padded([12, 7])
    cache = KVCache(net.config, 2, 12)
    parts = [net(ids[:, a:b], mask=mask[:, :b], cache=cache)
             for a, b in ((0, 4), (4, 9), (9, 10), (10, 12))]
    whole = net(ids, mask=mask)
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], atol=1e-4, rtol=1e-4)


def test_a_full_cache_says_so():
    net = random_llama()
    cache = KVCache(net.config, 1, 4)
    net(torch.ones(1, 4, dtype=torch.long), cache=cache)
    with pytest.raises(UserError, match="room for 4 positions, not for 5"):
        net(torch.ones(1, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(side):
    net = random_llama(SHAPES["tied+gqa"])
    text, junk = torch.randint(97, (2, 6)), torch.randint(97, (2, 5))
    real = {"left": [0] * 5 + [1] * 6, "right": [1] * 6 + [0] * 5,
            "middle": [1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1]}[side]
    mask = torch.tensor([real, real], dtype=torch.bool)
    ids = torch.empty(2, 11, dtype=torch.long)
    ids = ids.masked_scatter(mask, text).masked_scatter(~mask, junk)
    shown = net(ids, mask=mask)[mask].view(2, 6, -1)
    torch.testing.assert_close(shown, net(text), atol=1e-4, rtol=1e-4)


def test_no_nan_even_in_an_empty_row():
    net = random_llama().requires_grad_(True)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    logits = net(torch.ones(2, 5, dtype=torch.long), mask=mask)
    logits.square().sum().backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters())


def test_nobody_sees_the_future():
    net, ids = random_llama(), torch.randint(97, (1, 10))
    other = ids.clone()
    other[0, 6] = (other[0, 6] + 1) % 97
    a, b = net(ids), net(other)
    torch.testing.assert_close(a[:, :6], b[:, :6], atol=1e-5, rtol=1e-5)
    assert ((a - b)[:, 6:].abs().amax(-1) > 1e-2).all()


def test_only_distances_matter_and_positions_are_obeyed():
    net, ids = random_llama(), torch.randint(97, (1, 10))
    at = torch.arange(10)[None]
    torch.testing.assert_close(net(ids, positions=at + 37), net(ids), atol=1e-3, rtol=1e-3)
    assert (net(ids, positions=at * 2) - net(ids)).abs().max() > 1e-2


def test_embeds_are_tokens_looked_up():
    net, ids = random_llama(), torch.randint(97, (2, 7))
    assert torch.equal(net(embeds=net.embed(ids)), net(ids))
    assert torch.equal(net.lm_head(net.hidden(ids)), net(ids))
    both = {"tokens": ids, "embeds": net.embed(ids)}
    for wrong in ({}, both, {"tokens": ids, "mask": torch.ones(2, 6).bool()}):
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
    net, ids = random_llama(SHAPES[name]), torch.randint(97, (2, 9))
    net.save_pretrained(tmp_path)
    assert ("lm_head.weight" in Tensors(tmp_path)) != SHAPES[name].tie_word_embeddings
    oracle, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(oracle(ids).logits, net(ids), atol=1e-4, rtol=1e-4)
    assert torch.equal(Llama.from_pretrained(tmp_path)(ids), net(ids))


def test_reads_the_language_model_of_a_vlm_folder(tmp_path):
    net, ids = random_llama(), torch.randint(97, (1, 5))
    own = {"llm." + name: p for name, p in net.named_parameters()}
    names = ("vision.x", "fuser.q.weight", "projector.0.weight")
    rest = {name: torch.ones(1) for name in names}
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
    net = random_llama(SHAPES["tied+gqa"])
    net.save_pretrained(tmp_path)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(tmp_path, add)
    assert torch.equal(Llama.from_pretrained(tmp_path).norm.weight, net.norm.weight)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    differs = "lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"
    with pytest.raises(UserError, match=differs):
        Llama.from_pretrained(tmp_path)


LAYERS = "model.layers."


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(LAYERS + "1.mlp.up_proj.weight"), "1 missing .layers.1.mlp.up_proj.weight"),
    (lambda t: t.update({LAYERS + "3.mlp.up_proj.weight": torch.ones(2)}),
     "1 unknown .*3.mlp.up_proj.weight in m"),
    (lambda t: t.update({LAYERS + "0.self_attn.q_proj.bias": torch.ones(48)}),
     "1 unknown .*q_proj.bias in m"),
    (lambda t: t.update({"model.norm.weight": torch.ones(9)}),
     "1 misshapen .model.norm.weight in model.saf.* is .9"),
])
def test_strict_about_tensors(change, words, tmp_path):
    random_llama().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=words):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, word", [
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
     "config.json: rope_scaling: low_freq_factor"),
    ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "linear"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}}, "yarn"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"model_type": "qwen2"}, "qwen2"),
    ({"model_type": None}, "model_type"),
    ({"quantization_config": {}}, "quantization_config"),
    ({"num_hidden_layers": None}, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, "key/value heads"),
    ({"head_dim": 7}, "head_dim"),
])
def test_other_architectures_are_refused(change, word):
    with pytest.raises(UserError, match=word):
        LlamaConfig.from_dict({**TINY.to_dict(), **change})


def test_absent_settings_mean_what_they_mean_in_transformers():
    transformers = pytest.importorskip("transformers")
    d = {"model_type": "llama", "vocab_size": 9, "hidden_size": 24, "intermediate_size": 5,
         "num_hidden_layers": 1, "num_attention_heads": 3}
    ours, theirs = LlamaConfig.from_dict(d), transformers.LlamaConfig(**d)
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
                "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert LlamaConfig.from_dict({**d, "rope_theta": 5e5}).rope_theta == 5e5
    assert LlamaConfig.from_dict({**d, "eos_token_id": [3, 4]}).eos_token_id == [3, 4]


@pytest.mark.real
def test_smollm2():
    """The real SmolLM2-135M, greedily."""
    dir = os.environ.get("NANOCCRA_SMOLLM2")
    if not dir:
        pytest.skip("NANOCCRA_SMOLLM2 is not set (a folder with SmolLM2-135M, Hugging Face layout)")
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(dir, dtype=torch.float32)
    oracle = oracle.eval().requires_grad_(False)
    net, tok = Llama.from_pretrained(dir).requires_grad_(False), Tokenizer.from_pretrained(dir)
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
