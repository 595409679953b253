"""What scoring reads and writes: official annotations and files of answers, joined by the questions' ids.

An answers file has one JSON object a line: "question_id" and "text", and "prompt" where the official scorer joins by
it. What the official scorer of a task tolerates is a warning with a count, all else is a UserError.
"""
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from errors import UserError


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
            raise UserError(f'{self.at}: no "prompt", which tells which of the questions about a picture this answers')
        return self.prompt


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def expect(ok, path: Path, what: str) -> None:
    if not ok:
        raise UserError(f"{path}: not {what}")


def read_json(path: Path, kind: type, what: str):
    """A file's JSON value, which has to be of this kind and not empty."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f"{path}: cannot read it ({e.strerror}); --annotations should lead to {what}") from None
    except (ValueError, RecursionError) as e:              # UnicodeDecodeError is a ValueError, too
        raise UserError(f"{path}: not valid JSON ({e})") from None
    expect(isinstance(content, kind) and content, path, what)
    return content


def read_lines(path: Path, what: str, skip_bad: bool = False) -> list[tuple[str, dict]]:
    """[(where it stands, JSON object)] of a file with one object a line. skip_bad: count and skip lines that aren't."""
    rows, bad = [], []
    try:
        with open(path, encoding="utf-8") as file:         # not splitlines(): a text may hold U+2028 as it is
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
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
        warn(f"{path}: {len(bad)} lines are not JSON objects and are skipped (first: line {bad[0]})")
    if not rows:
        raise UserError(f"{path}: nothing in it; {what} has one JSON object a line")
    return rows


def read_answers(path: Path, skip_bad: bool = False) -> list[Answer]:
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


def join(answers: list[Answer], known, strangers: str | None = "ignored", key=lambda answer: answer.id) -> dict:
    """{key: Answer} of the answers to known questions.

    known: the questions' keys; a Counter where official data repeat some, which may then be answered as often (the last
    answer is taken). strangers: what the official scorer does about answers to other questions; None if it stops.
    """
    known = known if isinstance(known, Counter) else Counter(list(known))      # Counter(dict) would take its values
    given, joined, strange = Counter(), {}, []
    for answer in answers:
        which = key(answer)
        if which not in known:
            strange.append(answer)
            continue
        given[which] += 1
        if given[which] > known[which]:
            raise UserError(f"{answer.at}: {answer.id} is answered a second time; keep one of the two lines")
        joined[which] = answer
    if strange and (strangers is None or not joined):
        raise UserError(f"{strange[0].at}: no such question in the annotations: {strange[0].id} ({len(strange)} of "
                        f"{len(answers)} answers have none); are these the answers to another task or version?")
    if strange:
        warn(f"{len(strange)} answers are to questions that the annotations don't have: {strangers} "
             f"(first: {strange[0].id}, {strange[0].at})")
    return joined


def absent(questions, answered, consequence: str | None) -> None:
    """Complain of questions without an answer. consequence: what the official scorer does then; None if it stops."""
    if gone := [which for which in questions if which not in answered]:
        first = " ".join(gone[0]) if isinstance(gone[0], tuple) else gone[0]
        some = f"{len(gone)} of {len(questions)} questions have no answer"
        if consequence is None:
            raise UserError(f"{some} (first: {first}); this task's score is that of all of them: answer the rest")
        warn(f"{some}: {consequence} (first: {first})")


def write(to: Path, content) -> None:
    """Text, or a workbook, whole or not at all."""
    beside = to.with_name(to.name + ".tmp")
    try:
        beside.write_text(content, encoding="utf-8") if isinstance(content, str) else content.save(beside)
        os.replace(beside, to)
    except OSError as e:
        raise UserError(f"{to}: cannot write it ({e.strerror})") from None
