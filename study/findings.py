"""What do the runs say? Paired differences, their intervals, and whether a claim holds.

docs/study.md explains the interval. `Rows` is what everything here is computed from: for each row
of the study, for each seed, which of the Q questions were answered right, in percent: 0 or 100.
"""
import math

import torch
from torch import Tensor

from core.common import UserError
from study.protocol import PILOT_SEEDS, SEEDS
from study.results import bits
from study.world import KINDS, kind_of

Seeds = dict[int, Tensor]               # {seed: right (Q)}
Rows = dict[str, Seeds]
Cells = dict[str, tuple[float, float]]  # {kind of question, or "all": (mean, half of the interval)}

# Quantiles of Student's t by degrees of freedom: what leaves 2.5% above it, and what leaves 20%
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
T80 = {1: 1.376, 2: 1.061, 3: 0.978, 4: 0.941, 5: 0.920, 6: 0.906, 7: 0.896, 8: 0.889, 9: 0.883}


# --------------------------------------------------------------------------------------------------
# From rows of results.csv to differences

def collect(table: list[dict], pilot: bool = False) -> Rows:
    """The runs with the study's seeds, or with the pilot's. UserError if they don't compare."""
    if len({(row["steps"], row["questions"]) for row in table}) > 1:
        raise UserError("results.csv: its rows are of different numbers of steps or questions, "
                        "which don't compare")
    found = {}
    for row in table:
        seed = int(row["seed"])
        if (seed in PILOT_SEEDS) == pilot:
            found.setdefault(row["row"], {})[seed] = 100.0 * torch.tensor(bits(row))
    return found


def paired(a: Seeds, b: Seeds) -> Tensor:
    """a - b (S, Q), of the seeds that both have."""
    seeds = sorted(a.keys() & b.keys())
    return torch.stack([a[seed] - b[seed] for seed in seeds]) if seeds else torch.zeros(0, 1)


def questions_of(rows: Rows) -> int:
    """Q, which is the same for all."""
    seeds = next(iter(rows.values()))
    return len(next(iter(seeds.values())))


def by_kind(Q: int) -> dict[str, list[int]]:
    """{kind: its questions' places in `exam`}, and of all."""
    kinds = [kind_of(i, Q) for i in range(Q)]
    places = {kind: [i for i in range(Q) if kinds[i] == kind] for kind in KINDS}
    return {"all": list(range(Q)), **places}


def compare(rows: Rows, base: Seeds | None) -> dict[str, tuple[int, Cells]]:
    """{row: (how many seeds, cells)}: paired differences from base; None: accuracies."""
    kinds = by_kind(questions_of(rows))
    found = {}
    for name, seeds in rows.items():
        if seeds is base:
            continue
        d = torch.stack([seeds[s] for s in sorted(seeds)]) if base is None else paired(seeds, base)
        if len(d):
            cells = {kind: interval(d[:, places]) for kind, places in kinds.items()}
            found[name] = len(d), cells
    return found


# --------------------------------------------------------------------------------------------------
# Statistics

def error(d: Tensor) -> tuple[float, float]:
    """(mean, standard error) of d (S, Q): seeds down, questions across.

    Seeds and questions are both samples, and both are crossed: every seed answers every question.
    So the variance is that of the seeds' means over S, plus that of the questions' means over Q.
    (What is due to neither is in both terms, so it's a little too much.) With one seed only that of
    the questions is known.
    """
    S, Q = d.shape
    seeds = d.mean(1).var().item() / S if S > 1 else 0.0
    return d.mean().item(), math.sqrt(seeds + d.mean(0).var().item() / Q)


def interval(d: Tensor) -> tuple[float, float]:
    """(mean, half of the 95% interval) of d (S, Q): `error` times Student's t with S - 1 degrees of
    freedom."""
    mean, e = error(d)
    return mean, T[max(1, len(d) - 1)] * e


def least(d: Tensor) -> float:
    """The smallest difference that SEEDS seeds would find in 80% of studies, by what a pilot's
    d (S, Q) says of the variances."""
    e = math.sqrt(d.mean(1).var().item() / SEEDS + d.mean(0).var().item() / d.shape[1])
    return (T[SEEDS - 1] + T80[SEEDS - 1]) * e


def verdict(d: Tensor, side: int, less: float | None = None) -> str:
    """What d (S, Q) says of a claim: it "holds" or is "reversed" if its 95% interval lies on that
    side of 0 or on the other ("above", "below" if the claim has none), else it "can't be told".
    less: the claim is that d isn't above 0 (side 0) or is below it (-1), but by less than that:
    then all of the interval has to lie between -less and 0, or, as d may well be nothing, between
    -less and less.
    """
    if len(d) < 2:                                 # what other seeds would change isn't known
        return "can't be told"
    mean, half = interval(d)
    if less is not None:
        if mean - half > 0 or mean + half < -less:
            return "reversed"
        most = 0 if side else less
        return "holds" if mean - half > -less and mean + half < most else "can't be told"
    if abs(mean) <= half:
        return "can't be told"
    if side == 0:
        return "above" if mean > 0 else "below"
    return "holds" if mean * side > 0 else "reversed"
