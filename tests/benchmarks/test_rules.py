"""The rules one by one: normal forms, what is read from an answer, whether that is right."""
import pytest

from benchmarks import mmmu
from benchmarks.normalise import (
    CONTRACTIONS,
    CONTRACTIONS_VIZWIZ,
    NUMBERS,
    PUNCTUATION,
    evalai,
    vqa_accuracy,
)
from benchmarks.others import can_infer


@pytest.mark.parametrize("text, normal", [
    ("The dogs", "dogs"), ("A", ""), ("", ""), ("None", "0"), ("ten", "10"), ("eleven", "eleven"),
    ("Yes!", "yes"), ("yes, sir?", "yes sir"), ("1,000.50", "1000.50"), ("3.", "3"), ("a.b", "ab"),
    ("x-ray", "x ray"), ("x -ray-z", "x rayz"), ("o'clock", "o'clock"), ("oclock", "o'clock"),
    ("its", "its"), ("couldnt've", "couldn't've"), ("I'dve", "i'dve"), ("levi's", "levi 's"),
    ("somebody'd", "somebodyd"), ("two\nof\tthe ten", "2 of 10"), ("50% & more", "50% & more"),
    ("Caf\u00e9\u00a0A", "caf\u00e9"), ("don\u2019t", "don\u2019t"),
    ("a" + "." * 40, "a" + "." * 8)])
def test_evalai(text, normal):
    assert evalai(text) == normal


def test_the_tables_are_whole():
    """120 contractions, of which 45 have an apostrophe already; VizWiz's differ from them in all
    but eight values."""
    plain, curly = CONTRACTIONS, CONTRACTIONS_VIZWIZ
    assert len(plain) == len(curly) == 120 and sum("'" in key for key in plain) == 45
    assert sum("'" in value for value in curly.values()) == 8
    assert sum("'" in key for key in curly) == 2
    assert curly["dont"] == "don\u2019t" and curly["couldn'tve"] == "couldn\u2019t\u2019ve"
    assert curly["wheres"] == "where's" and curly["somebody\u2019d"] == "somebodyd"
    assert (plain["weve"], plain["twas"]) == ("we've", "'twas")
    assert len(PUNCTUATION) == 21 and len(NUMBERS) == 12


@pytest.mark.parametrize("same, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_one_out(same, accuracy):
    assert vqa_accuracy("x", ["x"] * same + ["y"] * (10 - same)) == pytest.approx(accuracy)


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("B.", "B"), ("(B) a cat", "B"), ("Answer: B", "B"), ("A or B", None), ("b", None),
    ("", None), ("A cat", "A"), ("A cat sits on the mat", "B"), ("the CAT", "B"), ("Z", "Z"),
    ("Cannot determine the answer", "Z"),
    ("A cat sits there", "A"), ("A cat sits there now", "B"),   # three words follow the A, or four
    ("a cat" + " " * 37, "B"), ("a cat" + " " * 38, None),      # twice as long as all options, more
    ("The answer is b", "B"), ("E", None), ("I see a cat, " + "no, " * 20, None),
    ("A. dog or B. cat, the answer is **B**", "B")])
def test_can_infer(text, letter):
    assert can_infer(text, dict(A="dog", B="cat", C="cow on the road")) == letter


@pytest.mark.parametrize("text, gold, right", [
    ("3,429.004", "3429", True), ("3.429", "3.43", True), ("x = 5", "5", True),
    ("1e3", "1000", True), ("-.5", "-0.5", True), ("e", "E", True), ("the e", "e", True),
    ("eel", "e", False), ("", "x", False), ("It is so. Is it?", "so", False),
    ("the final answer is 7 cats", "7", True), ("inf", "inf", True), ("nan", "nan", False),
    ("So it is\nTampa", "tampa", False), ("It is\nthe result Tampa", "tampa", True),
    ("1 000", "1000", False), ("20,00", "20", False)])
def test_mmmu_open(text, gold, right):
    assert mmmu.is_open_right(text, [gold]) == right
