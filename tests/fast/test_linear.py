"""linear.py: each fast layer against its literal twin in float64, and whole models made of them."""
import json
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from ccra import VLM
from core.common import ROOT, UserError
from fast import linear, memory, packed
from fast.linear import Linear, blocks
from fast.memory import forget
from fast.packed import Columns, Int8
from llama import Llama, LlamaConfig
from toy import exam
from toy import world as toy

HALF = [torch.bfloat16, torch.float16]
EPS = {torch.bfloat16: 2 ** -8, torch.float16: 2 ** -11, torch.float32: 2 ** -20}       # half a unit in the last place
CONFIG = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=4, rms_norm_eps=1e-5)


@pytest.fixture(autouse=True)
def slow_half(monkeypatch):
    """As on a CPU without bfloat16 products, wherever the tests run."""
    for module in ("linear", "clip"):
        monkeypatch.setattr(sys.modules[module], "SLOW", set(HALF))


needs_fbgemm = pytest.mark.skipif(not packed.SUMS, reason="FBGEMM is x86's")


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(fast, slow, dtype, factor=1.01):
    """fast is slow (float64), rounded once to dtype."""
    assert fast.dtype == dtype and fast.shape == slow.shape
    assert ((fast.double() - slow).abs() <= factor * EPS[dtype] * slow.abs() + 1e-4).all()


@pytest.mark.parametrize("rows, D, O", [(1, 64, 192), (2, 100, 320), (7, 33, 448), (3, 5000, 128)])
@pytest.mark.parametrize("dtype", HALF)
def test_blocks_and_columns(rows, D, O, dtype, monkeypatch):
    monkeypatch.setattr(linear, "BLOCK", 2 ** 13)          # several pieces to a weight, the last one short
    monkeypatch.setattr(packed, "AT_ONCE", 128)            # two tables' worth
    x, weight = draw(1, rows, D, dtype=dtype) / D ** 0.5, draw(O, D, dtype=dtype, seed=1)
    slow = x.double() @ weight.double().t()                                          # (1, rows, O)
    close(blocks(x, weight), slow, dtype)
    if D % 2:
        return
    columns = Columns([weight[:64], weight[64:]])
    close(columns(x), slow, dtype)
    monkeypatch.setattr(linear, "SLOW", set())             # as on a CPU that multiplies this dtype in hardware
    close(columns(x), slow, dtype)


@needs_fbgemm
@pytest.mark.parametrize("n, room, g, m, W",
                         [(1, 5, 1, 5, 64), (3, 70, 1, 66, 32), (2, 16, 4, 16, 131), (4, 9, 2, 1, 7)])
@pytest.mark.parametrize("dtype", HALF)
def test_sums(n, room, g, m, W, dtype):
    """What lies behind the first m lines is never looked at: there is NaN."""
    tables, weights = draw(n, room, W, dtype=dtype), draw(n, g, m, dtype=dtype, seed=1)
    tables[:, m:] = torch.nan
    close(packed.sums(tables, weights), weights.double() @ tables[:, :m].double(), dtype)
    if m % 2 == 0:
        turns = torch.stack([tables[:, :m // 2], tables[:, m // 2:m]], 2).flatten(1, 2)      # (n, m, W)
        close(packed.sums(tables, weights, halves=True), weights.double() @ turns.double(), dtype)


@needs_fbgemm
@pytest.mark.parametrize("O, first, wide, w",
                         [(192, 128, 256, 64), (768, 512, 256, 256), (768, 384, 256, 128), (768, 512, 64, 64)])
def test_the_table_is_the_weight_in_another_order(O, first, wide, w, monkeypatch):
    """As wide as the CPU's registers allow, and the weights' numbers of rows."""
    monkeypatch.setattr(packed, "WIDTH", wide)
    weight = draw(O, 24, dtype=torch.bfloat16)
    columns = Columns([weight[:first], weight[first:]])
    assert columns.table.shape == (O // w, 24, w)
    for o in (0, 63, 64, 130, O - 1):
        assert torch.equal(columns.table[o // w, :, o % w], torch.cat([weight[o, ::2], weight[o, 1::2]]))
    x = draw(1, 3, 24, dtype=torch.bfloat16) / 5
    close(columns(x), x.double() @ weight.double().t(), torch.bfloat16)
    close(columns(x[:, :1]), x[:, :1].double() @ weight.double().t(), torch.bfloat16)


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
    w = weight.double()
    scale = (w.abs().amax(1).float() / 127).bfloat16().double()                      # (O)
    q = (w / scale.clamp(min=1e-40)[:, None]).round().clamp(-127, 127)               # (O, D)
    assert layer.weight.dtype == torch.int8 and (layer.weight.double() - q).abs().max() <= 1
    assert (layer.weight.double() != q).double().mean() < 1e-3                       # float32's ties at most
    assert torch.equal(layer.scale[w.any(1)].double(), scale[w.any(1)]) and not layer.weight[7].any()
    # half a scale of rounding, plus what is cut off where bfloat16 rounded the scale down
    assert ((layer.weight.double() * layer.scale.double()[:, None] - w).abs() <= 0.76 * scale[:, None] + 1e-12).all()
    kept = layer.weight.double() * layer.scale.double()[:, None]
    many, few = draw(20, 96, dtype=dtype, seed=2), draw(2, 96, dtype=dtype, seed=3)
    slow, roundings = many.double() @ kept.t(), 2.1 if dtype in set(HALF) - linear.SLOW else 1.1
    assert ((layer(many).double() - slow).abs() <= EPS[dtype] * roundings * slow.abs() + 1e-4 * slow.abs().max()).all()
    slow = few.bfloat16().double() @ kept.t()                                     # the kernel's x, and what it returns
    assert ((layer(few).double() - slow).abs() <= 2 ** -7 * slow.abs() + 1e-2 * scale * 127).all()
    assert layer(few).dtype == dtype


def test_linear_is_nn_linear_but_for_many_rows_at_inference(monkeypatch):
    used = []
    monkeypatch.setattr(linear, "blocks", lambda x, w: used.append(1) or blocks(x, w))
    half, wide = Linear(32, 48).bfloat16(), Linear(32, 48)
    x = draw(5, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(half(x), nn.functional.linear(x, half.weight, half.bias), atol=2e-2, rtol=2e-2)
        assert used == [1]
        half(x[:1]), wide(x.float())
    half(x).sum().backward()                                                         # training: exactly nn.Linear
    assert used == [1] and half.weight.grad is not None
    monkeypatch.setattr(linear, "SLOW", set())
    with torch.no_grad():
        half(x)
    assert used == [1]


def net(config=CONFIG, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    model = Llama(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) * 0.15 + (p.ndim == 1))
    return model.to(dtype)


def decode(model, ids, n=8):
    return torch.stack(list(model.generate(model.embed(ids), max_new_tokens=n)), 1)


@needs_fbgemm
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, num_key_value_heads=1, head_dim=64, num_attention_heads=2,
                                                    tie_word_embeddings=True)])
def test_a_packed_model(config):
    """The same logits as before, whether the prompt is read at once or token by token."""
    ids, exact = torch.randint(128, (1, 12)), net(config).float()
    before, model = net(config)(ids), net(config)
    assert model.pack() is model and isinstance(model.layers[0].self_attn.qkv_proj, Columns)
    assert isinstance(model.lm_head, Columns) and not hasattr(model.layers[1].mlp, "gate_proj")
    truth = exact(ids)
    old, new = ((y.float() - truth).norm() / truth.norm() for y in (before, model(ids)))
    assert new < 1.2 * old + 1e-3 and old < 0.1
    assert decode(model, ids).shape == (1, 8)
    with torch.inference_mode():
        from llama import KVCache
        cache = KVCache(config, 1, 12, torch.bfloat16)
        steps = torch.cat([model(ids[:, t:t + 1], cache=cache) for t in range(12)], 1)
    assert ((steps.float() - truth).norm() / truth.norm()) < 1.2 * old + 1e-3


def test_what_does_not_fit_stays_as_it_is():
    model, other = net(dtype=torch.float32), net(replace(CONFIG, intermediate_size=100))
    ids = torch.randint(128, (1, 5))
    before = model(ids)
    assert torch.equal(model.pack()(ids), before) and isinstance(model.lm_head, Linear)
    other.pack()
    assert other.layers[0].mlp.gate_up_proj is None and isinstance(other.layers[0].mlp.up_proj, Linear)
    assert not Columns.fit([draw(64, 33, dtype=torch.bfloat16)])                     # columns come in pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_model(dtype):
    ids, exact = torch.randint(128, (2, 12)), net().float()
    model = net(dtype=dtype).pack(int8=True)
    assert isinstance(model.layers[2].mlp.down_proj, Int8) and not [p for p in model.parameters() if p.ndim == 2][1:]
    truth = exact(ids)
    assert 1e-3 < (model(ids).float() - truth).norm() / truth.norm() < 0.1
    assert decode(model, ids).shape == (2, 8)                                        # a batch


def test_a_packed_model_is_not_saved_or_packed_again(tmp_path):
    model = net().pack(int8=True)
    for act in (lambda: model.pack(), lambda: model.save_pretrained(tmp_path / "x")):
        with pytest.raises(UserError, match="packed"):
            act()
    whole = VLM.from_pretrained(toy.MODEL)
    whole.llm.pack(int8=True)
    with pytest.raises(UserError, match="packed"):
        whole.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("short", [False, True])
def test_pages_of_a_file_leave_memory_and_come_back(tmp_path, short):
    data = torch.arange(2 ** 20, dtype=torch.float32)
    (tmp_path / "x").write_bytes(bytes(data.numpy()))
    mapped = torch.from_file(str(tmp_path / "x"), shared=False, size=2 ** 20)

    def resident():
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))
    mapped.sum()
    before = resident()
    forget(mapped[1000:], short)
    assert resident() < before - 3500                                                # of 4096 kB
    assert torch.equal(mapped, data)
    own = data.clone()
    forget(own, short)                                                               # no file's: untouched
    assert torch.equal(own, data)


@pytest.mark.parametrize("int8", [False, True])
def test_memory_that_does_not_hold_both(int8, tmp_path, monkeypatch):
    """What a model was loaded from is dropped while it is packed: the same model comes of it, and the file stays."""
    net().save_pretrained(tmp_path)
    packed, ids = [], torch.randint(128, (1, 5))
    for size in (2 ** 40, 1):
        monkeypatch.setattr(linear.os, "sysconf", lambda name, size=size: size)
        assert memory.holds(2) == (size > 1)
        packed.append(Llama.from_pretrained(tmp_path).pack(int8)(ids))
    assert torch.equal(*packed) and Llama.from_pretrained(tmp_path)(ids).isfinite().all()


def test_int8_embedded_model():
    """The embedded model in int8: its logits hardly move, and it still answers."""
    import eval as evaluation
    from core.tokenizer import Tokenizer
    exact, model = (VLM.from_pretrained(toy.MODEL, dtype=torch.float32).eval() for _ in range(2))
    model.llm.pack(int8=True)
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
        return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    ask = ["sample.py", "--image", "assets/scene.png", "--q", "How many donuts are there?"]
    run = out(*ask, "--quant", "int8")
    assert run.returncode == 0 and run.stdout == "3\n", run.stderr
    run = out(*ask, "--quant", "int8", "--pack")
    assert run.returncode == 2 and run.stderr.startswith("error: --quant and --pack")
    run = out("eval.py", "--task", "toy", "--n", "14", "--quant", "int8", "--json")
    assert run.returncode == 0 and json.loads(run.stdout)["n"] == 14, run.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_memory_is_kept():
    """The pages of a tensor that is gone serve the next one: few are asked for anew, of 15,000 (60 MB)."""
    program = """if True:
        import resource, torch, linear
        def pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(4):
                torch.empty(60 * 2 ** 20, dtype=torch.uint8).fill_(1)
            return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4
        pages()
        given_back = pages()
        memory.keep_memory(torch.device("cpu"))
        print(given_back, min(pages() for _ in range(6)))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    given_back, kept = map(float, done.stdout.split())
    assert kept < 2000 and (kept < given_back / 4 or given_back < 2000)      # some machines give back in pages of 2 MB


@pytest.mark.skipif(sys.platform != "linux" or tuple(map(int, platform.release().split(".")[:2])) < (5, 14),
                    reason="Linux can do this since 5.14")
def test_mapped_weights_are_fetched(tmp_path):
    """All of a file's pages are in this process's memory, before anybody has read one."""
    (tmp_path / "weights").write_bytes(bytes(2 ** 25))
    module = nn.Linear(1, 1)
    module.weight = nn.Parameter(torch.from_file(str(tmp_path / "weights"), size=2 ** 23).view(2 ** 13, 2 ** 10))

    def resident():
        lines = iter(open("/proc/self/smaps").read().splitlines())
        next(line for line in lines if line.endswith(str(tmp_path / "weights")))
        return int(next(line for line in lines if line.startswith("Rss:")).split()[1]) * 1024
    before = resident()
    memory.fetch(module)
    assert before < 2 ** 20 and resident() == 2 ** 25
