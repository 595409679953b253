"""results.csv: nothing is lost, a row that differs is refused."""
import pytest

from core.common import UserError
from study import results


def test_a_row_that_differs_is_refused_and_nothing_is_lost(tmp_path):
    path = tmp_path / "results.csv"
    row = dict(row="ccra", seed=0, steps="2+2", questions=4, accuracy="0.5000", commit="abc",
               right="1a")
    results.add(path, row)
    results.add(path, row)
    results.add(path, {**row, "seed": 1})
    assert [r["seed"] for r in results.read(path)] == ["0", "1"]
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(UserError, match="had accuracy 0.5000 at abc, now 0.2500"):
        results.add(path, {**row, "right": "11", "accuracy": "0.2500"})
    assert len(results.read(path)) == 2
