"""kill -9 at random moments, some of them inside the writing of a checkpoint: what comes out is what an undisturbed run
gives, bit for bit.

Two kills of one process by default; NANOCCRA_KILLS=10 gives ten, in both stages, alone and in two processes (DDP and
FSDP), which takes about a quarter of an hour.
"""
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT

KILLS = int(os.environ.get("NANOCCRA_KILLS", 2))
RUNS = [("2", 1, "none")] if KILLS <= 2 else [(stage, size, how) for stage in "12" for size, how in
                                              ((1, "none"), (2, "ddp"), (2, "fsdp"))]


def command(towers, tmp_path, stage, size, how, out):
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={size}", "--standalone"] if size > 1 else []
    start = ["--vision", towers / "clip", "--llm", towers / "llama"], ["--model", tmp_path / "start"]
    return [sys.executable, *launch, ROOT / "train.py", "--stage", stage, *start[stage == "2"], "--world", "toy", "--parallel", how,
            "--device", "cpu", "--threads", "1", "--steps", "30", "--batch", "6", "--micro", "2", "--save-every", "2",
            "--out", tmp_path / out]


def killed_inside(run, out, moment, inside):
    """Start, wait for a moment (inside: for the next checkpoint's half-written folder), kill all processes. Returns
    whether a checkpoint was being written; None if the run ended before."""
    process = subprocess.Popen(list(map(str, run)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    log, began = out / "log.csv", time.monotonic()
    rows = len(log.read_text().splitlines()) if log.exists() else 0
    while process.poll() is None:
        now = len(log.read_text().splitlines()) if log.exists() else 0
        writing = any((out / "checkpoints").glob("*.tmp")) if (out / "checkpoints").exists() else False
        if (inside and writing and now > 1) or (not inside and now != rows and now > moment):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return any((out / "checkpoints").glob("*.tmp"))
        assert time.monotonic() - began < 120
    return None


@pytest.mark.parametrize("stage, size, how", RUNS)
def test_killed_again_and_again(towers, tmp_path, stage, size, how):
    if stage == "2":
        first = command(towers, tmp_path, "1", 1, "none", "start")
        subprocess.run(list(map(str, first)), check=True, capture_output=True)
    rng, caught = random.Random(f"{stage}{size}{how}"), 0
    whole = command(towers, tmp_path, stage, size, how, "whole")
    subprocess.run(list(map(str, whole)), check=True, capture_output=True)
    run, out = command(towers, tmp_path, stage, size, how, "parts"), tmp_path / "parts"
    for i in range(KILLS):
        for path in (out / "checkpoints").glob("*.tmp") if i else ():       # so that the next one seen is new
            os.rename(path, out / f"old-{i}")
        caught += bool(killed_inside(run, out, 3 + 2 * i + rng.randint(0, 3), inside=i % 2 == 0))
    assert caught >= (KILLS + 1) // 3, "too few of the kills hit the writing of a checkpoint"
    subprocess.run(list(map(str, run)), check=True, capture_output=True)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [[row.split(",")[:4] for row in (tmp_path / name / "log.csv").read_text().splitlines()]
            for name in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0]) == 31
