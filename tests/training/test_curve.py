"""The picture of a training's losses: what is drawn where."""
import math

import pytest
from PIL import Image

from core.common import UserError
from training import curve


def test_smoothing_is_a_weighted_mean():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    for i, mean in enumerate(curve.smooth(values, 2)):
        weights = [math.exp(-(i - j) / 2) for j in range(i + 1)]
        assert mean == pytest.approx(sum(w * v for w, v in zip(weights, values)) / sum(weights))


@pytest.mark.parametrize("low, high, expected", [(0, 1500, range(0, 1401, 200)), (0.13, 0.29, [0.14, 0.16, 0.18, 0.2]),
                                                 (0, 1, [0, 0.2, 0.4, 0.6]), (5.9, 6.0, [5.9, 5.92, 5.94])])
def test_ticks_are_round_and_few(low, high, expected):
    found = curve.ticks(low, high)
    assert found[:len(expected)] == pytest.approx(list(expected)) and len(found) <= 10 and found[-1] <= high + 1e-9


def test_the_line_goes_where_the_losses_are(tmp_path):
    """A loss of 2, then of 1: the line begins at the top left and ends at the bottom right; nan isn't drawn."""
    rows = [f"{step},{'nan' if step == 7 else 2 if step <= 50 else 1},0" for step in range(1, 101)]
    (tmp_path / "log.csv").write_text("\n".join(["step,loss,lr", *rows]) + "\n")
    curve.draw(tmp_path)
    image = Image.open(tmp_path / "loss.png").convert("RGB")
    assert image.size == (curve.WIDTH, curve.HEIGHT)
    blue = [(x, y) for x in range(curve.LEFT + 2, curve.WIDTH - curve.RIGHT) for y in range(image.height)
            if image.getpixel((x, y))[2] > image.getpixel((x, y))[0] + 80]
    left, right = ([y for x, y in blue if part(x)] for part in (lambda x: x < 400, lambda x: x > 700))
    assert left and max(left) < 80 and right and min(right) > curve.HEIGHT - curve.BOTTOM - 10


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
    curve.plot([(1, math.nan)], "")                        # a run whose first step was spoilt draws all the same
