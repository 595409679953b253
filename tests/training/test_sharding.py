"""Several processes give what one gives: gradients, a loss curve, a run that goes on.

What two processes do here they do in one pair of them, one after the other (pair.py).
"""
import json
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import data
import train
from ccra import VLM
from core.common import ROOT, UserError
from core.tokenizer import Tokenizer
from tests.training.helpers import log_of, mixed_json, parameters, uneven_samples
from training import sharding

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 14             # of 22 records in batches of 7: an epoch ends with a batch of one

# flags of one process, and of two
ALONE = {"one": [], "cut": ["--micro", "2"], "recomputed": ["--recompute"]}
DDP = ["--parallel", "ddp"]
TOGETHER = {"ddp": DDP, "both": [*DDP, "--micro", "2"], "fsdp": ["--micro", "2"],
            "grad": ["--shard", "grad", "--no-recompute"]}


@pytest.fixture(scope="module")
def flags(stage1, tmp_path_factory):
    """Those of all runs here, but --out."""
    mixed = mixed_json(tmp_path_factory.mktemp("mixed"))
    return ["--stage", "2", "--model", str(stage1), "--device", "cpu", *mixed, "--steps",
            str(STEPS), "--batch", "7", "--threads", "1", "--lr", "1e-3", "--workers", "0",
            "--dtype", "float32"]


def torchrun(processes, *words):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
               "--standalone", *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    if "Signal 6 (SIGABRT)" in run.stderr:   # seen once in 35 runs, cause unknown: not in silence
        warnings.warn(f"several processes aborted and are started again; they said: {run.stderr}")
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def runs(stage1, flags, tmp_path_factory):
    """A folder with all runs of ALONE and TOGETHER; with one that goes on, "parts", before its last
    piece; and with two processes' gradients."""
    out = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    for name, more in ALONE.items():
        train.main([*flags, "--out", str(out / name), *more])
    parts = [*flags, "--out", str(out / "parts"), "--stop-after"]
    train.main([*parts, "3"])
    torch.set_num_threads(threads)
    assert len(log_of(out / "parts")) == 3
    samples = uneven_samples(Tokenizer.from_pretrained(stage1))[:7]
    torch.save(samples, out / "samples.pt")
    jobs = [["gradients", *map(str, (stage1, out / "samples.pt", out / "gradients.pt"))],
            *([*flags, "--out", str(out / name), *more] for name, more in TOGETHER.items()),
            [*parts, "6"], [*parts, "9", *DDP]]
    (out / "jobs.json").write_text(json.dumps(jobs))
    torchrun(2, "-m", "tests.training.pair", out / "jobs.json")
    return out


def same_curve(one, other):
    assert len(one) == len(other) == STEPS and one[-1][1] < one[0][1]
    for a, b in zip(one, other):
        assert a[0] == b[0] and a[2] == b[2]
        assert abs(a[1] - b[1]) < 1e-4 * a[1] and abs(a[3] - b[3]) < 1e-3 * a[3] + 1e-4, (a, b)


def same_run(one, other):
    same_curve(log_of(one), log_of(other))
    ours, theirs = parameters(one), parameters(other)
    assert all(torch.allclose(ours[key], theirs[key], atol=2e-4) for key in ours)


@pytest.mark.parametrize("name", [*list(ALONE)[1:], *TOGETHER])
def test_processes_and_accumulation_give_one_loss_curve(runs, name):
    """1 process, DDP and FSDP on 2, with accumulation, too."""
    same_run(runs / "one", runs / name)


@pytest.mark.big
def test_copies_of_slices_give_it_too(runs, flags, tmp_path):
    """Two copies, each in slices over two processes, which answer questions on the way."""
    torchrun(4, ROOT / "train.py", *flags, "--out", tmp_path, "--shard-size", "2", "--ask-every",
             "10")
    same_run(runs / "one", tmp_path)


def test_a_run_goes_on_with_another_number_of_processes(runs, flags):
    """Alone to step 3, sliced over two processes to 6, whole in two to 9, then alone again."""
    parts = runs / "parts"
    assert len(log_of(parts)) == 9 and not (parts / "model.safetensors").exists()
    names = [p.name for p in sorted((parts / "checkpoints").iterdir())]
    assert names == ["step-00000006", "step-00000009"]
    train.main([*flags, "--out", str(parts)])
    same_curve(log_of(runs / "one"), log_of(parts))


def test_two_processes_give_the_gradients_of_one(stage1, runs):
    """DDP with accumulation against one process at once: relative 1e-5, text-only samples among the
    others."""
    model = VLM.from_pretrained(stage1, dtype=torch.float32)
    trained = train.freeze(model, 2)
    samples = torch.load(runs / "samples.pt", weights_only=True)
    train.train_step(model, [data.make_batch(samples)], torch.device("cpu"), torch.float32)
    found = torch.load(runs / "gradients.pt", weights_only=True)
    assert found.keys() == trained.keys()
    for name, grad in found.items():
        norm = trained[name].grad.norm()
        assert (grad - trained[name].grad).norm() <= 1e-5 * norm + 1e-12, name


def test_slices_are_summed_in_float32(stage1, monkeypatch):
    """What FSDP is told: gathered in bfloat16, but gradients summed in float32, and CCRA in float32
    altogether."""
    model, seen = VLM.from_pretrained(stage1), {}
    monkeypatch.setattr(sharding, "fully_shard",
                        lambda module, mp_policy, **how: seen.update({module: mp_policy}))
    sharding.share(model, "fsdp", torch.device("cpu"), torch.bfloat16)
    assert all(policy.reduce_dtype == torch.float32 for policy in seen.values())
    assert seen[model].param_dtype == torch.bfloat16
    assert seen[model.fuser].param_dtype == torch.float32
    assert {*model.llm.layers, *model.vision.layers, model.fuser, model} == seen.keys()


def test_copies_and_slices(monkeypatch):
    """Of 8 processes on two machines: each machine's four share one copy, unless said otherwise."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        for shard_size, shape in ((0, (2, 4)), (2, (4, 2)), (8, (8,))):
            mesh = sharding.layout(torch.device("cpu"), shard_size)
            assert mesh.shape == shape and mesh["shard"].size() == shape[-1]
        with pytest.raises(UserError, match="groups of 3"):
            sharding.layout(torch.device("cpu"), 3)
    finally:
        dist.destroy_process_group()
