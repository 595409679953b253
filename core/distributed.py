"""TODO core/distributed.py"""
import os
import time

import torch
import torch.distributed as dist

from core.device import pick_device

# --------------------------------------------------------------------------------------------------
# Who am I?


def join(device="auto", threads=0):
    """(rank, number of processes, device): those that torchrun started, or this process alone.

    threads: CPU threads of this process (0: torch's choice alone, an even share of the cores under
    torchrun).
    """
    rank, size, local = (int(os.environ.get(key, default)) for key, default in
                         (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(device)
    if "WORLD_SIZE" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        else:          # torchrun allows each process one thread; share the cores out instead
            torch.set_num_threads(max(1, os.cpu_count() // local_size()))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if threads:
        torch.set_num_threads(threads)
    return rank, size, device


def local_size() -> int:
    """How many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def leave():
    """Whoever leaves while others still talk takes them down with it, so all leave together."""
    if dist.is_initialized():
        dist.barrier()
        # ... and those on their way out of the barrier, too (gloo aborted one run in about 35)
        time.sleep(0.5)
        dist.destroy_process_group()


def total(*numbers, device="cpu"):
    """Sums over all processes, in float64: one number, or a list of several in one message."""
    if not dist.is_initialized():
        return numbers[0] if len(numbers) == 1 else list(numbers)
    x = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(x)
    return x.item() if len(numbers) == 1 else x.tolist()


def where() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait():
    if dist.is_initialized():
        dist.barrier()
