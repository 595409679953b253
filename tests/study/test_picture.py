"""The picture of the differences."""
import numpy as np
import torch

from study.picture import LINE, TOP, plot


def row(image, i):
    """A line of a picture."""
    return image[TOP + LINE * i:TOP + LINE * (i + 1)]


def blue(image):
    red, _, blue = np.moveaxis(np.asarray(image).astype(float), -1, 0)
    return blue > red + 50


def test_the_picture():
    """Blue is what excludes 0; beyond a column's end an interval is an arrow, and nothing is drawn
    outside."""
    base = {seed: torch.tensor([0.0, 100.0] * 40) for seed in range(3)}
    better = {f"better {n}": {seed: x + 60 + seed for seed, x in base.items()} for n in range(4)}
    rows = {"ccra": base, "same": dict(base), **better}
    assert not blue(plot({"ccra": base, "same": dict(base)}, "ccra")).any()
    image = blue(plot(rows, "ccra"))
    assert [bool(row(image, i).any()) for i in range(5)] == [False, True, True, True, True]
    wild = plot(rows | {"wild": {0: base[0] - 900, 1: base[1] + 900, 2: base[2]}}, "ccra")
    assert wild.height == TOP + LINE * 6 + 20
    last = row(np.asarray(wild), 5)[..., 0] < 200
    assert last[:, 133:140].any() and last[:, 340:348].any() and not last[:, 349:352].any()
