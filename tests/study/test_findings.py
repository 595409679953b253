"""An interval by hand, and what is said of a claim when the truth is known."""
import math

import pytest
import torch

from study import findings
from study.protocol import CLAIMS, LESS


def test_the_interval_against_one_worked_out_by_hand():
    # Two seeds, four questions. Seeds' means 1/2 and 0: variance 1/8, over 2 -> 1/16. Questions'
    # means 1, 0, 1/2, -1/2: mean 1/4, squares 9/16, 1/16, 1/16, 9/16, variance 20/16/3 = 5/12,
    # over 4 -> 5/48. Together 1/6.
    a = {0: torch.tensor([1.0, 1, 1, 0]), 1: torch.tensor([1.0, 0, 0, 0]), 2: torch.ones(4)}
    b = {0: torch.tensor([0.0, 1, 0, 0]), 1: torch.tensor([0.0, 0, 0, 1])}
    d = findings.paired(a, b)
    assert d.tolist() == [[1, 0, 1, 0], [1, 0, 0, -1]]
    mean, half = findings.interval(d)
    assert mean == 0.25 and half == pytest.approx(12.706 * math.sqrt(1 / 6), rel=1e-4)


def test_the_interval_holds_what_it_says():
    """Of 400 studies of a true difference of 0, by seeds and by questions that both vary, 5% at
    most exclude it."""
    g, excluded = torch.Generator().manual_seed(1), 0
    for _ in range(400):
        seeds, questions = (torch.randn(5, 1, generator=g) * 0.1, torch.randn(1, 300, generator=g))
        mean, half = findings.interval(seeds + questions + torch.randn(5, 300, generator=g))
        excluded += abs(mean) > half
    assert excluded / 400 <= 0.06


@pytest.mark.parametrize("mean, plain, small, robust", [
    (-0.5, "holds", "holds", "holds"), (-1.9, "holds", "can't be told", "can't be told"),
    (-3, "holds", "reversed", "reversed"), (0.1, "can't be told", "can't be told", "holds"),
    (1.9, "reversed", "reversed", "reversed"), (0.5, "reversed", "reversed", "reversed")])
def test_what_a_small_loss_is(mean, plain, small, robust):
    """Intervals of ± 0.3 or so about the mean, on either side of 0 and of -2."""
    seeds = torch.tensor([-0.1, 0.0, 0.1])[:, None]
    d = mean + seeds + torch.zeros(3, 100)
    assert 0.2 < findings.interval(d)[1] < 0.3
    assert findings.verdict(d, -1) == plain
    assert findings.verdict(d, -1, 2.0) == small
    assert findings.verdict(d, 0, 2.0) == robust
    assert findings.verdict(d - mean + 3, 0) == "above"
    assert findings.verdict(d - mean - 3, 0) == "below"
    assert LESS.keys() <= CLAIMS.keys()
    one_seed = torch.tensor([[-20.0] * 50 + [-19.0] * 50])
    assert findings.verdict(one_seed, -1) == "can't be told"
    wide = torch.tensor([[-1.9], [2.1]]) + torch.zeros(2, 9)                              # 0.1 ± 25
    assert findings.verdict(wide, 0, 2.0) == "can't be told"
