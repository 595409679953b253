"""TODO fast/packed.py"""
import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from core.common import UserError
from fast.linear import BLOCK, HALF, SLOW, blocks, scratch
from fast.memory import HUGE, advise, forget

# Outputs that one pass of FBGEMM's kernel keeps in registers: half of AVX512's. The wider, the more
# of a table is fetched ahead: with 64, 62 of 80 GB/s were read, with 256, 74; with 512, which takes
# two passes, 61.
WIDTH = 256 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64
NARROW = 64     # at least so many: a vocabulary of 32,064 can't be cut into more
AT_ONCE = 8192  # outputs in one call: few, so that which line comes when stays in the cache
FEW_INT8 = 16   # rows up to which PyTorch's kernel, which takes the rows one by one, beats `blocks`


# --------------------------------------------------------------------------------------------------
# One row of x

# x86: whether `sums` is worth anything here
SUMS = "fbgemm" in torch.backends.quantized.supported_engines


@lru_cache(16)
def _bags(n: int, room: int, g: int, m: int, halves: bool) -> tuple[Tensor, Tensor]:
    """For n tables of `room` lines: the lines that go into n * g bags, the first m of each table
    into g of them."""
    lines = torch.arange(n * room, dtype=torch.int32).view(n, 1, room)[..., :m].expand(n, g, m)
    if halves:
        lines = lines.unflatten(-1, (2, m // 2)).mT
    return lines.reshape(-1), torch.arange(0, n * g * m, m, dtype=torch.int32)


def sums(tables: Tensor, weights: Tensor, halves: bool = False) -> Tensor:
    """The sum of a table's first m lines, each weighted, g times for each of n tables of the same
    half precision.

    tables (n, room, W) contiguous, weights (n, g, m) -> (n, g, W). That's what an embedding bag
    does with lines of a table. Its kernel sums in float32, in registers, over memory that is read
    in order. halves: weights are those of lines 0, m/2, 1, m/2 + 1, ...; a core reads two places in
    turn faster (77 of 80 GB/s) than one (72) or three (62).
    """
    n, room, W = tables.shape
    lines, bags = _bags(n, room, *weights.shape[1:], halves)
    return torch.embedding_bag(tables.view(-1, W), lines, bags, mode=0,
                               per_sample_weights=weights.reshape(-1))[0].view(n, -1, W)


# --------------------------------------------------------------------------------------------------
# Layers that replace others. Each takes several weights of the same width, to be one layer: q, k
# and v, or gate and up.


class Columns(nn.Module):
    """A half-precision weight (O, D) as a table (O/w, D, w): w (256, say) numbers of a column lie
    together.

    W x is the sum of W's columns, each weighted with a number of x: `sums`, w outputs at a time.
    Even columns lie in a strip's first half and odd ones in its second, so that the halves' lines
    in turn are the columns in order.
    """

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        D, self.width = weights[0].shape[1], sum(map(len, weights))
        w = math.gcd(WIDTH, *map(len, weights))
        self.register_buffer("table", weights[0].new_empty(self.width // w, D, w))
        self.parts = self.table.split(AT_ONCE // w)  # of what one call takes
        advise(self.table, HUGE)
        # Read down a column of W, every line would fall into the same few slots of the cache; hence
        # the 40 more.
        strip, at = weights[0].new_empty(w, D + 40)[:, :D], 0                        # (w, D)
        for weight in weights:
            for part in weight.detach().split(w):
                strip.copy_(part)
                for half, lines in enumerate(self.table[at].split(D // 2)):          # (D/2, w)
                    lines.copy_(strip[:, half::2].t())
                at += 1

    @staticmethod
    def fit(weights: list[Tensor]) -> bool:
        """Whether these weights can be laid out so, and this machine gains from it. If not, they
        stay as they are."""
        return SUMS and all(
            weight.dtype in HALF and len(weight) % NARROW == 0 and weight.shape[1] % 2 == 0
            for weight in weights)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)"""
        n, D, w = self.table.shape
        if x.numel() == D:
            # x, for each of a part's strips
            rows = x.reshape(1, 1, D).expand(len(self.parts[0]), 1, D).contiguous()
            # (up to 32, 1, w) each
            parts = [sums(part, rows[:len(part)], halves=True) for part in self.parts]
            y = parts[0] if len(parts) == 1 else torch.cat(parts)    # (n, 1, w), which are the O
            return y.view(*x.shape[:-1], self.width)
        rows = x.reshape(-1, D // 2, 2).mT.reshape(-1, D)  # (R, D), as the table's lines lie
        y = x.new_empty(len(rows), self.width)                       # (R, O)
        if x.dtype not in SLOW:
            for at, part in enumerate(self.table):                   # (D, w)
                y[:, at * w:(at + 1) * w] = rows @ part
            return y.view(*x.shape[:-1], self.width)
        rows, step = rows.float(), max(1, BLOCK // (D * w))
        for at in range(0, n, step):
            part = self.table[at:at + step].transpose(0, 1)          # (D, step, w)
            y[:, at * w:(at + step) * w] = rows @ scratch(*part.shape).copy_(part).flatten(1)
        return y.view(*x.shape[:-1], self.width)


class Int8(nn.Module):
    """A weight (O, D) as int8 times one scale per output: w = q * scale, |q| <= 127, at most half a
    scale off.

    The scale is kept, and divided by, in bfloat16, which the kernel wants, so its rounding costs no
    exactness. For up to FEW_INT8 rows that kernel reads the bytes and rounds x to bfloat16; more
    rows go by `blocks`.
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
                w = scratch(*part.shape).copy_(part)                 # (step, D) float32
                peak = torch.maximum(w.amax(1), -w.amin(1))  # (step); aminmax takes 10 times
                self.scale[at:end] = peak.clamp(min=1e-30) / 127
                w.div_(self.scale[at:end, None].float()).round_().clamp_(-127, 127)
                self.weight[at:end] = w
                at = end

    @staticmethod
    def fit(weights: list[Tensor]) -> bool:
        # torch's kernel reads beyond them
        if odd := [w.shape[1] for w in weights if w.shape[1] % 16]:
            raise UserError(
                f"int8 is for matrices of a multiple of 16 numbers in a row, not {odd[0]}")
        return True

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)"""
        if x.numel() > FEW_INT8 * x.shape[-1]:
            return blocks(x, self.weight, self.scale)
        rows = x.reshape(-1, x.shape[-1]).bfloat16()                 # (R, D)
        return torch._weight_int8pack_mm(rows, self.weight,
                                         self.scale).to(x.dtype).view(*x.shape[:-1], -1)


def replace(module: nn.Module, names: tuple[str, ...], name: str, kind: type, shared=False,
            short=False) -> None:
    """Put one layer of a kind, Columns or Int8, called `name`, in the place of a module's Linears
    `names`.

    shared: somebody else has their weights, too, so they stay in memory. short: see `forget`.
    """
    weights = [getattr(module, old).weight for old in names]
    if any(weight.device.type != "cpu" for weight in weights):
        raise UserError(
            "packing and int8 are for models on a CPU (use --device cpu, or leave it out)")
    if not kind.fit(weights):
        return
    new = kind(weights)
    for old in names:
        delattr(module, old)
    setattr(module, name, new)
    for weight in [] if shared else weights:
        forget(weight, short)
