"""kill -9 at random moments, some of them inside the writing of a checkpoint: what comes out is
what an undisturbed run gives, bit for bit.

Two kills of one process by default; those marked slow are ten, in both stages, alone and in two
processes (DDP and FSDP), which takes half an hour.
"""
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bench.big import family
from core.common import ROOT
from tests.training.helpers import log_of, same_parameters

RUNS = [(stage, *how) for stage in "12" for how in ((1, "none"), (2, "ddp"), (2, "fsdp"))]


def alive(pid):
    """Whether a process still runs. One that waits to be buried doesn't, and has let go of its
    files."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pids):
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while any(map(alive, pids)):
        time.sleep(0.01)


def killed_inside(run, out, moment, inside, delay):
    """Start, wait until that many steps are logged (inside: for the next half-written checkpoint),
    and for the delay, then kill all processes. Returns whether a checkpoint was being written; None
    if the run ended before."""
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    log, began = out / "log.csv", time.monotonic()
    while process.poll() is None:
        time.sleep(0.005)
        steps = len(log.read_text().splitlines()) - 1 if log.exists() else 0
        if steps >= moment and (any((out / "checkpoints").glob("*.tmp")) or not inside):
            time.sleep(delay)
            # torchrun, then those that it started, each in a session of its own
            kill(family(process.pid))
            process.wait()
            return any((out / "checkpoints").glob("*.tmp"))
        assert time.monotonic() - began < 300
    return None


@pytest.mark.parametrize("kills, stage, size, how", [
    (2, "2", 1, "none"), *(pytest.param(10, *run, marks=pytest.mark.slow) for run in RUNS)])
def test_killed_again_and_again(towers, stage1, tmp_path, kills, stage, size, how):
    steps = 12 + 2 * kills
    start = ["--model", stage1]
    if stage == "1":
        start = ["--vision", towers / "clip", "--llm", towers / "llama"]
    launch = []
    if size > 1:
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={size}", "--standalone"]

    def command(out, program):
        return list(map(str, [
            sys.executable, *launch, *program, "--stage", stage, *start, "--world", "toy",
            "--parallel", how, "--device", "cpu", "--threads", "1", "--steps", steps, "--batch",
            "6", "--micro", "2", "--save-every", "2", "--out", tmp_path / out]))

    whole = subprocess.Popen(command("whole", [ROOT / "train.py"]), stdout=subprocess.DEVNULL)
    run, out = command("parts", ["-m", "tests.training.slowly"]), tmp_path / "parts"
    rng, caught = random.Random(f"{stage}{size}{how}"), []
    for i in range(kills):
        for path in (out / "checkpoints").glob("*.tmp") if i else ():   # so that the next is new
            os.rename(path, out / f"old-{i}")
        moment = 2 + 2 * i + rng.randint(0, 3)
        caught.append(killed_inside(run, out, moment, i % 2 == 0, rng.uniform(0, 0.08)))
    assert None not in caught, "a run came to its end before it was killed"
    assert sum(caught) >= (kills + 1) // 3, "too few of the kills hit the writing of a checkpoint"
    subprocess.run(run, check=True, capture_output=True, cwd=ROOT)
    assert whole.wait() == 0
    assert same_parameters(tmp_path / "whole", out)
    assert log_of(tmp_path / "whole") == log_of(out) and len(log_of(out)) == steps
    print(f"stage {stage}, {size} processes, {how}: {len(caught)} kills, {sum(caught)} of them "
          "inside a checkpoint")
