"""Which samples make a step: every one once an epoch, at random or grouped by length."""
import math
from collections.abc import Iterator

import numpy as np
import torch

from core.common import split

GROUPS = ("none", "length", "modality-length")
POOL = 50               # global batches that --group length sorts together


def order(n: int, steps: int, batch: int, seed: int, group: str = "none",
          lengths: np.ndarray | None = None,
          pictures: np.ndarray | None = None) -> Iterator[list[int]]:
    """The samples of every step: every sample once an epoch, in an order of its own.

    It is a function of these arguments and of nothing else. So a step's number is enough to go on
    from there, and the number of processes changes nothing: they share out each global batch
    (train.pieces).

    none: one permutation; the last batch of an epoch may be short (as LLaVA's is).
    length: of every 50 batches' samples the longest make one batch, the next another, and so on.
        lengths: array (n,).
    modality-length: LLaVA's grouping. A batch is all pictures or all text (pictures: bool array
        (n,)), but for the last of an epoch, where both kinds' leftovers meet.
    Both put the longest of a batch first. Processes take every size-th: the samples that they put
    through the model at the same time are of like length, and if the batch can be shared out
    evenly, their shares differ in sum by less than its longest sample from its shortest.
    """
    per_epoch = math.ceil(n / batch)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % per_epoch == 0:
            shuffled = torch.randperm(n, generator=generator).tolist()
            batches = epoch(shuffled, batch, generator, group, lengths, pictures)
        yield batches[step % per_epoch]


def epoch(shuffled: list[int], batch: int, generator: torch.Generator, group: str,
          lengths: np.ndarray | None, pictures: np.ndarray | None) -> list[list[int]]:
    """An epoch's batches, from its samples in random order: see `order`."""
    if group == "none":
        return split(shuffled, batch)
    lengths = lengths.tolist()

    def longest_first(samples: list[int]) -> list[int]:
        return sorted(samples, key=lambda i: -lengths[i])

    if group == "length":
        kinds = [shuffled]
        pool = POOL * batch
    else:
        kinds = [[i for i in shuffled if pictures[i]], [i for i in shuffled if not pictures[i]]]
        pool = batch
    whole, rest = [], []
    for kind in kinds:
        end = len(kind) // batch * batch
        rest += kind[end:]
        for samples in split(kind[:end], pool):
            whole += split(longest_first(samples), batch)
    whole = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
    return whole + [longest_first(samples) for samples in split(rest, batch)]
