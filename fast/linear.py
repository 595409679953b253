"""Linear layers at inference on a CPU, where PyTorch's own kernels leave much of the machine unused.

A model spends its time in y = x W^T. With one row of x (a new token) W is read once from memory and hardly used; with
many rows (a prompt, a picture) every number of W is used again and again. In half precision torch 2.13 does neither
well:

    many rows   where the CPU can't multiply a dtype in hardware (`SLOW`: float16 on most, bfloat16 on many), a product
                is several times slower than a float32 one. `blocks` turns some rows of W at a time into float32, in
                one buffer that stays in the cache, and multiplies there: as exact or exacter
    one row     turning the numbers into float32, not reading them, is what takes the time: a core reads half of what
                it could. `sums` uses a kernel that FBGEMM compiles for this very CPU. `Columns` lays W out anew for
                it; keys and values of old positions lie as it wants them from the start
    int8        `Int8` keeps a byte a number: half the memory, and half as much to read for every token

`Linear` is what models are built of: nn.Linear in every respect, but for many rows at inference. The other two replace
layers of a loaded model in place (`Llama.pack`), for good: such a model can't be trained or saved.
"""
import ctypes
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.weights import UserError, autocast_dtype

HALF = (torch.bfloat16, torch.float16)
FAST = {torch.bfloat16: autocast_dtype(torch.device("cpu")) == torch.bfloat16,
        torch.float16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()}
SLOW = {dtype for dtype in HALF if not FAST[dtype]}       # what this CPU multiplies by way of float32 only
BLOCK = 2 ** 21         # numbers of W turned into float32 at a time: 8 MB
# Outputs that one pass of FBGEMM's kernel keeps in registers: half of AVX512's. The wider, the more of a table is
# fetched ahead: with 64, 62 of 80 GB/s were read, with 256, 74; with 512, which takes two passes, 61.
WIDTH = 256 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64
NARROW = 64             # at least so many: a vocabulary of 32,064 can't be cut into more
AT_ONCE = 8192          # outputs in one call: few, so that which line comes when stays in the cache
FEW, FEW_INT8 = 3, 16   # rows up to which PyTorch's kernels, which take the rows one by one, beat `blocks`

_scratch = torch.empty(0)


def scratch(*shape: int, dtype=torch.float32) -> Tensor:
    """Memory to compute in, always the same: fresh memory costs more than the conversion into it."""
    global _scratch
    n = torch.Size(shape).numel()
    if len(_scratch) < n:
        with torch.inference_mode(False):
            _scratch = torch.empty(n)
    return _scratch[:n].view(dtype)[:n].view(shape)


def blocks(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x (..., D) times weight (O, D), half precision or int8, by way of float32 -> (..., O), like x.

    scale (O): what each row of the weight is to be multiplied with. Where x's own dtype is multiplied in hardware, an
    int8 weight goes by way of that: its numbers fit into it exactly.
    """
    through = torch.float32 if x.dtype in SLOW else x.dtype
    rows = x.reshape(-1, x.shape[-1]).to(through)                                    # (R, D)
    y = x.new_empty(len(rows), len(weight))                                          # (R, O)
    step = max(1, BLOCK // weight.shape[1])
    for at in range(0, len(weight), step):
        part = weight[at:at + step]
        product = rows @ scratch(*part.shape, dtype=through).copy_(part).t()         # (R, step)
        y[:, at:at + step] = product if scale is None else product.float() * scale[at:at + step].float()
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """nn.Linear; at inference on a CPU that is slow at its weight's half precision, that goes by `blocks`."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype in SLOW and x.numel() > FEW * x.shape[-1] and x.device.type == "cpu":
            if x.dtype == weight.dtype and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
                y = blocks(x, weight)
                return y if self.bias is None else y + self.bias
        return F.linear(x, weight, self.bias)


# ---------------------------------------------------------------------------------------------------------------------
# One row of x

SUMS = "fbgemm" in torch.backends.quantized.supported_engines      # x86: whether `sums` is worth anything here


@lru_cache(16)
def _bags(n: int, room: int, g: int, m: int, halves: bool) -> tuple[Tensor, Tensor]:
    """For n tables of `room` lines: the lines that go into n * g bags, the first m of each table into g of them."""
    lines = torch.arange(n * room, dtype=torch.int32).view(n, 1, room)[..., :m].expand(n, g, m)
    if halves:
        lines = lines.unflatten(-1, (2, m // 2)).mT
    return lines.reshape(-1), torch.arange(0, n * g * m, m, dtype=torch.int32)


def sums(tables: Tensor, weights: Tensor, halves: bool = False) -> Tensor:
    """The sum of a table's first m lines, each weighted, g times for each of n tables of the same half precision.

    tables (n, room, W) contiguous, weights (n, g, m) -> (n, g, W). That's what an embedding bag does with lines of a
    table. Its kernel sums in float32, in registers, over memory that is read in order. halves: weights are those of
    lines 0, m/2, 1, m/2 + 1, ...; a core reads two places in turn faster (77 of 80 GB/s) than one (72) or three (62).
    """
    n, room, W = tables.shape
    lines, bags = _bags(n, room, *weights.shape[1:], halves)
    return torch.embedding_bag(tables.view(-1, W), lines, bags, mode=0,
                               per_sample_weights=weights.reshape(-1))[0].view(n, -1, W)


# ---------------------------------------------------------------------------------------------------------------------
# Layers that replace others. Each takes several weights of the same width, to be one layer: q, k and v, or gate and up.

class Columns(nn.Module):
    """A half-precision weight (O, D) as a table (O/w, D, w): w (256, say) numbers of a column lie together.

    W x is the sum of W's columns, each weighted with a number of x: `sums`, w outputs at a time. Even columns lie in a
    strip's first half and odd ones in its second, so that the halves' lines in turn are the columns in order.
    """

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        D, self.width = weights[0].shape[1], sum(map(len, weights))
        w = math.gcd(WIDTH, *map(len, weights))
        self.register_buffer("table", weights[0].new_empty(self.width // w, D, w))
        self.parts = self.table.split(AT_ONCE // w)                                  # of what one call takes
        advise(self.table, HUGE)
        # Read down a column of W, every line would fall into the same few slots of the cache; hence the 40 more.
        strip, at = weights[0].new_empty(w, D + 40)[:, :D], 0                        # (w, D)
        for weight in weights:
            for part in weight.detach().split(w):
                strip.copy_(part)
                for half, lines in enumerate(self.table[at].split(D // 2)):          # (D/2, w)
                    lines.copy_(strip[:, half::2].t())
                at += 1

    @staticmethod
    def fit(weights: list[Tensor]) -> bool:
        """Whether these weights can be laid out so, and this machine gains from it. If not, they stay as they are."""
        return SUMS and all(weight.dtype in HALF and len(weight) % NARROW == 0 and weight.shape[1] % 2 == 0
                            for weight in weights)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)"""
        n, D, w = self.table.shape
        if x.numel() == D:
            rows = x.reshape(1, 1, D).expand(len(self.parts[0]), 1, D).contiguous()  # x, for each of a part's strips
            parts = [sums(part, rows[:len(part)], halves=True) for part in self.parts]       # (up to 32, 1, w) each
            y = parts[0] if len(parts) == 1 else torch.cat(parts)                    # (n, 1, w), which are the O
            return y.view(*x.shape[:-1], self.width)
        rows = x.reshape(-1, D // 2, 2).mT.reshape(-1, D)                            # (R, D), as the table's lines lie
        y = x.new_empty(len(rows), self.width)                                       # (R, O)
        if x.dtype not in SLOW:
            for at, part in enumerate(self.table):                                   # (D, w)
                y[:, at * w:(at + 1) * w] = rows @ part
            return y.view(*x.shape[:-1], self.width)
        rows, step = rows.float(), max(1, BLOCK // (D * w))
        for at in range(0, n, step):
            part = self.table[at:at + step].transpose(0, 1)                          # (D, step, w)
            y[:, at * w:(at + step) * w] = rows @ scratch(*part.shape).copy_(part).flatten(1)
        return y.view(*x.shape[:-1], self.width)


class Int8(nn.Module):
    """A weight (O, D) as int8 times one scale per output: w = q * scale, |q| <= 127, at most half a scale off.

    The scale is kept, and divided by, in bfloat16, which the kernel wants, so its rounding costs no exactness. For up
    to FEW_INT8 rows that kernel reads the bytes and rounds x to bfloat16; more rows go by `blocks`.
    """

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        D, width = weights[0].shape[1], sum(map(len, weights))
        self.register_buffer("weight", torch.empty(width, D, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(width, dtype=torch.bfloat16))
        advise(self.weight, HUGE)
        step, at = max(1, BLOCK // D), 0
        for weight in weights:
            for part in weight.detach().split(step):
                end = at + len(part)
                w = scratch(*part.shape).copy_(part)                                 # (step, D) float32
                peak = torch.maximum(w.amax(1), -w.amin(1))                          # (step); aminmax takes 10 times
                self.scale[at:end] = peak.clamp(min=1e-30) / 127
                w.div_(self.scale[at:end, None].float()).round_().clamp_(-127, 127)
                self.weight[at:end] = w
                at = end

    @staticmethod
    def fit(weights: list[Tensor]) -> bool:
        if odd := [w.shape[1] for w in weights if w.shape[1] % 16]:                  # torch's kernel reads beyond them
            raise UserError(f"int8 is for matrices of a multiple of 16 numbers in a row, not {odd[0]}")
        return True

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)"""
        if x.numel() > FEW_INT8 * x.shape[-1]:
            return blocks(x, self.weight, self.scale)
        rows = x.reshape(-1, x.shape[-1]).bfloat16()                                 # (R, D)
        return torch._weight_int8pack_mm(rows, self.weight, self.scale).to(x.dtype).view(*x.shape[:-1], -1)


def replace(module: nn.Module, names: tuple[str, ...], name: str, kind: type, shared=False, short=False) -> None:
    """Put one layer of a kind, Columns or Int8, called `name`, in the place of a module's Linears `names`.

    shared: somebody else has their weights, too, so they stay in memory. short: see `forget`.
    """
    weights = [getattr(module, old).weight for old in names]
    if any(weight.device.type != "cpu" for weight in weights):
        raise UserError("packing and int8 are for models on a CPU (use --device cpu, or leave it out)")
    if not kind.fit(weights):
        return
    new = kind(weights)
    for old in names:
        delattr(module, old)
    setattr(module, name, new)
    for weight in [] if shared else weights:
        forget(weight, short)


def keep_memory(device: torch.device) -> None:
    """Let this process keep, for its next tensors on a CPU, the memory of those that are gone.

    Else glibc gives large pieces back to Linux and asks for them anew, which then zeroes them page by page: a tenth of
    the time that a prompt takes. Where there is no glibc, or another device: nothing.
    """
    if device.type == "cpu" and sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2 ** 30)        # M_MMAP_THRESHOLD: pieces up to 1 GB come from the heap
        libc.mallopt(-1, 2 ** 31 - 1)    # M_TRIM_THRESHOLD: whose free end stays


# Linux's MADV_HUGEPAGE, MADV_DONTNEED, MADV_PAGEOUT (5.4) and MADV_POPULATE_READ (5.14), and their sizes of a page
HUGE, FORGET, DROP, FETCH = (14, 2 ** 21), (4, 2 ** 12), (21, 2 ** 12), (22, 2 ** 12)


def advise(tensor: Tensor, advice: tuple[int, int], mapped: bool = False) -> None:
    """Tell Linux something about all whole pages of a tensor; if mapped, only where they are those of a file.

    HUGE, for memory that is filled next: in pages of 2 MB `Columns` is laid out and read faster. Elsewhere: nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    code, page = advice
    start, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
    if start < end and (not mapped or _is_file(start, end)):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), code)


def fetch(module: nn.Module) -> None:
    """Map all of a module's weights now, where they are in a mapped file. To be stopped for a few pages at a time, as a
    first prompt comes to them, takes several times as long: a second of a 7B model's twelve."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda weight: advise(weight, FETCH), module.parameters()))


def _is_file(start: int, end: int) -> bool:
    for line in open("/proc/self/maps").read().splitlines():
        span, _, _, _, inode, *_ = line.split()
        low, high = (int(address, 16) for address in span.split("-"))
        if low <= start < end <= high:
            return inode != "0"
    return False


def forget(weight: Tensor, short: bool = False) -> None:
    """Take a weight that was read from a mapped file, and won't be again, out of this process's memory.

    Pages of a file stay resident as long as the file is mapped, and it is: the embeddings are in it, too. The content
    isn't lost; whoever looks after all gets it from the file again. Memory that is no file's is left alone.

    short: out of Linux's memory, too, where it would wait for the file's next reader. When there is no room for both
    it must go for what is laid out next anyway; gone before, it leaves 2 MB in one piece more often.
    """
    if short:
        advise(weight, DROP, mapped=True)
    advise(weight, FORGET, mapped=True)


def holds(size: int) -> bool:
    """Whether this machine's memory has so many bytes at all. (Yes, where one can't ask.)"""
    return not hasattr(os, "sysconf") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >= size
