"""`python -m bench.lora` on tiny Llamas: both sides compute the same, and the figures are there."""
import json
import re

import pytest

from bench import lora
from tests.core.helpers import fails

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("peft")
TINY = ["--width", "32", "--inner", "48", "--heads", "2", "--vocab", "90", "--positions", "24",
        "--supervised", "9", "--r", "4", "--steps", "2", "--rounds", "1"]


@pytest.fixture
def here(monkeypatch):
    """Its runs in this process, which has transformers loaded."""
    def child(side, argv):
        return lora.measure(lora.arguments([*argv, "--child", side]))

    monkeypatch.setattr(lora, "child", child)


@pytest.mark.parametrize("more", ([], ["--recompute"], ["--supervised", "24"],
                                  ["--stored", "bfloat16"], ["--dtype", "bfloat16"]), ids=str)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_sides_compute_the_same(here, capsys, tmp_path, more):
    lora.main([*TINY, *more, "--json", str(tmp_path / "x.json")])
    said = capsys.readouterr().out
    assert re.search(r"\d\.\d\dx as fast .* of the memory", said)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["ours"]["loss"] == pytest.approx(found["peer"]["loss"], rel=2e-3)
    # of two blocks: four matrices 32 x 32, three 32 x 48
    assert found["ours"]["trained"] == 2 * 4 * (4 * (32 + 32) + 3 * (32 + 48))
    assert len(found["runs"]["ours"]) == 1 and found["ours"]["seconds"] > 0


def test_sides_that_differ_are_not_compared(here, monkeypatch):
    monkeypatch.setattr(lora, "TOLERANCE", 1e-9)
    with fails("compute different things"):
        lora.main([*TINY, "--stored", "bfloat16"])


def test_a_run_that_fails_says_why():
    with fails("ours", "3 attention heads don't divide"):
        lora.child("ours", [*TINY, "--heads", "3"])
