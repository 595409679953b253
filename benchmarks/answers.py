"""What every benchmark's file is written with: questions to ask, answers given, official files, and
how the answers are joined to the official questions, by ids.

An answers file has one JSON object a line: "question_id" and "text", and "prompt" where the
official scorer joins by it. What the official scorer of a task tolerates is a warning with a count,
all else is a UserError.
"""
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from core.common import UserError, deep, read_json
from core.flags import shown
from core.records import inside

SHORT = "Answer the question using a single word or phrase."       # LLaVA's two instructions
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass
class Question:
    """id, prompt: as they stand in an answers file. text: the user's words. image: a file, its
    bytes, or None.

    part, unit: --limit takes as many units of each part; what is scored together (the two questions
    about a picture of MME, the rotations of one of MMBench) is one unit. before: earlier turns,
    with their answers. strip: blanks around the question with the picture go, as in training.
    """
    id: str | int
    text: str
    image: Path | bytes | None
    part: str = ""
    unit: str | int | None = None
    slot: str = ""             # what an answers file has in front of the text
    before: tuple[tuple[str, str], ...] = ()
    holder: int = 0            # which of the turns has the picture
    strip: bool = False
    more: dict = field(default_factory=dict)      # what else stands in its answer's line

    @property
    def prompt(self) -> str:
        return self.slot + self.text


@dataclass
class Answer:
    """One line of an answers file. at: where it stands, for messages."""
    id: str
    text: str
    prompt: str | None
    at: str

    def asked(self) -> str:
        """The prompt, for the tasks whose ids don't tell which question was asked."""
        if self.prompt is None:
            raise UserError(f'{self.at}: no "prompt", which tells which of the questions about a '
                            "picture this answers")
        return self.prompt


def lettered(texts: Iterable, style: str = "{}. {}") -> str:
    """The options of a multiple choice, a line each."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return "\n".join(style.format(letter, text) for letter, text in zip(letters, texts))


# --------------------------------------------------------------------------------------------------
# Is it what it should be?

def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def expect(ok, path: Path, what: str) -> None:
    """UserError unless ok: the file isn't what it should be."""
    if not ok:
        raise UserError(f"{path}: not {what}")


def expect_rows(rows: Iterable, path: Path, what: str, **fields) -> None:
    """Each of the rows is an object with at least these fields. fields: name = type, or types."""
    for row in rows:
        for name, kind in fields.items():
            if not (isinstance(row, dict) and is_a(row.get(name), kind)):
                raise UserError(f"{path}: not {what}: no good {name!r} in {repr(row)[:60]}")


def is_a(value, kind: type | tuple) -> bool:
    """isinstance, but True and False are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def are_texts(values: Iterable) -> bool:
    return all(isinstance(value, str) for value in values)


def is_number(value) -> bool:
    """Whether it is a finite number of a size that a score can have."""
    return is_a(value, (int, float)) and abs(value) < 1e9


def is_index(text) -> bool:
    """Whether a text is the digits of a number."""
    return isinstance(text, str) and text.isdecimal() and len(text) < 19


def picture(folder: Path, name: str, path: Path) -> Path:
    """A picture's file, of a name in the annotations at path. UserError if it isn't in the
    folder."""
    if not inside(name):
        raise UserError(f"{path}: the picture {shown(name)!r} isn't the name of a file in "
                        f"{folder}; get the official file")
    return folder / name


# --------------------------------------------------------------------------------------------------
# Reading

def read_official(path: Path, kind: type, what: str):
    """An official file's JSON value: of this kind and not empty, its keys as they come."""
    content = read_json(path, kind, what, unique=False)
    expect(content, path, what)
    return content


def read_lines(path: Path, what: str, skip_bad: bool = False) -> list[tuple[str, dict]]:
    """[(where it stands, JSON object)] of a file with one object a line. Blank lines and a
    byte-order mark are no harm. skip_bad: count and skip lines that aren't objects."""
    rows, bad = [], []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):      # splitlines() would also cut at U+2028
                if not line.strip():
                    continue
                row = parse(line)
                if isinstance(row, dict):
                    rows.append((f"{path}: line {number}", row))
                else:
                    bad.append(number)
    except OSError as e:
        raise UserError(f"{path}: cannot read it ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e.reason})") from None
    if bad and not skip_bad:
        raise UserError(f"{path}: line {bad[0]} is not a JSON object; {what} has one on every line")
    if bad:
        warn(f"{path}: {len(bad)} lines are not JSON objects and are skipped (first: line "
             f"{bad[0]})")
    if not rows:
        raise UserError(f"{path}: nothing in it; {what} has one JSON object a line")
    return rows


def parse(line: str):
    """A line's JSON value, None if it has none, or one that is nested beyond reason."""
    try:
        value = json.loads(line)
        return None if deep(value) else value
    except (ValueError, RecursionError):
        return None


def read_answers(path: Path, skip_bad: bool = False) -> list[Answer]:
    """An answers file. skip_bad: as for `read_lines`."""
    answers = []
    for at, row in read_lines(path, "an answers file", skip_bad):
        id, text, prompt = (row.get(key) for key in ("question_id", "text", "prompt"))
        if not isinstance(id, (str, int)) or isinstance(id, bool):
            raise UserError(f'{at}: no "question_id" that is a string or a whole number')
        if not isinstance(text, str):
            raise UserError(f'{at}: no "text" that is a string')
        if not isinstance(prompt, str | None):
            raise UserError(f'{at}: "prompt" is not a string')
        answers.append(Answer(str(id), text, prompt, at))
    return answers


# --------------------------------------------------------------------------------------------------
# Joining

def join(answers: list[Answer], known: Iterable,
         key: Callable[[Answer], object] = lambda answer: answer.id,
         strangers: bool = True) -> dict:
    """{key: Answer} of the answers to known questions.

    known: the questions' keys; a Counter where official data repeat some, which may then be
    answered as often (the last answer is taken). strangers: whether the official scorer tolerates
    answers to other questions.
    """
    if not isinstance(known, Counter):
        known = Counter(list(known))                     # Counter(dict) would take its values
    given, joined, strange = Counter(), {}, []
    for answer in answers:
        which = key(answer)
        if which not in known:
            strange.append(answer)
            continue
        given[which] += 1
        if given[which] > known[which]:
            raise UserError(f"{answer.at}: {shown(answer.id)} is answered a second time; keep one "
                            "of the two lines")
        joined[which] = answer
    if strange and not (strangers and joined):
        raise UserError(f"{strange[0].at}: no such question in the annotations: "
                        f"{shown(strange[0].id)} "
                        f"({len(strange)} of {len(answers)} answers have none); are these the "
                        "answers to another task or version?")
    if strange:
        warn(f"{len(strange)} answers are ignored, the annotations don't have these questions "
             f"(first: {shown(strange[0].id)}, {strange[0].at})")
    return joined


def absent(questions: Iterable, answered: dict, consequence: str | None,
           limited: bool = False) -> list:
    """The questions to go on with, after a complaint of those that have no answer.

    consequence: what the official scorer does about these; None if it stops. limited: only a part
    was asked; without complaint the others are left out.
    """
    questions = list(questions)
    if limited:
        return [which for which in questions if which in answered]
    gone = [which for which in questions if which not in answered]
    if gone:
        first = " ".join(gone[0]) if isinstance(gone[0], tuple) else gone[0]
        first = shown(str(first))
        some = f"{len(gone)} of {len(questions)} questions have no answer"
        if consequence is None:
            raise UserError(f"{some} (first: {first}); this task's score is that of all of them: "
                            "answer the rest")
        warn(f"{some}: {consequence} (first: {first})")
    return questions
