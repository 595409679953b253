"""What Linux is told about memory: what to keep, to fetch early, to forget.

Elsewhere than on Linux all of it does nothing.
"""
import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn


def keep_memory(device: torch.device) -> None:
    """Let this process keep, for its next tensors on a CPU, the memory of those that are gone.

    Else glibc gives large pieces back to Linux and asks for them anew, which then zeroes them page
    by page: a tenth of the time that a prompt takes. Where there is no glibc, or another device:
    nothing.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2 ** 30)        # M_MMAP_THRESHOLD: pieces up to 1 GB come from the heap
        libc.mallopt(-1, 2 ** 31 - 1)    # M_TRIM_THRESHOLD: whose free end stays


# madvise's MADV_HUGEPAGE, MADV_DONTNEED, MADV_PAGEOUT (5.4) and MADV_POPULATE_READ (5.14), and
# their sizes of a page
HUGE, FORGET, DROP, FETCH = (14, 2 ** 21), (4, 2 ** 12), (21, 2 ** 12), (22, 2 ** 12)


def advise(tensor: Tensor, advice: tuple[int, int], mapped: bool = False) -> None:
    """Tell Linux something about all whole pages of a tensor; if mapped, only where they are those
    of a file.

    HUGE, for memory that is filled next: in pages of 2 MB packed.py's `Columns` is laid out and
    read faster.
    """
    if not sys.platform.startswith("linux"):
        return
    code, page = advice
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if start < end and (not mapped or _is_file(start, end)):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), code)


def fetch(module: nn.Module) -> None:
    """Map all of a module's weights, where they are in a mapped file; once, a second call does
    nothing. To be stopped for a few pages at a time, as a first prompt comes to them, takes several
    times as long: a second of a 7B model's twelve."""
    if getattr(module, "fetched", False):
        return
    module.fetched = True
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(partial(advise, advice=FETCH), module.parameters()))


def _is_file(start: int, end: int) -> bool:
    """Whether these addresses lie within one mapping of a file."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, _, _, inode, *_ = line.split()
            low, high = (int(address, 16) for address in span.split("-"))
            if low <= start < end <= high:
                return inode != "0"
    return False


def forget(weight: Tensor, short: bool = False) -> None:
    """Take a weight that was read from a mapped file, and won't be again, out of this process's
    memory.

    Pages of a file stay resident as long as the file is mapped, and it is: the embeddings are in
    it, too. The content isn't lost; whoever looks after all gets it from the file again. Memory
    that is no file's is left alone.

    short: out of Linux's memory, too, where it would wait for the file's next reader. When there is
    no room for both it must go for what is laid out next anyway; gone before, it leaves 2 MB in one
    piece more often.
    """
    if short:
        advise(weight, DROP, mapped=True)
    advise(weight, FORGET, mapped=True)


def holds(size: int) -> bool:
    """Whether this machine's memory has so many bytes at all. (Yes, where one can't ask.)"""
    if not hasattr(os, "sysconf"):
        return True
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >= size
