"""Which samples make a step."""
import math

import numpy as np
import pytest
import torch

import train
from training import order


def some(n=203, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(10, 900, n), rng.random(n) < 0.7


def test_plain_order_is_the_permutation_it_always_was():
    g, slow = torch.Generator().manual_seed(3), []
    for _ in range(3):
        shuffled = torch.randperm(10, generator=g).tolist()
        slow += [shuffled[at:at + 4] for at in (0, 4, 8)]
    assert list(order.order(10, 9, 4, 3)) == slow and list(order.order(10, 7, 4, 3)) == slow[:7]


@pytest.mark.parametrize("group", order.GROUPS)
def test_every_sample_once_an_epoch(group):
    lengths, pictures = some()
    per_epoch = math.ceil(203 / 16)
    steps = list(order.order(203, 2 * per_epoch, 16, 1, group, lengths, pictures))
    for epoch in (steps[:per_epoch], steps[per_epoch:]):
        assert sorted(sum(epoch, [])) == list(range(203))
        assert [len(rows) for rows in epoch] == [16] * (per_epoch - 1) + [203 % 16]
    assert steps[:per_epoch] != steps[per_epoch:]
    assert steps == list(order.order(203, 2 * per_epoch, 16, 1, group, lengths, pictures))
    assert steps != list(order.order(203, 2 * per_epoch, 16, 2, group, lengths, pictures))


def test_groups_hold_what_they_say():
    lengths, pictures = some(2048)
    pictures[:5] = True, True, False, False, False
    spread = {}
    for group in order.GROUPS:
        steps = list(order.order(2048, 2048 // 16, 16, 1, group, lengths, pictures))
        spread[group] = np.mean([np.ptp(lengths[rows]) for rows in steps])
        if group != "none":
            assert all(lengths[rows].tolist() == sorted(lengths[rows], reverse=True)
                       for rows in steps)
        mixed = [step for step, rows in enumerate(steps) if len(set(pictures[rows])) > 1]
        assert mixed == [len(steps) - 1] if group == "modality-length" else len(mixed) > 10
        kinds = [pictures[rows[0]] for rows in steps]
        assert len(set(kinds[:20])) == 2                              # not one kind after the other
    assert spread["length"] < 0.1 * spread["none"]


@pytest.mark.parametrize("group", ["length", "modality-length"])
def test_shares_are_balanced_and_the_batch_is_everybodys(group):
    lengths, pictures = some(1024)
    for rows in order.order(1024, 64, 16, 0, group, lengths, pictures):
        for size in (1, 2, 4, 8):
            cut = [train.pieces(rows, rank, size, 3) for rank in range(size)]
            # nobody waits for a micro-batch in vain
            assert len({len(batches) for batches, _ in cut}) == 1
            shares = [sum(batches[:counting], []) for batches, counting in cut]
            assert sorted(sum(shares, [])) == sorted(rows)
            sums = [lengths[share].sum() for share in shares]
            assert max(sums) - min(sums) <= np.ptp(lengths[rows])
