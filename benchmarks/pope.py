"""POPE, on COCO: is there an object in the picture? The published number is the mean of three F1.

An answer's text up to its first period, without commas, is a no if one of its words is "No", "no"
or "not"; everything else is a yes, even "NO", "isn't" and nothing at all. In October 2023 the
official files were changed (random has 3,000 questions since, 2,910 before): answers to one set
can't be scored by the other. lmms-eval and VLMEvalKit pool all three categories, and a text without
a yes is no yes.
"""
from collections.abc import Iterator
from pathlib import Path

from benchmarks import others
from benchmarks.answers import (
    SHORT,
    Answer,
    Question,
    absent,
    expect_rows,
    join,
    picture,
    read_lines,
    warn,
)
from benchmarks.statistics import margin, percent
from core.common import UserError

FOLDER = "pope"
ANNOTATIONS = "coco"
PICTURES = "val2014/<image>"
SOURCE = ("https://github.com/RUCAIBox/POPE, commit e3e3926 (output/coco), and "
          "http://images.cocodataset.org/zips/val2014.zip")
TEMPLATE = "{question}\n" + SHORT
MAX_NEW_TOKENS = 128

FIRST_ID = dict(adversarial=0, random=10_000_000, popular=20_000_000)


def read(path: Path, category: str, **fields) -> list[dict]:
    """The lines of coco_pope_<category>.json, {"question_id", "image", "text", "label"}."""
    file = path / f"coco_pope_{category}.json"
    rows = [row for _, row in read_lines(file, "a file of POPE")]
    expect_rows(rows, file, "a file of POPE", question_id=int, text=str, **fields)
    return rows


def questions(path: Path, folder: Path) -> Iterator[Question]:
    """An id is the line's question_id (1, 2, ...), in random + 10,000,000, in popular
    + 20,000,000."""
    for category, first in FIRST_ID.items():
        for row in read(path, category, image=str):
            text = TEMPLATE.format(question=row["text"])
            image = picture(folder / "val2014", row["image"], path)
            yield Question(first + row["question_id"], text, image, part=category)


def score(path: Path, answers: list[Answer], limited: bool = False) -> tuple[float, dict]:
    """The folder coco: coco_pope_adversarial.json, _random, _popular."""
    asked = read_scored(path, {answer.id for answer in answers})
    joined = join(answers, asked, strangers=False)
    absent(asked, joined, "left out", limited)
    check_version(path, asked, joined)
    metrics, shares = {}, []
    for category in FIRST_ID:
        pairs = [(said(answer.text), asked[id][1]["label"]) for id, answer in joined.items()
                 if asked[id][0] == category]
        if not pairs:
            raise UserError(f"no answers to POPE's {category} questions; the score is the mean "
                            "over three categories")
        if ("yes", "yes") not in pairs:
            warn(f"POPE {category}: no right yes, where the official script divides by zero; its "
                 "F1 is taken as 0")
        yes_ratio = percent(word == "yes" for word, _ in pairs)
        metrics[category] = measures(pairs) | dict(yes_ratio=yes_ratio)
        shares.append([share / 3 for share in f1_shares(pairs)])
    f1 = sum(metrics[category]["f1"] for category in FIRST_ID) / 3
    accuracy = sum(metrics[category]["accuracy"] for category in FIRST_ID) / 3
    labelled = [(answer.text, asked[id][1]["label"]) for id, answer in joined.items()]
    lmms = [(others.pope_lmms_eval(text), label) for text, label in labelled]
    kit = [(others.yes_or_no_vlmevalkit(text), label) for text, label in labelled]
    return f1, dict(
        f1=f1,
        accuracy=accuracy,
        margin=margin(*shares),
        n=len(joined),
        **metrics,
        lmms_eval=measures(lmms, misses="no"),
        vlmevalkit=measures(kit))


def read_scored(path: Path, given: set[str]) -> dict[str, tuple[str, dict]]:
    """{id: (category, line)}. given: the answers' ids, which may count from 0."""
    asked = {}
    for category, first in FIRST_ID.items():
        rows = read(path, category, label=str)
        ids = [str(first + row["question_id"]) for row in rows]
        from_zero = [str(first + i) for i in range(len(rows))]
        if not given.issuperset(ids) and given.issuperset(from_zero):
            ids = from_zero                              # all of them: the same order
        asked |= {id: (category, row) for id, row in zip(ids, rows)}
    return asked


def check_version(path: Path, asked: dict, joined: dict[str, Answer]) -> None:
    """UserError for answers to the other version of POPE, a warning for the newer one."""
    for id, answer in joined.items():
        if answer.prompt is not None and asked[id][1]["text"] not in answer.prompt:
            raise UserError(f"{answer.at}: {id} is another question in {path}; use the version of "
                            "POPE that was asked")
    if sum(category == "random" for category, _ in asked.values()) == 3000:
        warn(f"{path} is POPE as of October 2023; LLaVA-1.5's numbers are of the older files "
             "(random: 2,910 questions)")


def said(text: str) -> str:
    """Yes or no, by the official script."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def measures(pairs: list[tuple], misses: str | None = None) -> dict[str, float]:
    """pairs: (said, label). misses: what has to be said for a missed yes to count in recall; None:
    anything."""
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    missed = sum(label == "yes" and word != "yes" and (misses is None or word == misses)
                 for word, label in pairs)
    precision = tp / (tp + fp) if tp else 0.0
    recall = tp / (tp + missed) if tp else 0.0
    f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
    return dict(accuracy=percent(word == label for word, label in pairs), precision=precision * 100,
                recall=recall * 100, f1=f1 * 100)


def f1_shares(pairs: list[tuple]) -> list[float]:
    """A number for every pair (said, label); their mean is F1, and their spread tells how far F1 is
    off.

    F1 = 2 TP / (yes said + yes labelled), a ratio of two means, of which this is the linear part.
    """
    hits = [2 * (word == label == "yes") for word, label in pairs]
    yes = [(word == "yes") + (label == "yes") for word, label in pairs]
    f1, mean = sum(hits) / max(sum(yes), 1), max(sum(yes), 1) / len(pairs)
    return [f1 + (hit - f1 * of) / mean for hit, of in zip(hits, yes)]
