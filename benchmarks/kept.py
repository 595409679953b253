"""What an evaluation keeps in --out and takes over when it goes on: answers, a line each, and
results.json. Nobody else is trusted to have left them as they were.

    {"question_id", "prompt", "text", "place", "check"}         place: which of the questions
    {..., "text": "", "place", "damaged": why, "check"}         its picture couldn't be read
    {..., "place", "turn", "right", "kind", "check"}            of one's own exam (exam.py)

"check" is a hash of the line and of all that the answer depends on (`key_of`), so a line that was
changed, or is another model's, isn't taken for an answer. What is damaged is asked again.
"""
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from benchmarks import ASKED, TASKS
from benchmarks.answers import Question, expect, expect_rows, is_number, parse, warn
from core.common import UserError, read_json, write_text
from core.flags import shown

TOLERATED = 100                # of so many pictures one may be unread; one in any case

# of results.json: what isn't a setting
FOUND = ("model", "tasks", "seconds")


@contextmanager
def using(path: Path, verb: str = "write") -> Iterator[None]:
    """What the disk refuses is a UserError that names the file."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: cannot {verb} it ({e.strerror or e})") from e


# --------------------------------------------------------------------------------------------------
# Answers

def key_of(results: dict, task: str) -> str:
    """What the answers to a task depend on, apart from the question. results: a results.json."""
    settings = {key: value for key, value in results.items() if key not in FOUND}
    return json.dumps([task, ASKED[task].MAX_NEW_TOKENS, settings], sort_keys=True)


def write(key: str, place: int, question: Question, text: str, damaged: str | None = None) -> str:
    """The line that is kept for an answer. damaged: why there is none."""
    row = dict(question_id=question.id, prompt=question.prompt, text=text, place=place,
               **question.more)
    if damaged is not None:
        row |= dict(text="", damaged=damaged)
    check = hashlib.sha256((key + json.dumps(row)).encode()).hexdigest()[:16]
    return json.dumps(row | dict(check=check)) + "\n"


def read(out: Path, task: str, asked: list[Question], key: str) -> dict[int, dict]:
    """{place of a question: the row that answers it}, of what any number of processes wrote.
    UserError for a line that they didn't."""
    rows = {}
    for file in sorted(out.glob(f"{task}.*jsonl")):               # TASK.0.jsonl, ..., TASK.jsonl
        with using(file, "read"):
            content = file.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]                # a kill may cut the last line
        for number, line in enumerate(whole.decode("utf-8", "replace").split("\n"), 1):
            if not line.strip():
                continue
            row = parse(line)
            if wrong := fault(row, asked, key):
                as_is = f" (--score {task} scores answers as they are)" if task in TASKS else ""
                raise UserError(f"{file}: line {number} {wrong}; remove it, or choose another --out"
                                f"{as_is}")
            if row["place"] not in rows or "damaged" in rows[row["place"]]:
                rows[row["place"]] = row
    return rows


def fault(row, asked: list[Question], key: str) -> str | None:
    """Why a line isn't what `write` makes of one of these questions; None if it is."""
    if not isinstance(row, dict):
        return "is not a JSON object"
    place, text, damaged = row.get("place"), row.get("text"), row.get("damaged")
    question = asked[place] if type(place) is int and 0 <= place < len(asked) else None
    if question is None or row.get("question_id") != question.id \
            or row.get("prompt") != question.prompt:
        return "doesn't answer these questions"
    if "check" not in row:
        return 'has no "check": an older version wrote it, or somebody else'
    good = isinstance(text, str) and isinstance(damaged, str | None)
    if not good or json.dumps(row) + "\n" != write(key, place, question, text, damaged):
        return "was changed since it was written, or is of another model or other settings"
    return None


def answered(rows: dict[int, dict]) -> set[int]:
    """The places of the questions that aren't to be asked again."""
    return {place for place, row in rows.items() if "damaged" not in row}


@contextmanager
def appending(file: Path) -> Iterator[TextIO]:
    """A file to write lines to, behind those that are there. A last line that a kill cut goes."""
    with using(file):
        with open(file, "a+b") as cut:
            cut.seek(0)
            cut.truncate(cut.read().rfind(b"\n") + 1)
        with open(file, "a", encoding="utf-8") as lines:
            yield lines


def merge(out: Path, task: str, rows: dict[int, dict]) -> Path:
    """TASK.jsonl, of all rows in their order, instead of what the processes wrote."""
    merged = out / f"{task}.jsonl"
    write_text(merged, "".join(json.dumps(rows[place]) + "\n" for place in sorted(rows)))
    for part in out.glob(f"{task}.[0-9]*.jsonl"):
        with using(part, "remove"):
            part.unlink()
    return merged


# --------------------------------------------------------------------------------------------------
# Pictures that couldn't be read

def pictures(asked: list[Question]) -> set:
    """All different ones."""
    return {question.image for question in asked} - {None}


def too_many(unread: set, asked: list[Question]) -> bool:
    """Whether these are more pictures than a score can do without."""
    there = pictures(asked)
    return len(unread) > max(1, len(there) // TOLERATED) or bool(unread) and unread == there


def too_few(rows: dict[int, dict], asked: list[Question]) -> str | None:
    """Why there can be no score of these rows. Of a few unread pictures there is a warning: their
    questions count as answered by nothing."""
    places = sorted(rows.keys() - answered(rows))
    if not places:
        return None
    unread = {asked[place].image for place in places}
    why = (f"{len(unread)} of {len(pictures(asked))} pictures can't be read (first: "
           f"{rows[places[0]]['damaged']})")
    if too_many(unread, asked):
        return f"{why}; get them again, and give the same command"
    warn(f"{why}: {len(places)} questions count as answered by nothing; the same command asks them "
         "again")
    return None


# --------------------------------------------------------------------------------------------------
# results.json

def read_results(file: Path) -> dict:
    """A results.json of eval.py. UserError if it isn't one, or not any more."""
    what = "a results.json of eval.py"
    content = read_json(file, dict, what)
    expect_rows([content], file, what, tasks=dict, model=str, weights=str, limit=int)
    expect(content["tasks"].keys() <= ASKED.keys() and content["limit"] >= 0, file, what)
    for task, entry in content["tasks"].items():
        expect(is_entry(entry), file, f"{what}: no good score and interval of {task}")
    seconds = content.setdefault("seconds", {})
    good = isinstance(seconds, dict) and all(is_number(x) and x >= 0 for x in seconds.values())
    expect(good, file, f'{what}: no good "seconds"')
    return content


def is_entry(entry) -> bool:
    """Whether it has a score and its interval, or neither."""
    if not isinstance(entry, dict) or not {"score", "interval"} <= entry.keys():
        return False
    score, interval = entry["score"], entry["interval"]
    if score is None or interval is None:
        return score is None and interval is None
    pair = isinstance(interval, list) and len(interval) == 2
    return pair and all(map(is_number, [score, *interval]))


def resume(file: Path, fresh: dict) -> dict:
    """The results.json there is, or else a fresh one. UserError if it is of other settings; the
    model's folder may move."""
    if not file.exists():
        return fresh
    before = read_results(file)
    for key in before:
        if key not in fresh:
            raise UserError(f"{file} is of an evaluation with {key} {shown(str(before[key]))}, "
                            "which this one doesn't have; choose another --out")
    for key in fresh:
        if key not in before:
            raise UserError(f"{file} says nothing of {key}: an older version wrote it; choose "
                            "another --out")
        if key not in FOUND and before[key] != fresh[key]:
            raise UserError(f"{file} is of an evaluation with {key} "
                            f"{shown(str(before[key]))}, not {fresh[key]}; choose another --out")
    return fresh | {key: before[key] for key in FOUND}
