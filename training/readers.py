"""Pictures on their way into a training: read ahead by other processes, which may be killed, starve
or fall silent, from files that may have gone bad since somebody looked at them.

One policy for --json and --data. A picture that can't be read any more is noted in the run's
damaged.jsonl, and nothing is learnt from its samples (`Lenient`). Too many of them end the run, and
so does a reader that is gone or doesn't answer (`Readers`): in a line, after a checkpoint.
"""
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

import data
from core.common import UserError, fcntl, write_text
from core.distributed import gather, together, total, where
from core.tokenizer import IGNORE
from training.stop import Stop

PATIENCE = 50            # seconds until a batch has to come; more where it has more pictures
GRACE = 5                # seconds that a batch may still take when somebody wants the end
TICK = 0.5               # seconds between two looks at readers that are waited for


# --------------------------------------------------------------------------------------------------
# Pictures that can't be read any more

def limit(pictures: int) -> int:
    """How many of so many pictures may be damaged: 1%, or 10 where that is more, but never more
    than half. Beyond that it isn't the pictures that are broken, or there is little left to learn
    from."""
    return min(max(10, pictures // 100), pictures // 2)


class Notes:
    """damaged.jsonl: {"start", "path", "message"} a line, of all starts of a run. Those of this
    start alone are counted.

    All processes of a run write to one file: it is what they all know. Made by all of them
    together, before there are readers.
    """

    def __init__(self, file: Path):
        self.file = file
        before = 0
        with together():
            if where()[0] == 0:
                before = self._tidy()
        self.start = gather(before)[0] + 1

    def _tidy(self) -> int:
        """Leave out lines that are no notes (cut by a kill, edited). Returns the last start there.
        """
        if not os.path.lexists(self.file):
            return 0
        if not self.file.is_file():
            raise UserError(f"{self.file}: isn't a file; move it away, damaged pictures are noted "
                            "there")
        try:
            lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as e:
            raise UserError(f"{self.file}: cannot read it ({e.strerror})") from e
        notes = self._parse(lines)
        if len(notes) < len(lines) or not all(lines):
            write_text(self.file, "".join(json.dumps(note) + "\n" for note in notes))
            print(f"note: {self.file}: {len(lines) - len(notes)} lines that were no notes are gone",
                  file=sys.stderr, flush=True)
        return max((note["start"] for note in notes), default=0)

    @staticmethod
    def _parse(lines: Iterable[str]) -> list[dict]:
        notes = []
        for line in lines:
            try:
                note = json.loads(line)
                if type(note["start"]) is int and 0 <= note["start"] < 2 ** 40:
                    notes.append(dict(start=note["start"], path=str(note["path"]),
                                      message=str(note["message"])))
            except (ValueError, TypeError, KeyError, RecursionError):
                pass
        return notes

    def add(self, path: Path, message: str) -> int:
        """Note a picture, and say so on stderr if it is new. Returns how many this start has."""
        try:
            with open(self.file, "a+", encoding="utf-8", errors="replace") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                known = {note["path"] for note in self._parse(file) if note["start"] == self.start}
                if str(path) in known:
                    return len(known)
                file.write(json.dumps(dict(start=self.start, path=str(path), message=message))
                           + "\n")
        except OSError as e:
            raise UserError(f"{self.file}: cannot write it ({e.strerror or e}), and there is to be "
                            f"noted: {message}") from e
        print(f"warning: damaged picture, nothing is learnt from its samples: {message}",
              file=sys.stderr, flush=True)
        return len(known) + 1


class Lenient(torch.utils.data.Dataset):
    """A data.LlavaJson or Prepared whose pictures may have gone bad since somebody looked at them.

    A sample with such a picture goes on with an empty one and without labels: a batch has as many
    rows as it would have had, so all processes still do the same, and nothing is learnt from that
    row. UserError for more of them than `limit`, or if the whole folder of pictures is gone.
    """

    def __init__(self, dataset, notes: Notes):
        self.dataset, self.notes = dataset, notes
        self.pictures = dataset.picture_count()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict:
        sample = self.dataset.sample(i)
        try:
            return data.item(sample, self.dataset.pixels(i))
        except UserError as e:
            message = f"{self.dataset.record_id(i)}: {e}"
        root = self.dataset.image_root
        if root is None or not root.is_dir():
            raise UserError(f"{message} (the whole folder of pictures is gone: {root})")
        count = self.notes.add(self.dataset.path(i), message)
        if count > limit(self.pictures):
            raise UserError(f"{count} of {self.pictures} pictures can't be read (see "
                            f"{self.notes.file}): put {root} right; the last one: {message}")
        sample.labels = [IGNORE] * len(sample.ids)
        return data.item(sample, torch.zeros(3, self.dataset.size, self.dataset.size))


# --------------------------------------------------------------------------------------------------
# The processes that read

class Silence(BaseException):
    """No batch comes, and somebody wants the end. (No Exception, which might be taken for a fault
    of the picture that is just being read.)"""


class Readers:
    """The batches of pieces of a data set, in turn, read ahead by `workers` processes (0: by this
    one).

    Waiting for a batch ends when a reader is gone, when none answers for PATIENCE, or GRACE after
    somebody asked for the end (stop): `take` returns None then, in all processes of the run, and
    `fault` says why, or is None.
    """

    def __init__(self, dataset, pieces: Iterable[list[int]], collate: Callable, workers: int,
                 ahead: int, stop: Stop, micro: int = 1, device: torch.device | str = "cpu"):
        """collate: items -> a batch. ahead: batches for each reader to be ahead by. micro: samples
        in a batch. device: on which processes talk to each other."""
        self.stop, self.workers, self.device = stop, workers, device
        self.patience = max(PATIENCE, micro)
        self.fault = None
        handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        others = set(multiprocessing.active_children())
        main = threading.current_thread() is threading.main_thread()
        self.timer = main and hasattr(signal, "setitimer")
        timeout = self.patience if workers and not self.timer else 0     # else the loader's clock
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=pieces, collate_fn=Shared(collate) if workers else collate,
            num_workers=workers, prefetch_factor=ahead if workers else None,
            worker_init_fn=Stop.in_reader, timeout=timeout,
            generator=torch.Generator())   # else it would draw from the one that a checkpoint holds
        self.batches = iter(loader)
        self.processes = set(multiprocessing.active_children()) - others
        if handler is not None and main:
            # torch's own would raise in the middle of a step or a save, when a reader dies
            signal.signal(signal.SIGCHLD, handler)

    def take(self, n: int) -> list[dict[str, Tensor]] | None:
        """The next n batches. All processes call it."""
        taken, ended = [], False
        try:
            for _ in range(n):
                taken.append(self._next())
        except UserError as e:
            # what a reader has to say comes as its whole traceback, of which the last line counts
            line = str(e.args[0]).strip().splitlines()[-1]
            self.fault = UserError(line.partition("UserError: ")[2] or line)
        except Silence:
            ended = True
        except (RuntimeError, OSError, EOFError, MemoryError) as e:
            self.fault = UserError(self._why(e))
        if not total(float(ended or self.fault is not None), device=self.device):
            return taken
        faults = [fault for fault in gather(self.fault) if fault is not None]
        self.fault = faults[0] if faults else None
        self.kill()
        return None

    def _next(self) -> dict[str, Tensor]:
        """The next batch. Every TICK of the wait for it somebody looks whether it makes sense."""
        if not self.timer:
            return next(self.batches)
        began, asked = time.monotonic(), None

        def look(*_) -> None:
            nonlocal asked
            now = time.monotonic()
            asked = asked or (now if self.stop.asked else None)
            if asked and now > asked + GRACE:
                raise Silence
            if any(not process.is_alive() for process in self.processes):
                raise RuntimeError("a reader is gone")
            if self.workers and now > began + self.patience:
                raise RuntimeError("timed out")

        before = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        try:
            return next(self.batches)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _why(self, error: Exception) -> str:
        """What happened to a reader, and what to do."""
        saved = "; the same command goes on"
        fewer = "give fewer --workers, or --workers 0"
        if not self.processes:
            return f"reading pictures failed ({said(error)})"
        codes = [process.exitcode for process in self.processes if not process.is_alive()]
        if -getattr(signal, "SIGBUS", 7) in codes or "shared memory" in str(error):
            return ("a process that reads pictures found no room in shared memory: "
                    f"{fewer}, or make /dev/shm larger{saved}")
        if -getattr(signal, "SIGKILL", 9) in codes:
            return f"a process that reads pictures was killed (out of memory?): {fewer}{saved}"
        if codes:
            code = codes[0]
            how = f"by signal {-code}" if code < 0 else f"with status {code}"
            return f"a process that reads pictures ended {how}: {fewer}{saved}"
        if "timed out" in str(error):
            return (f"no picture came from the readers for {self.patience} s (a disk or network "
                    f"that doesn't answer, or too many readers): {fewer}{saved}")
        return f"reading pictures failed ({said(error)}): {fewer}{saved}"

    def kill(self) -> None:
        """End the readers whatever state they are in: one that was stopped obeys nothing else, and
        this process would wait for it in the end."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(5)


class Shared:
    """A collate function of readers that puts the batch into shared memory itself, where a lack of
    it can be said. (Left to the queue, it would be a traceback, and a batch that never comes.)"""

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, items: list[dict]) -> dict[str, Tensor]:
        batch = self.collate(items)
        try:
            return {key: tensor.share_memory_() for key, tensor in batch.items()}
        except (RuntimeError, OSError) as e:
            size = sum(tensor.nbytes for tensor in batch.values())
            raise UserError(f"no room in shared memory for a batch of {size / 1e6:.0f} MB "
                            f"({said(e)}): give fewer --workers, or --workers 0, or make /dev/shm "
                            "larger; the same command goes on") from None


def said(error: Exception) -> str:
    """An error's words: the last line, where it holds a traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
