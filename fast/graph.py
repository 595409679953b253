"""Decoding on a GPU: the work of one token, recorded once and replayed for every other.

A new token is 900 small pieces of work. A GPU needs milliseconds for all of them, but Python takes
tens of them to hand them over one by one, so the GPU waits. A CUDA graph is a recording of them,
handed over at once. It reads and writes the same memory each time, at shapes that never change. So
what differs from token to token stands in tensors here: the embedding, the place in the cache, who
may be looked at.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fast.cache import Decoding
from llama import KVCache, Llama

AFTER = 6               # tokens that come without: a recording takes as long as some seven


class Whole:
    """A KVCache as the recording sees it: all of its room, with the new position at `at`."""

    def __init__(self, cache: KVCache, at: Tensor):
        self.cache, self.at = cache, at
        self.length = cache.room - 1

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, n_kv, 1, hd) -> a layer's keys and values, (B, n_kv, room, hd), most of them of
        no meaning yet."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return keys.index_copy_(2, self.at, k), values.index_copy_(2, self.at, v)


class Replay:
    """Logits of a Llama for one position after another, as `hidden` and `lm_head` give them with
    the cache. On a CPU nothing is recorded, for the tests: the same work, each time anew."""

    def __init__(self, llm: Llama, cache: KVCache, mask: Tensor | None):
        """cache: with what came so far; mask (B, cache.length or more) bool: what of that is real,
        None: all of it."""
        self.llm, self.cache, self.graph = llm, cache, None
        # a NaN that nobody looks at still is one times zero
        for memory in (*cache.keys, *cache.values):
            memory[:, :, cache.length:] = 0
        weight, B = llm.embed_tokens.weight, len(cache.values[0])
        self.embeds = weight.new_zeros(B, 1, weight.shape[1])           # (B, 1, D)
        self.shown = weight.new_zeros(B, cache.room, dtype=torch.bool)  # (B, room)
        self.shown[:, :cache.length] = True if mask is None else mask[:, :cache.length]
        self.positions = self.shown.sum(1, keepdim=True)                # (B, 1), the next token's
        self.shown[:, cache.length] = True
        self.at = torch.tensor([cache.length], device=weight.device)    # (1), where it comes to be
        if weight.device.type == "cuda":
            self._record(torch.cuda.current_stream(), torch.cuda.Stream())

    def _record(self, usual, aside):
        aside.wait_stream(usual)
        with torch.cuda.stream(aside):
            # once before, for what libraries set up when first used; what it writes is replaced
            self._work()
        usual.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._work()

    def _work(self) -> Tensor:
        hidden = self.llm.hidden(embeds=self.embeds, mask=self.shown, positions=self.positions,
                                 cache=Whole(self.cache, self.at))
        return self.llm.lm_head(hidden[:, -1])                          # (B, V)

    def __call__(self, embeds: Tensor) -> Tensor:
        """The next token's embeds (B, 1, D) -> logits (B, V), which the next call overwrites."""
        self.embeds.copy_(embeds)
        if self.graph is None:
            self.logits = self._work()
        else:
            self.graph.replay()
        self.cache.length += 1
        self.shown[:, self.cache.length:self.cache.length + 1] = True
        self.positions += 1
        self.at += 1
        return self.logits


class Recorded(Decoding):
    """A decoder that records, on a GPU, what the first tokens have shown to be worth it."""
    calls = 0
    replay: Replay | None = None

    def new_cache(self, prompt: Tensor, length: int, dtype: torch.dtype) -> KVCache:
        """An empty cache for `length` positions or a few more."""
        # what autocast casts can't be recorded
        self.records = prompt.device.type == "cuda" and dtype == prompt.dtype
        if self.records:
            length = -(-length // 8) * 8        # masks of other lengths would be copied each time
        return super().new_cache(prompt, length, dtype)

    def __call__(self, embeds: Tensor) -> Tensor:
        """embeds (B, T, D) -> logits (B, V) of what comes after them."""
        self.calls += 1
        if not self.records or self.calls <= AFTER:
            return super().__call__(embeds)
        if self.replay is None:
            self.replay = Replay(self.llm, self.cache, self.mask)
        return self.replay(embeds)


@contextmanager
def unrecorded(llm: Llama) -> Iterator[None]:
    """Inside, nothing is recorded: a replay calls no hooks."""
    usual = llm.decoder
    if usual is Recorded:
        llm.decoder = Decoding
    try:
        yield
    finally:
        llm.decoder = usual
