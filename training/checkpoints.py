"""Where a training goes on from.

A checkpoint is a folder of safetensors files, one for each process, and a state.json; no pickle.
Each process writes the rows that it holds of every tensor (sharding.rows), so any number of
processes can read what another number wrote. The folder is written beside and renamed: a kill at
any moment leaves the old checkpoint or the new one.
"""
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.common import UserError, read_json, write_json
from core.distributed import wait, where
from core.weights import write_tensors
from training.sharding import rows

MOMENTS = ("exp_avg", "exp_avg_sq")                 # AdamW's, of every parameter that was updated


class Checkpoints:
    """The numbered checkpoints of one training run, in folder/step-00000123; the last `keep` of
    them stay."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, oldest first. What a kill left half-written isn't
        one."""
        found = [p.name for p in self.folder.glob("step-*") if (p / "state.json").is_file()]
        return sorted(int(name[5:]) for name in found if name[5:].isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def check_room(self, trained: dict[str, Tensor]) -> None:
        """UserError, before work starts, if the disk can't hold another checkpoint."""
        need = 3 * 4 * sum(p.numel() for p in trained.values())
        free = shutil.disk_usage(self.folder.parent).free
        if free < need * 1.05:
            raise UserError(
                f"{self.folder}: a checkpoint takes {need / 1e9:.1f} GB, but only "
                f"{free / 1e9:.1f} GB are free; make room or choose another --out")

    def save(self, step: int, trained: dict[str, Tensor], optimizer, settings: dict) -> None:
        """Model and optimiser after `step` steps. All processes call it; each writes its own rows.

        trained: parameters by name; settings: what decides the course of the run.
        """
        target = self.path(step)
        tmp = target.with_name(target.name + ".tmp")
        rank, size = where()
        if rank == 0:
            complete = {self.path(old) for old in self.steps()}
            for leftover in set(self.folder.glob("step-*")) - complete:         # of a kill
                shutil.rmtree(leftover, ignore_errors=True)
            tmp.mkdir(parents=True)
        wait()
        tensors, first_rows = my_rows(trained, optimizer)
        tensors[f"rng.{rank}"] = torch.get_rng_state()
        write_tensors(tmp / f"rank-{rank:04d}.safetensors", tensors,
                      {"first_rows": json.dumps(first_rows)})
        wait()
        if rank == 0:
            updates = max((int(state["step"]) for state in optimizer.state.values()), default=0)
            shapes = {name: list(p.shape) for name, p in trained.items()}
            write_json(tmp / "state.json", dict(step=step, updates=updates, processes=size,
                                                settings=settings, shapes=shapes))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(tmp, target)
            for old in self.steps()[:-self.keep]:
                shutil.rmtree(self.path(old))
        wait()

    def load(self, trained: dict[str, Tensor], optimizer, settings: dict) -> int:
        """Put the last checkpoint into parameters and optimiser. Returns the step to go on from (0:
        there is none).

        UserError if it is of another model, of a run with other settings, or damaged.
        """
        steps = self.steps()
        if not steps:
            return 0
        folder = self.path(steps[-1])
        try:
            state = read_json(folder / "state.json")
            compare(state, folder, trained, settings)
            restore(state, folder, trained, optimizer)
        except (SafetensorError, OSError, KeyError) as e:
            raise UserError(f"{folder}: is damaged ({e}); remove it, and the checkpoint before it "
                            "is taken") from None
        return state["step"]


def my_rows(trained: dict[str, Tensor], optimizer) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What this process writes: its rows of every weight and of both moments, on the CPU, and the
    number of the first row of each."""
    tensors, first_rows = {}, {}
    for name, p in trained.items():
        state = optimizer.state.get(p, {})
        for kind, tensor in {"weight": p, **{k: state.get(k) for k in MOMENTS}}.items():
            if tensor is None:                  # no update yet
                continue
            local, first, mine = rows(tensor)
            if mine and (local.numel() or first == 0):
                tensors[f"{kind}.{name}"] = local.cpu().contiguous()
                first_rows[f"{kind}.{name}"] = first
    return tensors, first_rows


def compare(state: dict, folder: Path, trained: dict[str, Tensor], settings: dict) -> None:
    """UserError if a checkpoint is of another model, or of a run with other settings."""
    if state["shapes"] != {name: list(p.shape) for name, p in trained.items()}:
        raise UserError(f"{folder} belongs to another model; remove it or choose another --out")
    for key in [*settings, *state["settings"]]:        # those that only one of the two has, too
        before, now = state["settings"].get(key), settings.get(key)
        if before != now:
            raise UserError(f"{folder} is of a run with {key} {before}, not {now}; remove it or "
                            "choose another --out")


@torch.no_grad()
def restore(state: dict, folder: Path, trained: dict[str, Tensor], optimizer) -> None:
    """Copy weights, moments and, with the same number of processes, the state of the random numbers
    out of a checkpoint."""
    files = [safe_open(folder / f"rank-{i:04d}.safetensors", "pt")
             for i in range(state["processes"])]
    pieces: dict[str, list] = {}            # tensor -> [(first row, file)]
    for file in files:
        for name, first in json.loads(file.metadata()["first_rows"]).items():
            pieces.setdefault(name, []).append((first, file))
    for name, p in trained.items():
        fill(p, pieces[f"weight.{name}"], f"weight.{name}")
        if f"exp_avg.{name}" not in pieces:
            continue
        moments = {kind: torch.zeros_like(p) for kind in MOMENTS}
        for kind, tensor in moments.items():
            fill(tensor, pieces[f"{kind}.{name}"], f"{kind}.{name}")
        fused = optimizer.defaults.get("fused")                   # which counts steps on the device
        count = torch.tensor(float(state["updates"]), device=p.device if fused else "cpu")
        optimizer.state[p] = dict(step=count, **moments)
    rank, size = where()
    if size == state["processes"]:
        torch.set_rng_state(files[rank].get_tensor(f"rng.{rank}"))


def fill(tensor: Tensor, pieces: list, name: str) -> None:
    """Copy the rows that this process holds of a tensor out of the files that hold them."""
    local, first, _ = rows(tensor)
    if local.ndim == 0:
        local.copy_(pieces[0][1].get_tensor(name))
        return
    found = 0
    for start, file in pieces:
        view = file.get_slice(name)
        stop = start + view.get_shape()[0]
        low = max(first, start)
        high = min(first + len(local), stop)
        if low < high:
            local[low - first:high - first] = view[low - start:high - start]
            found += high - low
    if found != len(local):
        raise UserError(f"the checkpoint lacks rows of {name}: it is damaged; remove it")
