"""VizWiz-VQA: blind people's questions about their own pictures. Scored on val; LLaVA's number is
of test, whose answers are hidden: it is uploaded.

LLaVA uploads `evalai` of the answers. The official scorer normalises the upload once more, by `vqa`
with its own table, and the humans' answers not at all: "joe's", uploaded as "joe 's", misses
"joe's", and "2" misses "two". lmms-eval normalises both sides by `evalai`, and this is the number
most papers give for val.
"""
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks import others
from benchmarks.answers import (
    SHORT,
    Answer,
    Question,
    absent,
    expect,
    expect_rows,
    join,
    picture,
    read_official,
)
from benchmarks.normalise import CONTRACTIONS_VIZWIZ, evalai, vqa, vqa_accuracy
from benchmarks.statistics import margin, percent
from core.common import write_text

FOLDER = "vizwiz"
ANNOTATIONS = "val.json"
PICTURES = "val/<image>"
SOURCE = "https://vizwiz.org/tasks-and-datasets/vqa (Annotations.zip, val.zip, test.zip)"
TEMPLATE = ("{question}\nWhen the provided information is insufficient, respond with "
            "'Unanswerable'.\n" + SHORT)
MAX_NEW_TOKENS = 128
SUBMISSION = ".json"

WHAT = "VizWiz's annotations (val.json or test.json)"


def read(path: Path) -> list[dict]:
    """[{"image", "question", ...}]; an id is a place in the list."""
    rows = read_official(path, list, WHAT)
    expect_rows(rows, path, WHAT, image=str, question=str)
    return rows


def questions(path: Path, folder: Path) -> Iterator[Question]:
    """val.json; with --annotations .../test.json the test split, whose pictures lie in test/."""
    for i, row in enumerate(read(path)):
        text = TEMPLATE.format(question=row["question"].capitalize())
        yield Question(i, text, picture(folder / path.stem, row["image"], path))


def score(path: Path, answers: list[Answer], limited: bool = False) -> tuple[float | None, dict]:
    """[{"answers": [{"answer"} of ten], "answer_type", ...}]; None where there are no answers."""
    rows, texts = zip(*uploaded(path, answers, limited))
    if not any("answers" in row for row in rows):
        return None, {}
    what = "VizWiz's val.json"
    expect_rows(rows, path, what, answers=list, answer_type=str)
    expect(all(row["answers"] for row in rows), path, f"{what}: a question without answers")
    expect_rows((human for row in rows for human in row["answers"]), path, what, answer=str)
    right, lmms, types = [], [], defaultdict(list)
    for row, text in zip(rows, texts):
        humans = [human["answer"] for human in row["answers"]]
        right.append(vqa_accuracy(vqa(text, CONTRACTIONS_VIZWIZ), humans))
        lmms.append(others.vizwiz_lmms_eval(text, humans))
        types[row["answer_type"]].append(right[-1])
    return rounded(right), dict(
        vizwiz_official=rounded(right),
        vizwiz_lmms=percent(lmms),
        margin=margin(right),
        n=len(rows),
        answer_type={kind: rounded(types[kind]) for kind in sorted(types)})


def rounded(scores: list[float]) -> float:
    """In percent, rounded as the official scorer does."""
    return round(100 * sum(scores) / len(scores), 2)


def uploaded(path: Path, answers: list[Answer], limited: bool = False) -> list[tuple[dict, str]]:
    """(record, normalised answer) of each record. The official server wants them all."""
    rows = read(path)
    ids = [str(i) for i in range(len(rows))]
    joined = join(answers, ids)
    return [(rows[int(id)], evalai(joined[id].text)) for id in absent(ids, joined, None, limited)]


def submit(path: Path, answers: list[Answer], to: Path) -> str:
    """[{"image", "answer"}]: normalised answers, in the annotations' order."""
    up = [dict(image=row["image"], answer=text) for row, text in uploaded(path, answers)]
    write_text(to, json.dumps(up))
    return "upload it to eval.ai, challenge 2185 (VizWiz VQA)"
