"""A language model's weights laid out anew for decoding on a CPU. For good: what was a parameter
becomes a buffer of another shape, so a packed model can't be trained, moved or saved.

    Columns   half precision, exactly: W as the table that `sums` (cache.py) reads at full speed
    Int8      a byte a number: half the memory, and half as much to read for every token

Both take several weights of the same width, to be one layer: q, k and v, or gate and up.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.common import UserError
from fast import linear
from fast.cache import SUMS, DecodingAttention, sums
from fast.linear import HALF, blocks, scratch
from fast.memory import HUGE, advise, forget, holds
from llama import MLP, Llama, rotate

# Outputs that one pass of FBGEMM's kernel keeps in registers: half of AVX512's. The wider, the more
# of a table is fetched ahead: with 64, 62 of 80 GB/s were read, with 256, 74; with 512, which takes
# two passes, 61.
WIDTH = 256 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64
NARROW = 64     # at least so many: a vocabulary of 32,064 can't be cut into more
AT_ONCE = 8192  # outputs in one call: few, so that which line comes when stays in the cache
FEW_INT8 = 16   # rows up to which PyTorch's kernel, which takes the rows one by one, beats `blocks`



class Columns(nn.Module):
    """A half-precision weight (O, D) as a table (O/w, D, w): w (256, say) numbers of a column lie
    together.

    W x is the sum of W's columns, each weighted with a number of x: `sums`, w outputs at a time.
    Even columns lie in a strip's first half and odd ones in its second, so that the halves' lines
    in turn are the columns in order.
    """

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        D = weights[0].shape[1]
        self.width = sum(map(len, weights))
        w = math.gcd(WIDTH, *map(len, weights))
        self.register_buffer("table", weights[0].new_empty(self.width // w, D, w))
        self.parts = self.table.split(AT_ONCE // w)  # of what one call takes
        advise(self.table, HUGE)
        # Read down a column of W, every line would fall into the same few slots of the cache; hence
        # the 40 more.
        strip = weights[0].new_empty(w, D + 40)[:, :D]               # (w, D)
        at = 0
        for weight in weights:
            for part in weight.detach().split(w):
                strip.copy_(part)
                for half, lines in enumerate(self.table[at].split(D // 2)):     # (D/2, w)
                    lines.copy_(strip[:, half::2].t())
                at += 1

    @staticmethod
    def fit(weights: list[Tensor]) -> bool:
        """Whether these weights can be laid out so, and this machine gains from it. If not, they
        stay as they are."""
        return SUMS and all(w.dtype in HALF and len(w) % NARROW == 0 and w.shape[1] % 2 == 0
                            for w in weights)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)"""
        n, D, w = self.table.shape
        if x.numel() == D:
            y = self._one_row(x)                                     # (O)
        else:
            # as the table's lines lie
            rows = x.reshape(-1, D // 2, 2).mT.reshape(-1, D)        # (R, D)
            y = self._product(rows)                                  # (R, O)
        return y.view(*x.shape[:-1], self.width)

    def _one_row(self, x: Tensor) -> Tensor:
        n, D, w = self.table.shape
        # x, for each of a part's strips
        rows = x.reshape(1, 1, D).expand(len(self.parts[0]), 1, D).contiguous()
        # (up to 32, 1, w) each, (n, 1, w) together, which are the O
        parts = [sums(part, rows[:len(part)], halves=True) for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _product(self, rows: Tensor) -> Tensor:
        n, D, w = self.table.shape
        y = rows.new_empty(len(rows), self.width)                    # (R, O)
        if rows.dtype not in linear.SLOW:
            for at, part in enumerate(self.table):                   # (D, w)
                y[:, at * w:(at + 1) * w] = rows @ part
            return y
        rows = rows.float()
        step = max(1, linear.BLOCK // (D * w))
        for at in range(0, n, step):
            part = self.table[at:at + step].transpose(0, 1)          # (D, step, w)
            y[:, at * w:(at + step) * w] = rows @ scratch(*part.shape).copy_(part).flatten(1)
        return y


class Int8(nn.Module):
    """A weight (O, D) as int8 times one scale per output: w = q * scale, |q| <= 127, at most half a
    scale off.

    The scale is kept, and divided by, in bfloat16, which the kernel wants, so its rounding costs no
    exactness. For up to FEW_INT8 rows that kernel reads the bytes and rounds x to bfloat16; more
    rows go by `blocks`.
    """

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        D = weights[0].shape[1]
        width = sum(map(len, weights))
        self.register_buffer("weight", torch.empty(width, D, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(width, dtype=torch.bfloat16))
        advise(self.weight, HUGE)
        step = max(1, linear.BLOCK // D)
        at = 0
        for weight in weights:
            for part in weight.detach().split(step):
                end = at + len(part)
                w = scratch(*part.shape).copy_(part)                 # (step, D) float32
                # (step); by aminmax it takes ten times as long
                peak = torch.maximum(w.amax(1), -w.amin(1))
                self.scale[at:end] = peak.clamp(min=1e-30) / 127
                w.div_(self.scale[at:end, None].float()).round_().clamp_(-127, 127)
                self.weight[at:end] = w
                at = end

    @staticmethod
    def fit(weights: list[Tensor]) -> bool:
        """True; UserError for rows of which torch's kernel would read more than there is."""
        for weight in weights:
            if weight.shape[1] % 16:
                raise UserError("int8 is for matrices of a multiple of 16 numbers in a row, "
                                f"not {weight.shape[1]}")
        return True

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)"""
        if x.numel() > FEW_INT8 * x.shape[-1]:
            return blocks(x, self.weight, self.scale)
        rows = x.reshape(-1, x.shape[-1]).bfloat16()                 # (R, D)
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale)     # (R, O) bfloat16
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class PackedAttention(DecodingAttention):
    """Llama's attention with one layer, qkv_proj, for q_proj, k_proj and v_proj."""

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q (B, H, T, hd), k and v (B, n_kv, T, hd); q and k turned to their
        positions."""
        B, T, _ = x.shape
        H, n_kv = self.n_heads, self.n_kv
        # (B, H + 2 n_kv, T, hd)
        heads = self.qkv_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(heads.narrow(1, 0, H + n_kv), cos, sin).split((H, n_kv), dim=1)
        return q, k, heads.narrow(1, H + n_kv, n_kv)


class PackedMLP(MLP):
    """Llama's MLP with one layer, gate_up_proj, for gate_proj and up_proj."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)             # (B, T, inner) both
        return self.down_proj(F.silu(gate) * up)


def replace(module: nn.Module, names: tuple[str, ...], name: str, kind: type[Columns | Int8],
            shared: bool = False, short: bool = False) -> bool:
    """Put one layer of a kind, called `name`, in the place of a module's nn.Linears `names`; False
    if they don't fit it, and stay.

    shared: somebody else has their weights, too, so they stay in memory. short: see `forget`.
    UserError if they are on another device than a CPU.
    """
    weights = [getattr(module, old).weight for old in names]
    if any(weight.device.type != "cpu" for weight in weights):
        raise UserError(
            "packing and int8 are for models on a CPU (use --device cpu, or leave it out)")
    if not kind.fit(weights):
        return False
    new = kind(weights)
    for old in names:
        delattr(module, old)
    setattr(module, name, new)
    for weight in [] if shared else weights:
        forget(weight, short)
    return True


def pack_llama(llm: Llama, int8: bool = False) -> None:
    """Replace all matrix products, in place and layer by layer: see `fast.prepare`."""
    if any(isinstance(layer, (Columns, Int8)) for layer in llm.modules()):
        raise UserError("this language model is packed already")
    kind = Int8 if int8 else Columns
    # the file, and what comes of it
    short = not holds(2 * sum(weight.nbytes for weight in llm.parameters()))
    for block in llm.layers:
        attn, mlp = block.self_attn, block.mlp
        if replace(attn, ("q_proj", "k_proj", "v_proj"), "qkv_proj", kind, short=short):
            attn.__class__ = PackedAttention
        replace(attn, ("o_proj",), "o_proj", kind, short=short)
        if replace(mlp, ("gate_proj", "up_proj"), "gate_up_proj", kind, short=short):
            mlp.__class__ = PackedMLP
        replace(mlp, ("down_proj",), "down_proj", kind, short=short)
    replace(llm, ("lm_head",), "lm_head", kind, shared=llm.config.tie_word_embeddings, short=short)
