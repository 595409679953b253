"""Where a training goes on from.

A checkpoint is a folder of safetensors files, one for each process, and a state.json; no pickle.
Each process writes the rows that it holds of every tensor (sharding.rows), so any number of
processes can read what another number wrote. The folder is written beside and renamed, and renamed
again before it is removed: a kill at any moment leaves the old checkpoint or the new one, and what
it leaves besides is named *.tmp and cleared away at the next start.

state.json holds a sha256 of every file and of itself. A checkpoint that isn't as it was written is
called damaged, and the one before it is taken (training/damage.py).
"""
import json
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from core.common import UserError, make_folder, sync, write_json
from core.distributed import gather, note, together, where
from core.weights import write_tensors
from training import damage
from training.damage import MOMENTS, Damaged, rank_file
from training.sharding import rows

NUMBER = re.compile("[0-9]{8,18}")                  # of a step, in the name of its folder


class Checkpoints:
    """The numbered checkpoints of one training run, in folder/step-00000123; the last `keep` of
    them stay."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, oldest first, damaged ones included. A folder without
        any of a checkpoint's files isn't one. UserError if the disk doesn't say."""
        found = []
        try:
            for path in self.folder.glob("step-*"):
                number = path.name[5:]
                if NUMBER.fullmatch(number) and path == self.path(int(number)):
                    if any(path.glob("rank-*")) or (path / "state.json").exists():
                        found.append(int(number))
        except OSError as e:
            raise UserError(f"{self.folder}: cannot read it ({e.strerror or e})") from e
        return sorted(found)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    # ----------------------------------------------------------------------------------------------
    # Room

    def check_room(self, trained: dict[str, Tensor], left: int, model: int) -> None:
        """UserError, before work starts, if the disk can't hold all that will lie there at once.

        left: how many checkpoints are still to be written; model: bytes of the model that is
        written after the last, while the kept ones are there.
        """
        each, there = size_of(trained), len(self.steps())
        new = max(1, min(left, self.keep + 1 - there)) if left else 0
        kept = max(0, min(left, self.keep - there))
        need = max(new * each, kept * each + model)
        free = free_bytes(self.folder.parent)
        if free < need * 1.05:
            raise UserError(
                f"{self.folder}: {new} more checkpoints of {amount(each)}, and the model of "
                f"{amount(model)} at the end, take {amount(need)} at once, but only "
                f"{amount(free)} are free; make room, give a smaller --keep, or choose "
                "another --out")

    def clear(self) -> None:
        """Remove what a kill left half-written or half-removed."""
        for path in list(self.folder.glob("step-*")):
            if path.name.endswith(".tmp"):
                remove(path)
            else:
                with suppress(OSError):              # it isn't empty, then
                    path.rmdir()

    # ----------------------------------------------------------------------------------------------
    # Writing

    def save(self, step: int, trained: dict[str, Tensor], optimizer, settings: dict) -> None:
        """Model and optimiser after `step` steps. All processes call it; each writes its own rows.

        trained: parameters by name; settings: what decides the course of the run. UserError, in all
        processes, if it can't be written; what was saved before stays.
        """
        tmp = self.path(step).with_name(self.path(step).name + ".tmp")
        try:
            self._write(step, tmp, trained, optimizer, settings)
        except UserError as e:
            if where()[0] == 0:
                shutil.rmtree(tmp, ignore_errors=True)
            failed = UserError(f"{e}; {self._then()}")
            failed.said = e.said
            raise failed from e

    def _then(self) -> str:
        """What to do after a checkpoint couldn't be written."""
        try:
            steps = self.steps()
        except UserError:
            steps = []
        if steps:
            return f"mend that, and the same command goes on from step {steps[-1]}"
        return "mend that, and give the same command again (nothing was saved before)"

    def _write(self, step: int, tmp: Path, trained: dict[str, Tensor], optimizer,
               settings: dict) -> None:
        rank, size = where()
        with together():
            if rank == 0:
                self._prepare(tmp, size_of(trained))
        file = rank_file(rank)
        with together():
            tensors, first_rows = my_rows(trained, optimizer)
            tensors[f"rng.{rank}"] = torch.get_rng_state()
            about = dict(step=step, first_rows=first_rows)     # in one: their order is random
            write_tensors(tmp / file, tensors, {"checkpoint": json.dumps(about)})
            sha256 = damage.sha256_of(tmp / file)
        files = dict(gather((file, sha256)))
        with together():
            if rank == 0:
                updates = max((int(state["step"]) for state in optimizer.state.values()), default=0)
                shapes = {name: list(p.shape) for name, p in trained.items()}
                write_json(tmp / "state.json", damage.signed(dict(
                    step=step, updates=updates, processes=size, settings=settings, shapes=shapes,
                    files=files)))
                self._put(tmp, step)

    def _prepare(self, tmp: Path, need: int) -> None:
        """An empty folder to write to, and room for what is written. The folder of the run is not
        made again: if it has vanished, so may have its disk."""
        try:
            self.folder.mkdir(exist_ok=True)
            self.clear()
            tmp.mkdir()
        except OSError as e:
            raise UserError(f"{tmp}: cannot make this folder ({e.strerror or e})") from e
        free = free_bytes(self.folder)
        if free < need:
            raise UserError(f"{self.folder}: a checkpoint takes {amount(need)}, but only "
                            f"{amount(free)} are free")

    def _put(self, tmp: Path, step: int) -> None:
        """Give a folder that is complete its name, then remove what it replaces: the oldest, and
        later ones, which were damaged when this run began."""
        target = self.path(step)
        try:
            if target.exists():                      # damaged, too
                remove(target)
            os.replace(tmp, target)
            sync(self.folder)
        except OSError as e:
            raise UserError(f"{target}: cannot write it ({e.strerror or e})") from e
        self._prune(step)
        with suppress(UserError):                    # _prune has said why
            for later in self.steps():
                if later > step:
                    remove(self.path(later))

    def _prune(self, step: int) -> None:
        """Remove the oldest before this one. What can't be is said, and tried again next time."""
        try:
            before = [old for old in self.steps() if old < step]
        except UserError as e:
            print(f"warning: {e}; older checkpoints stay there", file=sys.stderr)
            return
        for old in before[:max(0, len(before) + 1 - self.keep)]:
            remove(self.path(old))

    # ----------------------------------------------------------------------------------------------
    # Reading

    def load(self, trained: dict[str, Tensor], optimizer, settings: dict) -> int:
        """Put the last checkpoint that isn't damaged into parameters and optimiser. Returns the
        step to go on from (0: there is none). All processes call it and take the same.

        UserError if it is of another model, of a run with other settings, or if all are damaged.
        """
        with together():
            if where()[0] == 0:
                make_folder(self.folder)
                self.clear()
        with together():
            steps = self.steps()
        found = gather(steps)
        if any(steps != found[0] for steps in found):
            raise UserError(f"{self.folder}: the processes find different checkpoints there; it "
                            "has to be one folder for all machines")
        faults = []
        for step in reversed(found[0]):
            folder = self.path(step)
            try:
                self._take(folder, step, trained, optimizer, settings)
            except Damaged as e:
                faults.append(f"{folder}: is damaged ({e})")
                continue
            for fault in faults:
                note(f"{fault}; going on from step {step}")
            if where()[0] == 0:
                self._prune(step)
            return step
        if faults:
            others = "so are those before it" if len(faults) > 1 else "there is none before it"
            raise UserError(f"{faults[0]}, and {others}; put a copy back, or remove it to begin "
                            "anew")
        return 0

    @staticmethod
    def _take(folder: Path, step: int, trained: dict[str, Tensor], optimizer,
              settings: dict) -> None:
        """One checkpoint, if it is whole and of this run."""
        with together():
            state = damage.check_state(folder, step)
            compare(state, folder, trained, settings)
            damage.check_files(folder, state)
        with together():
            optimizer.state.clear()                  # of one that failed halfway
            restore(state, folder, trained, optimizer)


def size_of(trained: dict[str, Tensor]) -> int:
    """Bytes of a checkpoint: float32 weights and two moments."""
    return 3 * 4 * sum(p.numel() for p in trained.values())


def amount(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder is on. UserError if that can't be told."""
    try:
        return shutil.disk_usage(folder).free
    except OSError as e:
        raise UserError(f"{folder}: cannot tell how much room there is ({e.strerror or e})") from e


def remove(path: Path) -> None:
    """A folder, which is no checkpoint any more from the first moment on. If it can't be removed
    that is said, and the run goes on."""
    doomed = path if path.name.endswith(".tmp") else path.with_name(path.name + ".old.tmp")
    try:
        if doomed != path:
            if doomed.exists():
                shutil.rmtree(doomed)
            os.replace(path, doomed)
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()
    except OSError as e:
        print(f"warning: {path}: cannot remove it ({e.strerror or e})", file=sys.stderr)


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
    """UserError if a checkpoint is of another model, or of a run with other settings or begun upon
    something else (setup.basis)."""
    if state["shapes"] != {name: list(p.shape) for name, p in trained.items()}:
        raise UserError(f"{folder} belongs to another model; remove it or choose another --out")
    was, now = dict(state["settings"]), dict(settings)
    upon, present = was.pop("basis", None), now.pop("basis", {})
    for key in [*now, *was]:                           # those that only one of the two has, too
        if was.get(key) != now.get(key):
            raise UserError(f"{folder} is of a run with {key} {was.get(key)}, not {now.get(key)}; "
                            "remove it or choose another --out")
    if upon is None and present and "files" not in state:
        return note(f"{folder} is of an older version of this code: it doesn't say which model "
                    "and tokenizer it was begun with, so that can't be compared")
    upon = upon if isinstance(upon, dict) else {}
    for what in [*present, *upon]:
        if upon.get(what) != present.get(what):
            raise UserError(
                f"{folder} was begun with another {what} (sha256 {str(upon.get(what))[:12]}, now "
                f"{str(present.get(what))[:12]}); give the one that it was begun with, or choose "
                "another --out")


@torch.no_grad()
def restore(state: dict, folder: Path, trained: dict[str, Tensor], optimizer) -> None:
    """Copy weights, moments and, with the same number of processes, the state of the random numbers
    out of a checkpoint. Damaged if something isn't as `my_rows` wrote it."""
    with Damaged.instead():
        files = [safe_open(folder / rank_file(i), "pt") for i in range(state["processes"])]
        pieces = damage.pieces_of(files, state, trained)
        for name, p in trained.items():
            fill(p, pieces[f"weight.{name}"], f"weight.{name}")
            if f"exp_avg.{name}" not in pieces:
                continue
            moments = {kind: torch.zeros_like(p) for kind in MOMENTS}
            for kind, tensor in moments.items():
                fill(tensor, pieces[f"{kind}.{name}"], f"{kind}.{name}")
            fused = optimizer.defaults.get("fused")               # which counts steps on the device
            count = torch.tensor(float(state["updates"]), device=p.device if fused else "cpu")
            optimizer.state[p] = dict(step=count, **moments)
        rank, size = where()
        if size == state["processes"]:
            damage.set_rng(files[rank].get_tensor(f"rng.{rank}"))


def fill(tensor: Tensor, pieces: list, name: str) -> None:
    """Copy the rows that this process holds of a tensor out of the files that hold them."""
    local, first, _ = rows(tensor)
    if local.ndim == 0:
        local.copy_(pieces[0][1].get_tensor(name))
    else:
        for start, file in pieces:
            view = file.get_slice(name)
            stop = start + view.get_shape()[0]
            low = max(first, start)
            high = min(first + len(local), stop)
            if low < high:
                local[low - first:high - first] = view[low - start:high - start]
    if name.startswith("weight.") and not local.isfinite().all():
        raise Damaged(f"{name} isn't finite")
