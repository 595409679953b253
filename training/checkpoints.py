"""TODO training/checkpoints.py"""
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from core.common import UserError, read_json
from core.distributed import wait, where
from training.sharding import rows

# --------------------------------------------------------------------------------------------------
# Checkpoints


class Checkpoints:
    """The numbered checkpoints of one training run, in folder/step-00000123; the last `keep` of
    them stay."""

    def __init__(self, folder: Path, keep=2):
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, oldest first. What a kill left half-written isn't
        one."""
        found = [p.name for p in self.folder.glob("step-*") if (p / "state.json").is_file()]
        return sorted(int(name[5:]) for name in found if name[5:].isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def check_room(self, trained):
        """UserError, before work starts, if the disk can't hold another checkpoint."""
        need = 3 * 4 * sum(p.numel() for p in trained.values())
        free = shutil.disk_usage(self.folder.parent).free
        if free < need * 1.05:
            raise UserError(
                f"{self.folder}: a checkpoint takes {need / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are "
                "free; make room or choose another --out")

    def save(self, step: int, trained: dict, optimizer, settings: dict):
        """Model and optimiser after `step` steps. All processes call it; each writes its own rows.
        """
        target, rank, size = self.path(step), *where()
        tmp = target.with_name(target.name + ".tmp")
        if rank == 0:
            whole = {self.path(old) for old in self.steps()}
            # of a kill; as large as a checkpoint
            for leftover in set(self.folder.glob("step-*")) - whole:
                shutil.rmtree(leftover, ignore_errors=True)
            tmp.mkdir(parents=True)
        wait()
        tensors, spans = {}, {}
        for name, p in trained.items():
            state = optimizer.state.get(p, {})
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                tensor = p if kind == "weight" else state.get(kind)
                if tensor is None:                  # no update yet
                    continue
                local, first, mine = rows(tensor)
                if mine and (local.numel() or first == 0):
                    tensors[f"{kind}.{name}"], spans[f"{kind}.{name}"] = local.cpu().contiguous(
                    ), first
        tensors[f"rng.{rank}"] = torch.get_rng_state()
        save_file(tensors, tmp / f"rank-{rank:04d}.safetensors",
                  metadata={"first_rows": json.dumps(spans)})
        wait()
        if rank == 0:
            updates = {int(state["step"]) for state in optimizer.state.values()}
            state = dict(step=step, updates=max(updates,
                                                default=0), processes=size, settings=settings,
                         shapes={name: list(p.shape) for name, p in trained.items()})
            (tmp / "state.json").write_text(json.dumps(state, indent=1) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(tmp, target)
            for old in self.steps()[:-self.keep]:
                shutil.rmtree(self.path(old))
        wait()

    def load(self, trained: dict, optimizer, settings: dict) -> int:
        """Put the last checkpoint into parameters and optimiser; the step to go on from (0: there
        is none).

        UserError if it is of another model, of a run with other settings, or damaged.
        """
        steps = self.steps()
        if not steps:
            return 0
        folder = self.path(steps[-1])
        try:
            return self._load(folder, trained, optimizer, settings)
        except (SafetensorError, OSError, KeyError) as e:
            raise UserError(
                f"{folder}: is damaged ({e}); remove it, and the checkpoint before it is taken"
            ) from None

    @staticmethod
    def _load(folder: Path, trained: dict, optimizer, settings: dict) -> int:
        state = read_json(folder / "state.json")
        if state["shapes"] != {name: list(p.shape) for name, p in trained.items()}:
            raise UserError(f"{folder} belongs to another model; remove it or choose another --out")
        for key in [*settings, *state["settings"]]:        # those that only one of the two has, too
            before, now = state["settings"].get(key), settings.get(key)
            if before != now:
                raise UserError(
                    f"{folder} is of a run with {key} {before}, not {now}; remove it or choose another "
                    "--out")
        files = [
            safe_open(folder / f"rank-{i:04d}.safetensors", "pt")
            for i in range(state["processes"])]
        pieces = {}            # tensor -> [(first row, file)]
        for file in files:
            for name, first in json.loads(file.metadata()["first_rows"]).items():
                pieces.setdefault(name, []).append((first, file))
        with torch.no_grad():
            for name, p in trained.items():
                fill(p, pieces[f"weight.{name}"], f"weight.{name}")
                if f"exp_avg.{name}" in pieces:
                    moments = {kind: torch.zeros_like(p) for kind in ("exp_avg", "exp_avg_sq")}
                    for kind, tensor in moments.items():
                        fill(tensor, pieces[f"{kind}.{name}"], f"{kind}.{name}")
                    fused = optimizer.defaults.get("fused")       # which counts steps on the device
                    count = torch.tensor(float(state["updates"]),
                                         device=p.device if fused else "cpu")
                    optimizer.state[p] = dict(step=count, **moments)
        rank, size = where()
        if size == state["processes"]:
            torch.set_rng_state(files[rank].get_tensor(f"rng.{rank}"))
        return state["step"]


def fill(tensor, pieces, name):
    """Copy the rows that this process holds of a tensor out of the files that hold them."""
    local, first, _ = rows(tensor)
    if local.ndim == 0:
        return local.copy_(pieces[0][1].get_tensor(name))
    found = 0
    for start, file in pieces:
        view = file.get_slice(name)
        stop = start + view.get_shape()[0]
        low, high = max(first, start), min(first + len(local), stop)
        if low < high:
            local[low - first:high - first] = view[low - start:high - start]
            found += high - low
    if found != len(local):
        raise UserError(f"the checkpoint lacks rows of {name}: it is damaged; remove it")
