"""All questions of a benchmark. Everything is read and every picture looked for before a model is
loaded; what is missing is said with its source."""
import io
from collections import Counter
from pathlib import Path

from PIL import Image

from benchmarks import TASKS
from benchmarks.answers import Question
from core.common import UserError


def annotations(task: str, data: Path) -> Path:
    """The official file or folder, as `--score` takes it. data: --data, with the benchmarks."""
    return data / TASKS[task].FOLDER / TASKS[task].ANNOTATIONS


def questions(task: str, data: Path, path: Path, limit: int = 0) -> list[Question]:
    """All questions, or `limit` units of each part. UserError if the annotations or a picture are
    missing or wrong.

    path: the annotations. data: the folder that holds the benchmarks, for the pictures.
    """
    here = TASKS[task]
    folder = data / here.FOLDER
    if not path.exists():
        raise UserError(f"{path}: not there; {task} has its annotations here, and its pictures: "
                        f"{folder}/{here.PICTURES}; from {here.SOURCE}")
    asked = list(here.questions(path, folder))
    if not asked:
        raise UserError(f"{path}: holds no questions of {task}")
    if limit:
        asked = first_units(asked, limit)
    for question in asked:
        if isinstance(question.image, bytes):
            check_header(question, path)
    files = [question.image for question in asked if isinstance(question.image, Path)]
    gone = [file for file in files if not file.is_file()]
    if gone:
        raise UserError(f"{gone[0]}: this picture of {task} is missing, with {len(gone) - 1} "
                        f"others of {len(files)}; from {here.SOURCE}")
    return asked


def check_header(question: Question, path: Path) -> None:
    """UserError if the bytes of a question's picture are none."""
    try:
        Image.open(io.BytesIO(question.image)).close()
    except Exception:                    # on bad bytes Pillow raises all sorts of things
        raise UserError(f"{path}: the picture of {question.id} can't be read") from None


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
