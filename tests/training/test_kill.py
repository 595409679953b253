"""kill -9 at random moments, some of them inside the writing of a checkpoint: what comes out is what an undisturbed run
gives, bit for bit.

Two kills of one process by default; NANOCCRA_KILLS=10 gives ten, in both stages, alone and in two processes (DDP and
FSDP), which takes half an hour.
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
import torch
from safetensors.torch import load_file

from bench.big import family
from core.common import ROOT

KILLS = int(os.environ.get("NANOCCRA_KILLS", 2))
RUNS = [("2", 1, "none")] if KILLS <= 2 else [(stage, size, how) for stage in "12" for size, how in
                                              ((1, "none"), (2, "ddp"), (2, "fsdp"))]


# train.py, but a checkpoint's files lie there in half for a tenth of a second. (A tiny model's are written so fast that
# a kill would hardly ever hit the writing.)
SLOW = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
from training import checkpoints

def slowly(tensors, path, save=checkpoints.save_file, **more):
    save(tensors, path, **more)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    time.sleep(0.1)
    path.write_bytes(content)

checkpoints.save_file = slowly
train.main()
"""


def command(towers, tmp_path, stage, size, how, out, program=ROOT / "train.py"):
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={size}", "--standalone"] if size > 1 else []
    start = ["--vision", towers / "clip", "--llm", towers / "llama"], ["--model", tmp_path / "start"]
    return list(map(str, [
        sys.executable, *launch, program, "--stage", stage, *start[stage == "2"], "--world", "toy", "--parallel", how,
        "--device", "cpu", "--threads", "1", "--steps", "30", "--batch", "6", "--micro", "2", "--save-every", "2",
        "--out", tmp_path / out]))


def alive(pid):
    """Whether a process still runs. One that waits to be buried doesn't, and has let go of its files."""
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
    """Start, wait until that many steps are logged (inside: for the next half-written checkpoint), and for the delay,
    then kill all processes. Returns whether a checkpoint was being written; None if the run ended before."""
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, began = out / "log.csv", time.monotonic()
    while process.poll() is None:
        time.sleep(0.005)
        steps = len(log.read_text().splitlines()) - 1 if log.exists() else 0
        if steps >= moment and (any((out / "checkpoints").glob("*.tmp")) or not inside):
            time.sleep(delay)
            kill(family(process.pid))           # torchrun, then those that it started, each in a session of its own
            process.wait()
            return any((out / "checkpoints").glob("*.tmp"))
        assert time.monotonic() - began < 300
    return None


@pytest.mark.parametrize("stage, size, how", RUNS)
def test_killed_again_and_again(towers, tmp_path, stage, size, how):
    if stage == "2":
        first = command(towers, tmp_path, "1", 1, "none", "start")
        subprocess.run(first, check=True, capture_output=True)
    rng, caught = random.Random(f"{stage}{size}{how}"), []
    whole = command(towers, tmp_path, stage, size, how, "whole")
    subprocess.run(whole, check=True, capture_output=True)
    (tmp_path / "slow.py").write_text(SLOW)
    run, out = command(towers, tmp_path, stage, size, how, "parts", tmp_path / "slow.py"), tmp_path / "parts"
    for i in range(KILLS):
        for path in (out / "checkpoints").glob("*.tmp") if i else ():       # so that the next one seen is new
            os.rename(path, out / f"old-{i}")
        caught.append(killed_inside(run, out, 2 + 2 * i + rng.randint(0, 3), i % 2 == 0, rng.uniform(0, 0.08)))
    assert None not in caught, "a run came to its end before it was killed"
    assert sum(caught) >= (KILLS + 1) // 3, "too few of the kills hit the writing of a checkpoint"
    subprocess.run(run, check=True, capture_output=True)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [[row.split(",")[:4] for row in (tmp_path / name / "log.csv").read_text().splitlines()]
            for name in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0]) == 31          # what comes behind are times, and memory
    print(f"stage {stage}, {size} processes, {how}: {len(caught)} kills, {sum(caught)} of them inside a checkpoint")
