"""Plausible misreadings of the rules, each of which the cases tell from the right one."""
import random
import re
import string

import pytest

from benchmarks import mmbench, mme, mmmu, normalise, pope, scienceqa, textvqa, vizwiz
from benchmarks.others import can_infer, yes_or_no_vlmevalkit
from tests.benchmarks.cases import EXPECTED, GQA, MMBENCH, SEED, SQA, run


def first_letter(text, *_):
    return next((x for x in text.upper() if x in "ABCDE"), None)


def first_word(text, options):
    return next((x for x in options if x in re.findall(r"\w+", text)), None)


def by_words(text, *_):
    return "no" if "no" in re.findall("[a-z]+", text.lower()) else "yes"


def pope_rule(split, noes):
    return lambda text: "no" if noes & set(split(text)) else "yes"


def drawn_when_failed(text):
    return SAID_LETTER(text) or random.Random(0).choice("AB")


def y_or_n(text):
    return dict(y="yes", n="no").get(text) or SAID_MME(text)


# Those that the misreadings below call: by then others stand in their places
SAID_LETTER, SAID_MME = scienceqa.said_letter, mme.said
CHOICE, READINGS, NORMAL = mmmu.said_choice, mmmu.readings, mmmu.normal
EVALAI, VQA = normalise.evalai, normalise.vqa
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

NOES = {"No", "no", "not"}
VARIANTS = [      # task, module, name in it, what is put there
    ("textvqa", normalise, "CONTRACTIONS", {}),
    ("textvqa", normalise, "ARTICLES", ()),
    ("textvqa", normalise, "NUMBERS", {}),
    ("textvqa", textvqa, "vqa_accuracy", lambda a, humans: min(1, humans.count(a) / 3)),
    ("textvqa", textvqa, "vqa_accuracy", lambda a, humans: float(a in humans)),
    ("textvqa", normalise, "strip_punctuation", lambda text, *_: text),
    ("textvqa", normalise, "strip_punctuation", lambda text, *_: text.translate(NO_PUNCTUATION)),
    ("textvqa", normalise, "PUNCTUATION", normalise.PUNCTUATION.replace("-", "")),
    ("textvqa", textvqa, "evalai", lambda text: text.strip().lower()),
    ("textvqa", textvqa, "evalai", lambda text: VQA(text, normalise.CONTRACTIONS)),
    ("textvqa", textvqa, "evalai", lambda text: EVALAI(text.replace("'", ""))),
    ("vizwiz", vizwiz, "evalai", lambda text: text),
    ("vizwiz", vizwiz, "evalai", lambda text: text.lower().rstrip(".")),
    ("vizwiz", normalise, "CONTRACTIONS", {}),
    ("vizwiz", normalise, "CONTRACTIONS", normalise.CONTRACTIONS_VIZWIZ),
    ("vizwiz", vizwiz, "vqa_accuracy", lambda a, humans: min(1, humans.count(a) / 3)),
    ("vizwiz", vizwiz, "vqa_accuracy",
     lambda a, humans: min(1, sum(EVALAI(human) == a for human in humans) / 3)),
    ("scienceqa", scienceqa, "said_letter", first_letter),
    ("scienceqa", scienceqa, "said_letter", lambda text: first_letter(text[:1])),
    ("scienceqa", scienceqa, "said_letter", lambda text: SAID_LETTER(text.rstrip("."))),
    ("scienceqa", scienceqa, "said_letter", lambda text: SAID_LETTER(text + ".")),
    ("scienceqa", scienceqa, "said_letter",
     lambda text: (re.findall(r"The answer is ([A-E])\.", text) or [None])[0]),
    ("scienceqa", scienceqa, "said_letter", drawn_when_failed),
    ("mmbench", mmbench, "can_infer", lambda text, options: text),
    ("mmbench", mmbench, "can_infer", first_letter),
    ("mmbench", mmbench, "can_infer", first_word),
    ("mmmu", mmmu, "said_choice", lambda text, options: CHOICE(text, options) or "A"),
    ("mmmu", mmmu, "said_choice", lambda text, options: CHOICE(text, options) or "none"),
    ("mmmu", mmmu, "said_choice", lambda text, options: CHOICE(text.upper(), options)),
    ("mmmu", mmmu, "said_choice",
     lambda text, options: first_letter(text) or CHOICE(text, options)),
    ("mmmu", mmmu, "said_choice", lambda text, options: CHOICE(text.strip(",.!?;:'"), options)),
    ("mmmu", mmmu, "said_choice", lambda text, options: CHOICE(text, ["\0"] * len(options))),
    ("mmmu", mmmu, "readings", lambda text: {text.lower()}),
    ("mmmu", mmmu, "readings", lambda text: {x for x in READINGS(text) if isinstance(x, str)}),
    ("mmmu", mmmu, "readings", lambda text: READINGS(text) | {text.lower()}),
    ("mmmu", mmmu, "normal", lambda text: [text.strip().lower()]),
    ("mmmu", mmmu, "normal",
     lambda text: [x.strip() if isinstance(x, str) else x for x in NORMAL(text)]),
    ("mmmu", mmmu, "subject_of", lambda id: "Math"),        # so the draws come in another order
    ("mme", mme, "said", lambda text: text.lower() if text.lower() in ("yes", "no") else None),
    ("mme", mme, "said", by_words),
    ("mme", mme, "said", y_or_n),
    ("mme", mme, "said", yes_or_no_vlmevalkit),
    ("mme", mme, "said", lambda text: "no" if "no" in text.lower()[:4] else "yes"),
    ("pope", pope, "said", by_words),
    ("pope", pope, "said", lambda text: "yes" if "yes" in text.lower() else "no"),
    ("pope", pope, "said",                                  # all sentences
     pope_rule(lambda text: text.replace(",", "").split(" "), NOES)),
    ("pope", pope, "said",
     pope_rule(lambda text: text.lower().split(".")[0].replace(",", "").split(" "), NOES)),
    ("pope", pope, "said",                                  # at line breaks, too
     pope_rule(lambda text: text.split(".")[0].replace(",", "").split(), NOES)),
    ("pope", pope, "said",                                  # with commas
     pope_rule(lambda text: text.split(".")[0].split(" "), NOES)),
    ("pope", pope, "said",
     pope_rule(lambda text: text.split(".")[0].replace(",", "").split(" "), {"No", "no"})),
]


@pytest.mark.parametrize("number", range(len(VARIANTS)),
                         ids=[f"{task}-{name}" for task, _, name, _ in VARIANTS])
def test_misreadings_give_another_number(number, tmp_path, monkeypatch):
    task, module, name, other = VARIANTS[number]
    monkeypatch.setattr(module, name, other)
    assert run(task, tmp_path)["primary"] != pytest.approx(EXPECTED[task][0], abs=0.005)


# --------------------------------------------------------------------------------------------------
# The rules that no function stands for: what they would give is worked out here

def share(right):
    return 100 * sum(right) / len(right)


def unlike(value, other):
    return abs(value - other) > 0.005


def test_gqa_by_other_rules(tmp_path):
    primary = run("gqa", tmp_path)["primary"]
    balanced = [(text, gold) for gold, _, counted, text in GQA if counted]
    for normal in (lambda text: text.strip().lower(), lambda text: text.removesuffix(".").lower(),
                   EVALAI, lambda text: text.rstrip("."),
                   lambda text: text.rstrip(".").lower().strip()):
        assert unlike(primary, share([normal(text) == gold for text, gold in balanced]))
    assert unlike(primary, share([t.rstrip(".").lower() == gold for gold, _, _, t in GQA]))


def test_seed_by_other_rules(tmp_path):
    primary = run("seed", tmp_path)["primary"]
    image = [(text, gold) for _, kind, gold, text in SEED if kind == "image"]
    others = [
        [text == gold for text, gold in image if text is not None],  # the missing one left out
        [(text or "").rstrip(".") == gold for text, gold in image],
        [text == gold for text, gold in image],                      # each line for its own row
        [text == gold for text, gold in image[:4] + image[5:]]]      # ids taken once
    assert all(unlike(primary, share(right)) for right in others)


def test_mmbench_by_other_rules(tmp_path):
    primary = run("mmbench", tmp_path)["primary"]
    right, counted = {}, {}
    for i, *options, gold, text in MMBENCH:
        there = {x: option for x, option in zip("ABCD", options) if option and option != "None"}
        right[i] = can_infer(text, there) == gold
        counted[i % 10 ** 6] = sum(1 for option in options if option)          # rows = options?
    assert primary != share(right.values())
    assert primary != share([right[i] for i in right if i < 10 ** 6])
    rows_right = {i: sum(right[j] for j in right if j % 10 ** 6 == i) for i in counted}
    assert primary != share([rows_right[i] == counted[i] for i in counted])


def test_scienceqa_by_other_rules(tmp_path):
    primary = run("scienceqa", tmp_path)["primary"]
    right = [(scienceqa.said_letter(text or "") == "ABCDE"[gold], seen)
             for text, gold, _, seen in SQA]
    assert primary != share([ok for ok, _ in right])
    assert primary != share([ok for ok, seen in right if seen])
