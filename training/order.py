"""TODO training/order.py"""
import math
from collections.abc import Iterator

import torch

from core.common import split

# --------------------------------------------------------------------------------------------------
# The order of samples

GROUPS = ("none", "length", "modality-length")
POOL = 50               # global batches that --group length sorts together


def order(n: int, steps: int, batch: int, seed: int, group: str = "none", lengths=None,
          pictures=None) -> Iterator[list[int]]:
    """The samples of every step: every sample once an epoch, in an order of its own.

    It is a function of these arguments and of nothing else. So a step's number is enough to go on from there, and the
    number of processes changes nothing: they share out each global batch (train.pieces).

    none: one permutation; the last batch of an epoch may be short (as LLaVA's is).
    length: of every 50 batches' samples the longest make one batch, the next another, and so on. lengths: array (n,).
    modality-length: LLaVA's grouping. A batch is all pictures or all text (pictures: bool array (n,)), but for the
        last of an epoch, where both kinds' leftovers meet.
    Both put the longest of a batch first. Processes take every size-th: the samples that they put through the model at
    the same time are of like length, and if the batch can be shared out evenly, their shares differ in sum by less than
    its longest sample from its shortest. What that saves: `python data.py padding`.
    """
    per_epoch, g = math.ceil(n / batch), torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % per_epoch == 0:
            batches = epoch(torch.randperm(n, generator=g).tolist(), batch, g, group, lengths, pictures)
        yield batches[step % per_epoch]


def epoch(shuffled: list[int], batch: int, g: torch.Generator, group: str, lengths, pictures) -> list[list[int]]:
    if group == "none":
        return split(shuffled, batch)
    lengths, kinds, pool = lengths.tolist(), [shuffled], POOL * batch
    if group == "modality-length":
        kinds, pool = [[i for i in shuffled if pictures[i]], [i for i in shuffled if not pictures[i]]], batch
    whole, rest = [], []
    for kind in kinds:
        end = len(kind) // batch * batch
        rest += kind[end:]
        for samples in split(kind[:end], pool):
            whole += split(sorted(samples, key=lambda i: -lengths[i]), batch)
    whole = [whole[i] for i in torch.randperm(len(whole), generator=g).tolist()]
    return whole + [sorted(samples, key=lambda i: -lengths[i]) for samples in split(rest, batch)]
