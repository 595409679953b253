"""All questions of a benchmark. Everything is read and every picture looked for before a model is
loaded; what is missing is said with its source."""
import os
from collections import Counter
from pathlib import Path

from benchmarks import ASKED, TASKS
from benchmarks.answers import Question
from core.common import UserError
from core.pictures import survey
from core.records import encodable


def annotations(task: str, data: Path) -> Path:
    """The official file or folder, as `--score` takes it. data: --data, with the benchmarks."""
    return data / TASKS[task].FOLDER / TASKS[task].ANNOTATIONS


def questions(task: str, data: Path, path: Path, limit: int = 0, **how) -> list[Question]:
    """All questions, or `limit` units of each part. UserError if the annotations or a picture are
    missing or wrong.

    path: the annotations. data: the folder that holds the benchmarks, for the pictures. how: for
    the task's own `questions`.
    """
    here = ASKED[task]
    folder = data / here.FOLDER
    if not path.exists():
        raise UserError(f"{path}: not there; {task} has its annotations here, and its pictures: "
                        f"{folder}/{here.PICTURES}; from {here.SOURCE}")
    asked = list(here.questions(path, folder, **how))
    if not asked:
        raise UserError(f"{path}: holds no questions of {task}")
    if limit:
        asked = first_units(asked, limit)
    for question in asked:
        if not encodable(question.text):
            raise UserError(f"{path}: the text of {question.id} isn't valid Unicode")
    files = [question.image for question in asked if isinstance(question.image, Path)]
    gone = [file for file in files if not os.path.isfile(file)]
    if gone:
        raise UserError(f"{gone[0]}: this picture of {task} is missing, with {len(gone) - 1} "
                        f"others of {len(files)}; from {here.SOURCE}")
    return asked


def look(asked: list[Question], path: Path, part: slice = slice(None)) -> Counter:
    """What there is to note about the pictures (core/pictures.py), each kind with its count.

    UserError if one can't be read, as far as that can be told without decoding it: a file that was
    cut is found. 0.2 ms a picture. path: the annotations. part: which pictures to look at.
    """
    first = {}                           # picture -> the first question about it
    for question in asked:
        if question.image is not None:
            first.setdefault(question.image, question)
    notes, faults = survey(list(first)[part])
    for image, why in faults.items():
        others = f", nor can {len(faults) - 1} others of {len(first)}" if len(faults) > 1 else ""
        raise UserError(f"{path}: the picture of {first[image].id} can't be read ({why}){others}; "
                        "get it again")
    return notes


def first_units(asked: list[Question], limit: int) -> list[Question]:
    """The questions of the first `limit` units of each part."""
    kept, taken = [], Counter()
    seen = set()                         # units that are kept
    for i, question in enumerate(asked):
        unit = question.part, i if question.unit is None else question.unit
        if unit not in seen and taken[question.part] < limit:
            taken[question.part] += 1
            seen.add(unit)
        if unit in seen:
            kept.append(question)
    return kept
