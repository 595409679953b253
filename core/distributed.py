"""The processes of one run: who they are, how they add things up, how they leave together.

torchrun starts them. Everything here also works in one process alone, which then has nobody to wait
for. What they share, a model for instance, is no concern of this file (see training/sharding.py).
"""
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from core.common import UserError
from core.device import pick_device


def join(device: str = "auto", threads: int = 0) -> tuple[int, int, torch.device]:
    """(rank, number of processes, device): those that torchrun started, or this process alone.

    threads: CPU threads of this process (0: torch's choice alone, an even share of the cores under
    torchrun). UserError if there is no such device.
    """
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    found = pick_device(device)
    if "WORLD_SIZE" in os.environ:
        if found.type == "cuda":
            found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(found)
        else:          # torchrun allows each process one thread; share the cores out instead
            torch.set_num_threads(max(1, os.cpu_count() // local_size()))
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    if threads:
        torch.set_num_threads(threads)
    return rank, size, found


def local_size() -> int:
    """How many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def where() -> tuple[int, int]:
    """(rank, number of processes) of the group as it is now."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def say(line: str) -> None:
    """Print a line, in the first process alone."""
    if where()[0] == 0:
        print(line, flush=True)


def note(line: str) -> None:
    """Print `note: ...` on stderr, in the first process alone."""
    if where()[0] == 0:
        print(f"note: {line}", file=sys.stderr, flush=True)


def wait() -> None:
    """Until all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def total(*numbers: float, device: torch.device | str = "cpu") -> float | list[float]:
    """Sums over all processes, in float64: one number, or a list of several in one message."""
    if not dist.is_initialized():
        return numbers[0] if len(numbers) == 1 else list(numbers)
    x = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(x)
    return x.item() if len(numbers) == 1 else x.tolist()


def gather(thing) -> list:
    """What each process has to say, a small plain object, by rank."""
    if not dist.is_initialized():
        return [thing]
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, thing)
    return said


@contextmanager
def together() -> Iterator[None]:
    """`with together():` a piece of work that all processes have done, or none goes on: the first
    one's UserError (or a kind of it) is raised in all of them. An error of a disk is one, too. They
    meet at its end."""
    fault = None
    try:
        yield
    except UserError as e:
        fault = e
    except OSError as e:
        fault = UserError(f"{e.filename or 'a file'}: {e.strerror or e}")
    for first in filter(None, gather(fault)):
        first.said = where()[0] > 0
        raise first


def leave() -> None:
    """End the group. Whoever leaves while others still talk takes them down with it, so all leave
    together."""
    if dist.is_initialized():
        dist.barrier()
        # ... and those on their way out of the barrier, too (gloo aborted one run in about 35)
        time.sleep(0.5)
        dist.destroy_process_group()
