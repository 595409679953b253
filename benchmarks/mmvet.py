"""MM-Vet: open questions with open answers, graded by GPT-4 with the official grader.

The grader matters: LLaVA-1.5-7B's 31.1 is by the GPT-4 of 2023; in 2025 the same answers are
reported to get 27.9.
"""
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks.answers import (
    Answer,
    Question,
    absent,
    are_texts,
    expect,
    expect_rows,
    is_index,
    join,
    picture,
    read_official,
)
from benchmarks.statistics import margin
from core.common import UserError, write_text

FOLDER = "mm-vet"
ANNOTATIONS = "mm-vet.json"
PICTURES = "images/<imagename>"
SOURCE = "https://github.com/yuweihao/MM-Vet (mm-vet.zip)"
TEMPLATE = "{question}"
MAX_NEW_TOKENS = 1024
SUBMISSION = ".json"

WHAT = f"MM-Vet's questions ({ANNOTATIONS})"


def read(path: Path) -> dict[str, dict]:
    """{"v1_0": {"capability": [...], ...}}."""
    rows = read_official(path, dict, WHAT)
    expect(all(id.startswith("v1_") and is_index(id[3:]) for id in rows), path, WHAT)
    expect_rows(rows.values(), path, WHAT, capability=list)
    expect(all(are_texts(row["capability"]) for row in rows.values()), path, WHAT)
    return rows


def questions(path: Path, folder: Path) -> Iterator[Question]:
    """The ids are numbers in an answers file."""
    rows = read(path)
    expect_rows(rows.values(), path, WHAT, question=str, imagename=str)
    for id, row in rows.items():
        text = TEMPLATE.format(question=row["question"])
        image = picture(folder / "images", row["imagename"], path)
        yield Question(int(id.removeprefix("v1_")), text, image)


def score(path: Path, answers: list[Answer], limited: bool = False) -> tuple[None, dict]:
    """None: the answers have to be graded first, see `submit` and `score_grades`."""
    return None, {}


def submit(path: Path, answers: list[Answer], to: Path) -> str:
    """{"v1_0": text, ...}: what the official grader reads."""
    ids = [id.removeprefix("v1_") for id in read(path)]
    joined = join(answers, ids)
    absent(ids, joined, None)
    texts = {f"v1_{id}": answer.text for id, answer in joined.items()}
    write_text(to, json.dumps(texts, indent=2))
    return ("grade it with MM-Vet's mm-vet_evaluator (github.com/yuweihao/MM-Vet), then score with "
            "--grades")


def score_grades(path: Path, grades: Path) -> tuple[float, dict]:
    """What the official grader wrote, {"v1_0": {"score": [a number in 0..1 a run]}}, as numbers.

    Means in percent, of all questions, of those with a capability, and of those with exactly a set
    of them; the mean over runs, rounded to one decimal as officially.
    """
    rows = read(path)
    scores = read_grades(grades, path, rows)
    n_runs = len(next(iter(scores.values())))
    sets, single = defaultdict(set), defaultdict(set)
    for id, row in rows.items():
        sets["_".join(sorted(set(row["capability"])))].add(id)
        for capability in row["capability"]:
            single[capability].add(id)

    def mean(those):                         # over questions, then over runs; rounded as numpy does
        runs = []
        for i in range(n_runs):
            runs.append(sum(scores[id][i] for id in scores if id in those) / len(those) * 100)
        return round(sum(runs) / n_runs * 10) / 10

    return mean(rows), dict(
        total=mean(rows),
        **{name: mean(single[name]) for name in sorted(single)},
        margin=margin([sum(scores[id]) / n_runs for id in rows]),
        n=len(rows),
        runs=n_runs,
        sets={name: mean(sets[name]) for name in sorted(sets)})


def read_grades(grades: Path, path: Path, rows: dict[str, dict]) -> dict[str, list]:
    """{id: its scores, one a run} of all questions of path."""
    what = "grades of MM-Vet's official grader"
    given = read_official(grades, dict, what)
    if unknown := sorted(given.keys() - rows.keys()):
        raise UserError(f"{grades}: {unknown[0]} is not a question of {path}")
    absent(rows, given, None)
    expect_rows(given.values(), grades, what, score=list)
    scores = {id: grade["score"] for id, grade in given.items()}
    lengths = {len(runs) for runs in scores.values()}
    expect(len(lengths) == 1 and min(lengths) > 0, grades,
           f"{what}: each question needs as many runs")
    numbers = [number for runs in scores.values() for number in runs]
    expect(all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in numbers), grades, what)
    return scores
