"""The numbers of `python -m viz`."""
import math

import numpy as np
import pytest
import torch

from core.common import UserError
from toy import world as toy
from viz import __main__ as program
from viz import maps, pointing

pytestmark = pytest.mark.usefixtures("one_thread")


def test_intervals():
    mean, half = pointing.mean95([0.0, 1.0, 1.0, 0.0, 1.0])
    assert mean == pytest.approx(0.6)
    assert half == pytest.approx(1.96 * np.std([0, 1, 1, 0, 1], ddof=1) / 5 ** 0.5)
    assert pointing.mean95([0.0, 1.0]) == pytest.approx((0.5, 1.96 * 0.5 ** 0.5 / 2 ** 0.5))


def test_of_too_few_there_is_no_interval():
    mean, half = pointing.mean95([0.25])
    assert mean == 0.25 and math.isnan(half)
    assert all(math.isnan(x) for x in pointing.mean95([]))


def test_cover_counts_pixels():
    box, side, grid = (13.5, 20.25, 40.0, 71.5), 96, 8
    left, top, right, bottom = box
    covered, centre = pointing.cover(box, grid, side)
    at = (np.arange(96 * 8) + 0.5) / 8                        # 8 samples a pixel and direction
    inside = ((at >= top) & (at <= bottom))[:, None] & ((at >= left) & (at <= right))
    share = inside.reshape(8, 96, 8, 96).mean((1, 3)).ravel()
    assert np.abs(share - covered.numpy()).max() < 1e-9
    centres = [left <= x <= right and top <= y <= bottom
               for y in range(6, 96, 12) for x in range(6, 96, 12)]
    assert centre.tolist() == centres
    assert abs(covered.mean().item() - (40 - 13.5) * (71.5 - 20.25) / 96 ** 2) < 1e-9
    covered, _ = pointing.cover((-50, -50, 200, 200), 8, 96)
    assert covered.min() == covered.max() == 1


def test_pointing_tells_a_perfect_map_from_an_even_one(monkeypatch, tokenizer):
    """A model that looks at the asked thing alone gets all of the mass; one that looks evenly gets
    what chance has."""
    items = {}
    for item, asked, other in pointing.where_items(0, 20):
        assert toy.PLACES[asked[0].cell] == item.turns[-1].short
        assert other is None or other[0].cell != asked[0].cell
        covered, _ = pointing.cover(toy.box(*asked[:4]), 8, 96)
        items[toy.draw(item.scene).tobytes()] = covered.float()
    assert len(items) == 20

    def ask(model, tokenizer, image, question, layers, max_new_tokens):
        best, even = items[image.tobytes()], torch.ones(64)
        best = best * (best == best.max())
        found = dict(w_p=100 * best, W_lp=100 * torch.stack([best, best]))
        llm = torch.stack([best, even])[:, None]
        return maps.Sight(image, (0, 0, 1, 1), 8, question, [], [""], llm, [1, 2], found)

    monkeypatch.setattr(pointing, "ask", ask)
    model = type("Model", (), dict(llm=type("Llm", (), dict(layers=[0, 1]))))
    scores = pointing.pointing(model, tokenizer, 20, 0)
    means = {name: {column: pointing.mean95(values)[0] for column, values in row.items()}
             for name, row in scores.items()}
    assert len(means) == 5
    for name in ("PWCA", "LPWCA, mean of the layers", "language model, block 1"):
        assert means[name]["hit"] == 1 and means[name]["mass"] > 0.95
    for part in ("hit", "mass"):
        assert scores["language model, block 2"][part] == pytest.approx(scores["chance"][part])
    assert means["PWCA"]["mass other"] < 0.1 and means["PWCA"]["hit other"] < 0.2
    areas = [covered.mean().item() for covered in items.values()]
    assert scores["chance"]["mass"] == pytest.approx(areas)


def test_depth(capsys):
    assert pointing.depth(torch.tensor([0.0, 0.0, 1.0])) == 3
    assert pointing.depth(torch.full((8,), 1 / 8)) == pytest.approx(4.5)
    found = dict.fromkeys(pointing.LOOKS, [1.0, 2.0]) | dict.fromkeys(pointing.THOUGHT, [3.0, 4.0])
    pointing.show_depths(found, 8)
    assert "count, left-of deeper than colour, word by 2.000 +-" in capsys.readouterr().out


def test_the_commands_print_tables(capsys):
    program.main(["--pointing", "--n", "3"])
    program.main(["--depth", "--n", "2"])
    out = capsys.readouterr().out
    assert "chance" in out and "PWCA" in out and "language model, block 1" in out
    assert out.count("+-") > 12
    assert "count, left-of deeper than colour, word by" in out
    with pytest.raises(UserError, match="--n 1"):
        program.main(["--depth", "--n", "1"])
