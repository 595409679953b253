"""One's own exam: a file of records in LLaVA's format, whose right answers they hold.

    {"id": "7", "image": "7.png", "kind": "colour", "conversations": [
        {"from": "human", "value": "<image>\\nWhich colour?"}, {"from": "gpt", "value": "Red"}]}

The last human turn of every record is asked (turns "last"), or each of them ("all"), in both cases
with the right answers of the turns before as history; a turn gets the picture if it stands in it or
before it. "kind" groups the questions; a turn may have one of its own. Answers are judged by
judge.py. Records without an answer, or with anything else that can't be asked, are errors.

Beside the ten it has their names, so that eval.py asks it as it asks them (benchmarks/__init__.py).
"""
import json
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.answers import Question
from benchmarks.judge import YES_NO, judge
from core.common import UserError
from core.flags import shown
from core.records import Turns, check, lacks, name, read_records

FOLDER = ANNOTATIONS = ""
PICTURES = SOURCE = "where --images says"
TEMPLATE = "{question}"
MAX_NEW_TOKENS = 1024                          # LLaVA's, of questions of one's own (model_vqa.py)

NAME = "exam"                                  # of its files in --out
TURNS = ("last", "all")


def is_file(text: str, tasks: set[str]) -> bool:
    """Whether --task names a file of records. tasks: the names that it may hold instead."""
    if not text or set(text.split(",")) <= tasks:
        return False
    return text.endswith((".json", ".jsonl")) or os.path.exists(text)


# --------------------------------------------------------------------------------------------------
# Questions

def questions(path: Path, folder: Path, turns: str = "last") -> Iterator[Question]:
    """What is asked. path: the records' file; folder: that of their pictures. UserError, with
    record and id, for one that can't be asked and judged, or whose picture isn't there."""
    records, _ = read_records(path, folder)
    read = [check(record, f"{path}: record {i}") for i, record in enumerate(records)]
    look(records, read, path)
    look_for_pictures(records, path, folder)
    for i, (record, (said, picture)) in enumerate(zip(records, read)):
        kinds = kinds_of(record, f"{path}: record {i}")
        for turn in range(len(said)) if turns == "all" else [len(said) - 1]:
            text, right = said[turn]
            text = text.strip() if turn == picture else text
            image = None
            if picture is not None and picture <= turn:
                image = folder / os.path.normpath(record["image"])
            yield Question(id_of(record, i), text, image, unit=i, before=tuple(said[:turn]),
                           holder=picture or 0, strip=True,
                           more=dict(turn=turn, right=right, kind=kinds[turn]))


def look(records: list, read: list[tuple[Turns, int | None]], path: Path) -> None:
    """UserError unless all of these records can be asked and judged. read: what `check` said."""
    faults = {}
    for i, (turns, picture) in enumerate(read):
        reason = lacks(turns, picture)
        if reason is None and not all(question.strip() for question, _ in turns):
            reason = "a human turn says nothing"
        if reason:
            faults[i] = reason
    if not faults:
        return
    first, reason = next(iter(faults.items()))
    what = f"{path}: {name(records[first], f'record {first}')}: {reason}"
    if len(faults) == len(records):
        raise UserError(f"{what}, and not one of the {len(records)} records can be asked and "
                        "judged; write the right answers into them")
    raise UserError(f"{what}; so {len(faults)} of {len(records)} records can't be asked and judged:"
                    " complete them, or leave them out")


def look_for_pictures(records: list, path: Path, folder: Path) -> None:
    """UserError if one of their pictures isn't there."""
    first = {}                                           # picture -> its first record's number
    for i, record in enumerate(records):
        if "image" in record:
            first.setdefault(os.path.normpath(record["image"]), i)
    gone = [image for image in first if not os.path.isfile(folder / image)]
    if gone:
        i = first[gone[0]]
        raise UserError(f"{path}: {name(records[i], f'record {i}')}: its picture {folder / gone[0]}"
                        f" is missing, with {len(gone) - 1} others of {len(first)} (--images DIR "
                        "says which folder they are relative to)")


def kinds_of(record: dict, where: str) -> list[str]:
    """The kind of each human turn: its own, or the record's; "" for none."""
    turns = record["conversations"]
    human = [turn for turn in turns if turn["from"] == "human"]
    kinds = [turn.get("kind") or record.get("kind") or "" for turn in human]
    for kind in kinds:
        if not isinstance(kind, str):
            raise UserError(f"{name(record, where)}: the kind {shown(str(kind))} isn't a text")
    return kinds


def id_of(record: dict, number: int) -> str | int:
    """The record's own id, or its place in the file."""
    id = record.get("id")
    return id if type(id) in (str, int) else number


# --------------------------------------------------------------------------------------------------
# Results

def entry(asked: list[Question], texts: list[str]) -> dict:
    """Its entry in results.json: metrics are `judge`'s."""
    result = judge([(text, q.more["right"], q.more["kind"]) for text, q in zip(texts, asked)])
    return dict(score=result["exact"], interval=result["intervals"]["exact"], metrics=result)


def show(result: dict, as_json: bool = False) -> None:
    """Print `judge`'s result: a table in percent, or one JSON object of shares."""
    if as_json:
        return print(json.dumps(result))
    titles = ["exact", "VQA", "yes/no", "F1"]
    print(f"{'kind':20} {'n':>7} {'majority':>9}" + "".join(f"{title:>24}" for title in titles))
    for kind, row in {**result["kinds"], "all": result}.items():
        words = row["yes_no"]
        cells = [figure(row, "exact"), figure(row, "vqa"),
                 *(figure(words, name) if words else "-" for name in ("accuracy", "f1"))]
        print(f"{shown(kind, 20):20} {row['n']:7} {row['majority']:9.1%}"
              + "".join(f"{cell:>24}" for cell in cells))
    if words := result["yes_no"]:
        print(f"{words['n']} answers are yes or no: "
              + ", ".join(f"{name} {figure(words, name)}" for name in YES_NO))
    print("right: the same text; VQA: the same but for case, articles, punctuation, number words; "
          "in [] 95% intervals")


def figure(row: dict, name: str) -> str:
    """A share in percent, with its interval; "-" for none."""
    if row[name] is None:
        return "-"
    low, high = row["intervals"][name]
    return f"{row[name]:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
