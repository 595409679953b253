"""The picture of a training's losses: what is drawn where."""
import math

import numpy as np
import pytest
from PIL import Image

from core.common import UserError
from training import curve


def test_smoothing_is_a_weighted_mean():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    for i, mean in enumerate(curve.smooth(values, 2)):
        weights = [math.exp(-(i - j) / 2) for j in range(i + 1)]
        assert mean == pytest.approx(sum(w * v for w, v in zip(weights, values)) / sum(weights))


@pytest.mark.parametrize("low, high, expected", [
    (0, 1500, range(0, 1401, 200)), (0.13, 0.29, [0.14, 0.16, 0.18, 0.2]),
    (0, 1, [0, 0.2, 0.4, 0.6]), (5.9, 6.0, [5.9, 5.92, 5.94])])
def test_ticks_are_round_and_few(low, high, expected):
    found = curve.ticks(low, high)
    assert found[:len(expected)] == pytest.approx(list(expected))
    assert len(found) <= 10 and found[-1] <= high + 1e-9


def test_the_line_goes_where_the_losses_are(tmp_path):
    """A loss of 2, then of 1: the line begins at the top left and ends at the bottom right; nan
    isn't drawn."""
    losses = [2 if step <= 50 else 1 for step in range(1, 101)]
    losses[6] = "nan"
    rows = [f"{step},{loss},0" for step, loss in enumerate(losses, 1)]
    (tmp_path / "log.csv").write_text("\n".join(["step,loss,lr", *rows]) + "\n")
    curve.draw(tmp_path)
    image = Image.open(tmp_path / "loss.png").convert("RGB")
    assert image.size == (curve.WIDTH, curve.HEIGHT)
    red, _, blue = np.moveaxis(np.asarray(image).astype(int), -1, 0)
    y, x = np.nonzero(blue > red + 80)
    inside = (x >= curve.LEFT + 2) & (x < curve.WIDTH - curve.RIGHT)
    left, right = y[inside & (x < 400)], y[inside & (x > 700)]
    assert len(left) and left.max() < 80
    assert len(right) and right.min() > curve.HEIGHT - curve.BOTTOM - 10


def test_what_was_held_out(tmp_path):
    """Dots of their own colour, where they are on the axes; without the columns there are none."""
    rows = [f"{step},1,0,{'' if step % 50 else step / 50},{'' if step < 100 else 0.5}"
            for step in range(1, 101)]
    (tmp_path / "log.csv").write_text("\n".join(["step,loss,lr,val_loss,val_right", *rows]) + "\n")
    curve.draw(tmp_path)

    def orange():
        image = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).astype(int)
        return np.nonzero((image[..., 0] > 150) & (image[..., 2] < 80))

    y, x = orange()
    dots = y < curve.HEIGHT - curve.BOTTOM
    assert dots.any() and not dots.all()                            # the others: what is said below
    middle = (curve.LEFT + curve.WIDTH - curve.RIGHT) / 2
    assert abs(x[dots].min() - middle) < 6                          # of step 50, at the bottom
    assert abs(x[dots].max() - (curve.WIDTH - curve.RIGHT)) < 6     # of step 100, near the top
    assert y[dots][x[dots].argmin()] > y[dots][x[dots].argmax()] + 200
    (tmp_path / "log.csv").write_text("step,loss\n1,2\n2,1\n")
    curve.draw(tmp_path)
    assert not len(orange()[0])


def test_nothing_to_draw(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        curve.draw(tmp_path)
    for text in ("step,lr\n1,2\n", "step,loss\n1,2\n2\n", "step,loss\n1,x\n"):
        (tmp_path / "log.csv").write_text(text)
        with pytest.raises(UserError, match="not a log.csv"):
            curve.draw(tmp_path)
    (tmp_path / "log.csv").write_text("step,loss\n")
    with pytest.raises(UserError, match="no step"):
        curve.draw(tmp_path)
    # a run whose first step was spoilt draws all the same
    curve.plot([(1, math.nan)], "")
