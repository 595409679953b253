"""Colours, pieces, sheets."""
import numpy as np
import pytest

from core import canvas

LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005]])
LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660]])


def oklab(rgb):
    """sRGB (..., 3) of 8 bits -> OKLab, by the published matrices the other way round."""
    c = np.asarray(rgb, dtype=float) / 255
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return np.cbrt(c @ LMS.T) @ LAB.T


def test_the_colour_map_is_even():
    """Lightness rises by the same step everywhere (8 bits allow 0.004), from dark to light; equal
    steps look alike."""
    lab = oklab(canvas.COLOURS)
    steps = np.diff(lab[::15, 0])                                           # 17 steps
    assert lab[0, 0] < 0.25 and lab[-1, 0] > 0.9 and (np.diff(lab[::3, 0]) > 0).all()
    assert steps.max() - steps.min() < 0.008
    apart = np.linalg.norm(np.diff(lab[::15], axis=0), axis=1)
    assert apart.max() / apart.min() < 1.4
    assert len(np.unique(canvas.COLOURS, axis=0)) == 256
    assert np.abs(oklab(canvas.hues(6))[:, 0] - 0.55).max() < 0.02


@pytest.mark.parametrize("fine", [1, 2, 4])
def test_axes_put_data_where_they_say(fine):
    """However much larger it is drawn: a dot lies where `place` says."""
    axes = canvas.Axes(200, 100, (30, 10, 20, 25), (0, 4), (-1, 1), fine)
    assert axes.place(0, -1) == (30, 75) and axes.place(4, 1) == (180, 10)
    axes.dot(axes.place(1, 0), 3, (255, 0, 0))
    image = np.asarray(axes.reduce())
    rows, columns = np.nonzero(image[..., 1] < 128)
    x, y = axes.place(1, 0)
    assert image.shape == (100, 200, 3)
    assert abs(rows.mean() - y) < 1 and abs(columns.mean() - x) < 1 and len(rows) < 60
