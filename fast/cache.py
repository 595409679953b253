"""Decoding on a CPU: one new token, which looks at all that came before.

Turning half-precision numbers into float32, not reading them, is what takes the time there: a core
reads half of what it could. `sums` uses a kernel that FBGEMM compiles for this very CPU; it adds up
lines of a table, so keys have to lie with positions last. `TurnedCache` keeps them so from the
start.
"""
from functools import lru_cache

import torch
from torch import Tensor

from fast.linear import HALF
from fast.memory import fetch, keep_memory
from llama import Attention, Decoder, KVCache, Llama, LlamaConfig

# x86: whether `sums` is worth anything here
SUMS = "fbgemm" in torch.backends.quantized.supported_engines
MANY = 2 ** 19        # numbers of a layer's keys from which on `attend` is worth its six operations


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


class TurnedCache(KVCache):
    """A KVCache whose keys lie with positions last, (B, n_kv, hd, length) in memory, for `attend`.
    That takes half of the time of `attention` or less, with much in half precision."""

    def __init__(self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype,
                 device: str | torch.device = "cpu"):
        super().__init__(config, batch, length, dtype, device)
        L, n_kv, hd = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.keys = None                                         # the memory may serve again
        keys = torch.empty(L, batch, n_kv, hd, length, dtype=dtype, device=device)
        self.keys = keys.mT.unbind()                             # L x (B, n_kv, length, hd)

    def attend(self, layer: int, q: Tensor, mask: Tensor | None) -> Tensor:
        """What `attention` gives for one new position's q (B, H, 1, hd), by `sums` over a layer's
        keys and values.

        mask (B, 1, 1, length + 1) or None. q k^T is the sum of a head's hd lines of keys, each a
        number for every position, weighted with q; what comes of it the sum of values, each
        weighted with a position's share.
        """
        B, H, _, hd = q.shape
        keys = self.keys[layer].mT.flatten(0, 1)                 # (B n_kv, hd, room)
        values = self.values[layer].flatten(0, 1)                # (B n_kv, room, hd)
        q = (q * hd ** -0.5).view(len(keys), -1, hd)             # (B n_kv, group, hd)
        scores = sums(keys, q)[..., :self.length + 1].view(B, H, -1)     # (B, H, length + 1)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], torch.finfo(scores.dtype).min)
        shares = scores.softmax(-1).view(*q.shape[:2], -1)       # (B n_kv, group, length + 1)
        return sums(values, shares).view(B, H, 1, hd)


def gains(config: LlamaConfig, batch: int, length: int, dtype: torch.dtype,
          device: torch.device) -> bool:
    """Whether a TurnedCache of this size is faster than a plain one."""
    numbers = batch * config.num_key_value_heads * length * config.head_dim
    return SUMS and device.type == "cpu" and dtype in HALF and numbers > MANY


class DecodingAttention(Attention):
    """Llama's attention, for one new position as well."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool,
                cache: KVCache | None, layer: int) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        if x.shape[1] > 1:
            return super().forward(x, cos, sin, mask, causal, cache, layer)
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)                     # (B, n_kv, Tk, hd)
        if isinstance(cache, TurnedCache):
            y = cache.attend(layer, q, mask)                     # (B, H, 1, hd)
        else:
            # One query a head: those of a group become rows of one product, so the cache needs no
            # copies.
            q = q.view(len(x), self.n_kv, -1, self.head_dim)     # (B, n_kv, group, hd)
            y = self.attend(q, k, v, mask=mask)                  # (B, n_kv, group, hd)
        return self.o_proj(y.reshape(len(x), 1, -1))             # (B, 1, D)


class Decoding(Decoder):
    """A decoder with the cache that suits it, after what Linux needs to be told about memory."""

    def __init__(self, llm: Llama, prompt: Tensor, mask: Tensor | None, steps: int):
        keep_memory(prompt.device)
        if prompt.device.type == "cpu":
            fetch(llm)
        super().__init__(llm, prompt, mask, steps)

    def new_cache(self, prompt: Tensor, length: int, dtype: torch.dtype) -> KVCache:
        """An empty cache for `length` positions of as many rows as the prompt has."""
        size = self.llm.config, len(prompt), length, dtype, prompt.device
        return TurnedCache(*size) if gains(*size) else KVCache(*size)
