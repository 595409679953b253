"""The same code on a GPU: what it computes there is what it computes on a CPU.

    python -m pytest -n 0 -s -m gpu tests/test_gpu.py

Otherwise the tests hide GPUs (conftest.py), so that they are the same anywhere. What the paper's
sizes take on a GPU, in seconds and GiB, bench/card.py measures.
"""
import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.functional import cosine_similarity

import data
import fast
import llama
import train
from ccra import NAMED, VLM
from clip import CLIPVision, CLIPVisionConfig, attention, preprocess
from core.common import ROOT, split
from core.tokenizer import IGNORE, IMAGE_TOKEN, Tokenizer
from eval import sit
from fast.graph import unrecorded
from tests.fusers.helpers import tiny_vlm
from tests.training.helpers import uneven_samples
from toy import world as toy
from toy.exam import exam, score

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(toy.MODEL)


def load(dtype, device):
    return fast.prepare(VLM.from_pretrained(toy.MODEL, dtype=dtype, device=device).eval())


def apart(x, exact):
    """How far x is from what is exact, as a share of it."""
    return ((x.cpu().double() - exact.cpu().double()).norm() / exact.double().norm().cpu()).item()


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2),
                                         (torch.float16, 2e-3)])
def test_attention_in_all_its_shapes(dtype, most):
    """With and without mask, causal or not, with a row that may look nowhere; gradients, too."""
    for hd, Tq, causal, masked in [(64, 70, True, False), (128, 70, True, True),
                                   (32, 70, False, True), (64, 577, False, False),
                                   (64, 1, False, True), (128, 600, True, False)]:
        x = [torch.randn(2, 4, T, hd, dtype=torch.float64) for T in (Tq, max(Tq, 70), max(Tq, 70))]
        mask = torch.rand(2, 1, 1, x[1].shape[2]) < 0.7 if masked else None
        if masked:
            mask[0, ..., 0] = False                        # position 0 sees only itself, so nothing
        results = []
        for device, kind in ((CPU, torch.float64), (GPU, dtype)):
            q, k, v = (t.detach().to(device, kind).requires_grad_() for t in x)
            y = attention(q, k, v, None if mask is None else mask.to(device), causal)
            y.square().sum().backward()
            results.append((y, q.grad, k.grad, v.grad))
        for ours, exact in zip(results[1], results[0]):
            assert apart(ours.detach(), exact.detach()) < most, (dtype, hd, Tq, causal, masked)


def test_the_tower_is_not_rounded():
    """In float32 all states of the tower agree to float32's precision: cuDNN would take TF32 for
    the patches."""
    pixels = torch.stack([preprocess(toy.draw(item.scene), 96, pad=True) for item in exam(0, 8)])
    with torch.no_grad():
        ours = load(torch.float32, GPU).vision(pixels.to(GPU))
        exact = load(torch.float32, CPU).vision(pixels)
    for l, (a, b) in enumerate(zip(ours, exact)):
        assert apart(a, b) < 1e-5, l
    tower = CLIPVision(CLIPVisionConfig(num_hidden_layers=1))             # ViT-L/336's width
    pixels = torch.randn(4, 3, 336, 336)
    with torch.no_grad():
        exact = tower.double()(pixels.double())
        ours = tower.float().to(GPU)(pixels.to(GPU))
    assert apart(ours[0], exact[0]) < 1e-5 and apart(ours[1], exact[1]) < 1e-5


def test_answers(tokenizer):
    """500 questions, in batches of uneven prompts, decoded with the cache."""
    items = exam(0, 500)
    exact, found = sit(load(torch.float32, CPU), tokenizer, items, 100, CPU), {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        texts = sit(load(dtype, GPU), tokenizer, items, 100, GPU)
        same = sum(a == b for a, b in zip(texts, exact))
        found[dtype] = same, score(items, texts)["accuracy"]
    print(f"\nanswers of 500 that are float32's on a CPU, accuracy: {found}")
    for dtype, least in ((torch.float32, 499), (torch.float16, 495), (torch.bfloat16, 470)):
        assert found[dtype][0] >= least, dtype


def test_a_recording_says_the_same():
    """40 tokens, most of them replayed: the ids that come without a recording, for rows of unequal
    length, too."""
    llm = load(torch.float32, GPU).llm
    embeds = llm.embed(torch.randint(3, 300, (3, 30), device=GPU))
    padded = torch.arange(30, device=GPU) >= torch.tensor([[0], [7], [29]], device=GPU)
    for mask in (None, padded):
        replayed = torch.stack(list(llm.generate(embeds, mask, max_new_tokens=40)))
        with unrecorded(llm):
            ids = torch.stack(list(llm.generate(embeds, mask, max_new_tokens=40)))
        assert len(ids) == 40 and torch.equal(replayed, ids)


def gradients(device, dtype, samples):
    model = VLM.from_pretrained(toy.MODEL, dtype=torch.float32, device=device)
    trained = train.freeze(fast.prepare(model), 2)
    batches = [data.make_batch(rows) for rows in split(samples, 4)]
    loss = train.train_step(model, batches, device, dtype)
    return loss, {name: p.grad.cpu() for name, p in trained.items()}


def test_a_training_step(tokenizer):
    """Rows with and without a picture. float32: the CPU's gradients; autocast to bfloat16: nearly
    its direction."""
    samples = uneven_samples(tokenizer, size=96)
    loss, exact = gradients(CPU, torch.float32, samples)
    same, ours = gradients(GPU, torch.float32, samples)
    narrow, rounded = gradients(GPU, torch.bfloat16, samples)
    assert abs(same / loss - 1) < 1e-5 and abs(narrow / loss - 1) < 2e-2
    worst = max((apart(ours[name], g), name) for name, g in exact.items() if g.norm() > 0)
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, rounded)]
    near = cosine_similarity(*flat, dim=0).item()
    print(f"\ngradients: float32 apart by {worst[0]:.1e} at most ({worst[1]}), bfloat16's cosine "
          f"{near:.4f}")
    assert worst[0] < 1e-3 and near > 0.99


@pytest.mark.parametrize("name", NAMED)
def test_every_fuser(name, monkeypatch):
    """The loss and all gradients in float64, and the maps; a row without a picture among them.
    RoPE's angles, which are float32 and differ in their last digit between devices, are the CPU's
    on both."""
    rope = llama.rope
    monkeypatch.setattr(llama, "rope",
                        lambda config, at: tuple(x.to(at.device) for x in rope(config, at.cpu())))
    model, results = tiny_vlm(name), []
    ids = torch.randint(3, 50, (3, 9))
    ids[0, 1] = ids[1, 4] = IMAGE_TOKEN
    labels = torch.where(ids == IMAGE_TOKEN, IGNORE, ids)
    query, pixels = torch.randint(3, 50, (3, 4)), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for device in (CPU, GPU):
        model.to(device).zero_grad()
        batch = [x.to(device) for x in (pixels, ids, query, query > 10)]
        loss = model(*batch, labels=labels.to(device))
        loss.backward()
        maps = model.look(*(batch[i] for i in (0, 2, 3)))[1]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([x.detach().to(CPU, copy=True) for x in (loss, *maps.values(), *grads)])
    for exact, ours in zip(*results, strict=True):
        assert torch.allclose(ours, exact, rtol=1e-7, atol=1e-9)


def curve(out, *flags, processes=0):
    """log.csv of a training of the bundled model, in a process of its own."""
    launch = []
    if processes:
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [sys.executable, *launch, str(ROOT / "train.py"), "--stage", "2", "--world", "toy",
               "--model", str(toy.MODEL), "--out", str(out), "--batch", "16", "--threads", "4",
               *flags]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    with open(out / "log.csv", newline="") as file:
        return [{key: float(x) if x != "-" else None for key, x in row.items()}
                for row in csv.DictReader(file)]


def apart_in_loss(rows, others):
    """The most that a step's loss is away from the other's; the first is 0.003, the others about
    0.1."""
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, others, strict=True))


def test_one_loss_curve(tmp_path):
    """On a CPU, on a GPU alone, with DDP and sliced (one process, but NCCL, slices and gathering
    are there), in bfloat16, compiled; stopped and resumed."""
    exact, short = ["--dtype", "float32", "--steps", "12"], ["--dtype", "bfloat16", "--steps", "6"]
    ddp, fsdp = ["--parallel", "ddp"], ["--parallel", "fsdp"]
    runs = dict(cpu=([*exact, "--device", "cpu"], 0), gpu=(exact, 0), ddp=(exact + ddp, 1),
                fsdp=(exact + fsdp, 1), recompute=([*exact, "--recompute"], 0),
                parts=([*exact, "--stop-after", "5"], 0), wide=(short, 0),
                compiled=([*short, "--compile", "--recompute"], 0), sliced=(short + fsdp, 1))
    with ThreadPoolExecutor(5) as pool:
        waits = {name: pool.submit(curve, tmp_path / name, *flags, processes=n)
                 for name, (flags, n) in runs.items()}
        found = {name: wait.result() for name, wait in waits.items()}
    resumed = curve(tmp_path / "parts", *exact)
    for name in ("gpu", "ddp", "fsdp", "recompute"):
        off = apart_in_loss(found[name], found["cpu"])
        print(f"\n{name}: losses apart from the CPU's by {off:.1e} at most", end="")
        assert off < 1e-4, name
    same = [a["loss"] == b["loss"] for a, b in zip(found["gpu"], resumed, strict=True)]
    print(f"\nresumed: {sum(same)} of 12 losses to the last digit")
    assert found["gpu"][-1]["peak_gib"] > 0 and len(found["parts"]) == 5
    assert apart_in_loss(found["gpu"], resumed) < 1e-4
    for name in ("compiled", "sliced"):
        assert apart_in_loss(found[name], found["wide"]) < 3e-2, name


def sample(*words):
    scene = str(ROOT / "assets" / "scene.png")
    return subprocess.run([sys.executable, str(ROOT / "sample.py"), "--image", scene, "--device",
                           "cuda", *map(str, words)], capture_output=True, text=True)


def test_the_command_line(tmp_path):
    run = sample("--q", "How many donuts are there?", "--heatmap", tmp_path / "x.png", "--html",
                 tmp_path / "x.html")
    assert run.returncode == 0 and run.stdout == "3\n", run.stderr
    assert (tmp_path / "x.png").exists() and (tmp_path / "x.html").exists()
    run = sample("--q", "Is there an owl?", "--quant", "int8")
    assert run.returncode and "CPU" in run.stderr and "Traceback" not in run.stderr
