"""A file of one's own questions about one's own pictures, a line of json each (sample.py
--questions).

    {"image": "a.png", "question": "What is this?", "question_id": "17"}
"""
import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.answers import read_lines
from core.common import UserError
from core.records import encodable, inside


@dataclass
class Question:
    """A line of --questions."""
    id: str | int
    text: str
    image: Path | None              # its file
    at: str                         # where it stands, for messages


def read_questions(file: Path, images: Path | None) -> list[Question]:
    """All of a file's. images: the folder of their pictures; None: the file's own.

    UserError for a line that isn't one, for a path out of that folder, and if none of the pictures
    is there. That some aren't shows when it is their turn.
    """
    folder = file.parent if images is None else images
    asked = [question(at, row, folder) for at, row in read_lines(file, "a file of questions")]
    named = [q.image for q in asked if q.image is not None]
    if named and not any(os.path.isfile(path) for path in named):
        raise UserError(f"{file}: none of its pictures is there; first: {named[0]} (--images DIR "
                        "says which folder they are relative to)")
    return asked


def question(at: str, row: dict, folder: Path) -> Question:
    """A line of a file of questions. at: which, "FILE: line 3"."""
    text = next((row[key] for key in ("question", "prompt", "text") if key in row), None)
    id = row.get("question_id", int(at.rpartition(" ")[2]))
    if not isinstance(text, str) or not text.strip() or not encodable(text):
        raise UserError(f'{at}: no "question" that is a text')
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise UserError(f'{at}: "question_id" isn\'t a string or a whole number')
    if "image" not in row:
        raise UserError(f'{at}: no "image" (null asks without a picture)')
    image = row["image"] or None
    if isinstance(image, list) and len(image) > 1:
        raise UserError(f'{at}: {len(image)} pictures; the model takes one picture a question')
    image = image[0] if isinstance(image, list) else image
    if image is not None and (not isinstance(image, str) or "\0" in image):
        raise UserError(f'{at}: "image" isn\'t the path of a picture')
    if image is not None and not inside(image):
        raise UserError(f"{at}: {image!r} leads out of {folder}, the folder of the pictures; give "
                        "another as --images")
    return Question(id, text, None if image is None else folder / os.path.normpath(image), at)
