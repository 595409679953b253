"""The map lies where it should on the picture, and no sheet is cut off."""
import numpy as np
import pytest
import torch
from PIL import Image

from clip import expand_to_square, preprocess
from core import canvas
from core.common import UserError
from tests.viz.helpers import bare_sight, noise, random_sight
from viz import figures

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("size", [(300, 300), (400, 150), (110, 330), (301, 200)])
def test_the_map_lies_on_the_picture(size, pad):
    """A red spot: the patches in which clip.preprocess puts it are the ones drawn where the picture
    has it."""
    grid, (w, h) = 24, size
    image = Image.new("RGB", size, (0, 0, 255))
    image.paste((255, 0, 0), (w // 2 - 40, h // 2 - 30, w // 2 + 17, h // 2 + 41))
    pixels = preprocess(image, grid * 14, pad)                              # (3, 336, 336)
    red = (pixels[0] > pixels[2]).float()
    share = red.view(grid, 14, grid, 14).mean((1, 3))                       # (grid, grid)
    sight = bare_sight(image, grid, pad)
    drawn = figures.overlay(sight, (share > 0.5).float().flatten(), 0, 1, sight.image.size)
    hot = np.nonzero(np.asarray(drawn)[..., 0] > 150)                       # rows, columns
    true = np.nonzero(np.asarray(sight.image)[..., 0] > 128)
    patch = (max if pad else min)(size) / grid
    for found, right in zip(hot, true):
        assert abs(found.min() - right.min()) <= patch / 2 + 1
        assert abs(found.max() - right.max()) <= patch / 2 + 1


def test_overlay_pixel_by_pixel():
    """Against the padded square drawn whole, patch by patch, and cut to the picture."""
    image = noise(96, 60)
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    sight = bare_sight(image, 8)
    lo, hi = values.min().item(), values.max().item()
    drawn = np.asarray(figures.overlay(sight, values, lo, hi, image.size))
    square = Image.new("RGB", (96, 96))
    for n, v in enumerate(values.tolist()):
        colour = tuple(canvas.COLOURS[round(255 * (v - lo) / (hi - lo))].tolist())
        x, y = n % 8 * 12, n // 8 * 12
        square.paste(colour, (x, y, x + 12, y + 12))
    assert expand_to_square(image).size == square.size
    heat = np.asarray(square.crop((0, 18, 96, 78))).astype(float)
    grey = (80 + 0.4 * np.asarray(image.convert("L")).astype(float))[..., None]
    assert np.abs(drawn - (figures.HEAT * heat + (1 - figures.HEAT) * grey)).max() <= 2
    assert len(figures.inside(sight, values)) == 6 * 8                      # rows 1.5 to 6.5 of 8


@pytest.mark.parametrize("size", [(336, 336), (500, 120), (90, 400)])
def test_nothing_is_cut_off(size):
    """Long questions and answers, narrow and wide pictures: a white margin remains on all sides of
    every sheet."""
    words = ["Where", " is", " x" * 9, "y" * 300, " \n"] * 4
    sight = random_sight(A=60, L=7, grid=8, size=size, words=words)
    sight.name = "a model with quite a long name " * 3
    sheets = [figures.figure3(sight, [1, 7]), figures.figure4([sight] * 3),
              figures.side_by_side([[sight] * 2])]
    for sheet in sheets:
        pixels = np.asarray(sheet)
        for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
            assert (edge == 255).all()
        assert sheet.width < 1400 and (pixels < 255).any()
    for layers in ([0], [8]):
        with pytest.raises(UserError, match="layers 1 to 7"):
            figures.figure3(sight, layers)
