"""fast/packed.py: each packed layer against its literal twin in float64, and whole models."""
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fast
from ccra import VLM
from core.common import ROOT, UserError
from core.tokenizer import Tokenizer
from fast import linear, memory, packed
from fast.linear import HalfLinear
from fast.packed import Columns, Int8, PackedAttention, PackedMLP
from llama import KVCache, Llama
from tests.fast.helpers import CONFIG, EPS, HALF, close, decode, draw, needs_fbgemm, net
from toy import exam
from toy import world as toy

pytestmark = pytest.mark.usefixtures("slow_half")


# --------------------------------------------------------------------------------------------------
# Layers

@pytest.mark.parametrize("rows, D, O", [(1, 64, 192), (2, 100, 320), (3, 5000, 128)])
@pytest.mark.parametrize("dtype", HALF)
def test_columns(rows, D, O, dtype, monkeypatch):
    monkeypatch.setattr(linear, "BLOCK", 2 ** 13)    # several pieces, the last one short
    monkeypatch.setattr(packed, "AT_ONCE", 128)      # two tables' worth
    x, weight = draw(1, rows, D, dtype=dtype) / D ** 0.5, draw(O, D, dtype=dtype, seed=1)
    slow = x.double() @ weight.double().t()                                 # (1, rows, O)
    columns = Columns([weight[:64], weight[64:]])
    close(columns(x), slow, dtype)
    monkeypatch.setattr(linear, "SLOW", set())       # a CPU that multiplies this dtype in hardware
    close(columns(x), slow, dtype)


@needs_fbgemm
@pytest.mark.parametrize("O, first, wide, w", [
    (192, 128, 256, 64), (768, 512, 256, 256), (768, 384, 256, 128), (768, 512, 64, 64)])
def test_the_table_is_the_weight_in_another_order(O, first, wide, w, monkeypatch):
    """As wide as the CPU's registers allow, and the weights' numbers of rows."""
    monkeypatch.setattr(packed, "WIDTH", wide)
    weight = draw(O, 24, dtype=torch.bfloat16)
    columns = Columns([weight[:first], weight[first:]])
    assert columns.table.shape == (O // w, 24, w)
    for o in (0, 63, 64, 130, O - 1):
        column = torch.cat([weight[o, ::2], weight[o, 1::2]])
        assert torch.equal(columns.table[o // w, :, o % w], column)
    x = draw(1, 3, 24, dtype=torch.bfloat16) / 5
    for rows in (x, x[:, :1]):
        close(columns(rows), rows.double() @ weight.double().t(), torch.bfloat16)


def test_int8_takes_rows_that_its_kernel_can_read():
    """torch's kernel reads 16 numbers at a time, also beyond a row's end."""
    assert Int8.fit([draw(8, 48), draw(8, 16)])
    with pytest.raises(UserError, match="multiple of 16 numbers in a row, not 24"):
        Int8.fit([draw(8, 48), draw(8, 24)])


@pytest.mark.parametrize("slow", [set(HALF), {torch.float16}])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_int8_is_its_literal_twin(dtype, slow, monkeypatch):
    monkeypatch.setattr(linear, "SLOW", slow)
    weight = draw(200, 96, dtype=dtype) * draw(200, 1, dtype=dtype, seed=1).exp()
    weight[7] = 0
    layer = Int8([weight[:50], weight[50:]])
    w, ours = weight.double(), layer.weight.double()
    scale = (w.abs().amax(1).float() / 127).bfloat16().double()                 # (O)
    q = (w / scale.clamp(min=1e-40)[:, None]).round().clamp(-127, 127)          # (O, D)
    assert layer.weight.dtype == torch.int8 and (ours - q).abs().max() <= 1
    assert (ours != q).double().mean() < 1e-3                    # float32's ties at most
    there = w.any(1)
    assert torch.equal(layer.scale[there].double(), scale[there]) and not layer.weight[7].any()
    # half a scale of rounding, plus what is cut off where bfloat16 rounded the scale down
    kept = ours * layer.scale.double()[:, None]
    assert ((kept - w).abs() <= 0.76 * scale[:, None] + 1e-12).all()
    many, few = draw(20, 96, dtype=dtype, seed=2), draw(2, 96, dtype=dtype, seed=3)
    exact, roundings = many.double() @ kept.t(), 2.1 if dtype in set(HALF) - linear.SLOW else 1.1
    allowed = EPS[dtype] * roundings * exact.abs() + 1e-4 * exact.abs().max()
    assert ((layer(many).double() - exact).abs() <= allowed).all()
    exact = few.bfloat16().double() @ kept.t()       # the kernel's x, and what it returns
    allowed = 2 ** -7 * exact.abs() + 1e-2 * scale * 127
    assert ((layer(few).double() - exact).abs() <= allowed).all()
    assert layer(few).dtype == dtype


# --------------------------------------------------------------------------------------------------
# Models

def off(y, truth):
    return (y.float() - truth).norm() / truth.norm()


@needs_fbgemm
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, num_key_value_heads=1, head_dim=64,
                                                    num_attention_heads=2,
                                                    tie_word_embeddings=True)])
def test_a_packed_model(config):
    """The same logits as before, whether the prompt is read at once or token by token."""
    ids, exact = torch.randint(128, (1, 12)), net(config).float()
    before, model = fast.prepare(net(config))(ids), net(config)
    assert fast.prepare(model, pack=True) is model
    block = model.layers[0]
    assert isinstance(block.self_attn.qkv_proj, Columns) and isinstance(model.lm_head, Columns)
    assert type(block.self_attn) is PackedAttention and type(block.mlp) is PackedMLP
    assert not hasattr(block.mlp, "gate_proj") and not hasattr(block.self_attn, "v_proj")
    truth = exact(ids)
    old, new = off(before, truth), off(model(ids), truth)
    assert new < 1.2 * old + 1e-3 and old < 0.1
    assert decode(model, ids).shape == (1, 8)
    with torch.inference_mode():
        cache = KVCache(config, 1, 12, torch.bfloat16)
        steps = torch.cat([model(ids[:, t:t + 1], cache=cache) for t in range(12)], 1)
    assert off(steps, truth) < 1.2 * old + 1e-3


def test_what_does_not_fit_stays_as_it_is():
    model, other = net(dtype=torch.float32), net(replace(CONFIG, intermediate_size=100))
    ids = torch.randint(128, (1, 5))
    before = model(ids)
    fast.prepare(model, pack=True)
    assert torch.equal(model(ids), before) and type(model.lm_head) is HalfLinear
    fast.prepare(other, pack=True)
    mlp = other.layers[0].mlp
    assert not hasattr(mlp, "gate_up_proj") and type(mlp.up_proj) is HalfLinear
    assert not Columns.fit([draw(64, 33, dtype=torch.bfloat16)])     # columns come in pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_model(dtype):
    ids, exact = torch.randint(128, (2, 12)), net().float()
    model = fast.prepare(net(dtype=dtype), int8=True)
    assert isinstance(model.layers[2].mlp.down_proj, Int8)
    assert [p.ndim for p in model.parameters()].count(2) == 1        # the embeddings
    truth = exact(ids)
    assert 1e-3 < off(model(ids), truth) < 0.1
    assert decode(model, ids).shape == (2, 8)                        # a batch


def test_a_packed_model_is_not_saved_or_packed_again(tmp_path):
    model = fast.prepare(net(), int8=True)
    whole = fast.prepare(VLM.from_pretrained(toy.MODEL), int8=True)
    acts = [lambda: fast.prepare(model, int8=True), lambda: fast.prepare(model, pack=True),
            lambda: model.save_pretrained(tmp_path / "x"),
            lambda: whole.save_pretrained(tmp_path / "x")]
    for act in acts:
        with pytest.raises(UserError, match="packed"):
            act()
    assert not (tmp_path / "x").exists()
    assert fast.prepare(model) is model


@pytest.mark.parametrize("int8", [False, True])
def test_memory_that_does_not_hold_both(int8, tmp_path, monkeypatch):
    """What a model was loaded from is dropped while it is packed: the same model comes of it, and
    the file stays."""
    net().save_pretrained(tmp_path)
    said, ids = [], torch.randint(128, (1, 5))
    for size in (2 ** 40, 1):
        monkeypatch.setattr(memory.os, "sysconf", lambda name, size=size: size)
        assert memory.holds(2) == (size > 1)
        llm = fast.prepare(Llama.from_pretrained(tmp_path), pack=not int8, int8=int8)
        said.append(llm(ids))
    assert torch.equal(*said) and Llama.from_pretrained(tmp_path)(ids).isfinite().all()


def test_int8_bundled_model():
    """The bundled model in int8: its logits hardly move, and it still answers."""
    import eval as evaluation
    exact, model = (VLM.from_pretrained(toy.MODEL, dtype=torch.float32).eval() for _ in range(2))
    fast.prepare(model, int8=True)
    ids = torch.randint(3, exact.llm.config.vocab_size, (4, 60))
    with torch.no_grad():
        truth, rounded = exact.llm(ids), model.llm(ids)
    assert 1e-4 < (rounded - truth).square().mean().sqrt() / truth.std() < 0.05
    items = exam.exam(11, 70)
    tokenizer = Tokenizer.from_pretrained(toy.MODEL)
    right = [exam.score(items, evaluation.sit(vlm, tokenizer, items, 70, "cpu"))["accuracy"]
             for vlm in (exact, model)]
    assert right[1] >= 0.9 and right[1] >= right[0] - 0.03


def test_sample_and_eval_take_int8():
    def out(*arguments):
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                              cwd=ROOT)
    ask = ["sample.py", "--image", "assets/scene.png", "--q", "How many donuts are there?"]
    run = out(*ask, "--quant", "int8")
    assert run.returncode == 0 and run.stdout == "3\n", run.stderr
    run = out(*ask, "--quant", "int8", "--pack")
    assert run.returncode == 2 and run.stderr.startswith("error: --quant and --pack")
    run = out("eval.py", "--task", "toy", "--n", "14", "--quant", "int8", "--json")
    assert run.returncode == 0 and json.loads(run.stdout)["n"] == 14, run.stderr
