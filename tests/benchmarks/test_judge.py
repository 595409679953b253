"""What answers are worth: counted by hand, and beside plain ways to count."""
import math
import random
import subprocess
import sys

import pytest

from benchmarks.judge import judge, word_of
from core.common import ROOT

PAIRS = [("Yes", "yes", "is"), ("no.", "no", "is"), ("Yes, it is.", "no", "is"),
         ("maybe", "yes", "is"), ("yes", "yes", "is"), (" red ", "red", "colour"),
         ("The red", "red", "colour"), ("two", "2", ""), ("blue", "green", "colour")]


def test_by_hand():
    found = judge(PAIRS)
    assert found["n"] == 9 and found["exact"] == 2 / 9 and found["vqa"] == 6 / 9
    assert found["majority"] == 3 / 9
    assert list(found["kinds"]) == ["colour", "is"]              # what has no kind is in all alone
    colour = found["kinds"]["colour"]
    assert (colour["n"], colour["exact"], colour["vqa"], colour["majority"]) == (3, 1 / 3, 2 / 3,
                                                                               2 / 3)
    assert colour["yes_no"] is None and found["kinds"]["is"]["yes_no"] == found["yes_no"]
    words = found["yes_no"]       # yes yes, no no, yes no, neither yes, yes yes: 2 hits of 3 and 3
    assert words["n"] == 5 and words["accuracy"] == pytest.approx(3 / 5)
    assert [words[name] for name in ("precision", "recall", "f1")] == pytest.approx([2 / 3] * 3)


def test_intervals():
    """1.96 standard errors of a mean, within 0 and 1; F1's beside a bootstrap."""
    found = judge([("a", "a", "")] * 30 + [("a", "b", "")] * 70)
    off = 1.96 * math.sqrt(0.3 * 0.7 / 99)
    assert found["intervals"]["exact"] == pytest.approx([0.3 - off, 0.3 + off])
    assert judge([("a", "a", "")] * 9 + [("a", "b", "")])["intervals"]["exact"][1] == 1
    draw = random.Random(0)
    pairs = [(draw.choice(["yes", "yes", "no"]), draw.choice(["yes", "no"]), "")
             for _ in range(200)]
    words = judge(pairs)["yes_no"]
    again = [judge(draw.choices(pairs, k=200))["yes_no"]["f1"] for _ in range(120)]
    spread = math.sqrt(sum((f1 - words["f1"]) ** 2 for f1 in again) / 120)
    low, high = words["intervals"]["f1"]
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.25)


def test_what_there_is_no_number_of():
    words = judge([("no", "no", ""), ("No", "No.", "")])["yes_no"]
    assert words["accuracy"] == 1 and words["f1"] is words["precision"] is words["recall"] is None
    assert words["intervals"]["f1"] is None
    words = judge([("no", "yes", "")])["yes_no"]
    assert words["precision"] is None and words["recall"] == words["f1"] == 0


@pytest.mark.parametrize("text, word", [("Yes", "yes"), ("NO!", "no"), ("Yes, a cat.", "yes"),
                                        ("not", None), ("yesterday", None), ("", None),
                                        ("I say yes", None)])
def test_first_words(text, word):
    assert word_of(text) == word


def test_a_letter_is_no_article():
    """The normal form of A, The and nothing is the same empty text."""
    found = judge([("The", "A", ""), ("", "A", ""), ("a", "A", ""), ("A", "A", "")])
    assert found["vqa"] == 0.5 and found["exact"] == 0.25


def test_it_needs_no_torch():
    code = ("import sys; from benchmarks import exam, judge; "
            "sys.exit('torch' in sys.modules or judge.judge([('a', 'a', '')])['exact'] != 1)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
