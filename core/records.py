"""LLaVA's json, read and checked: records of conversations, mostly about one picture.

    {"id": "17", "image": "coco/train2017/000000000017.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

`read_records` also takes what other tools write instead (`tidy`). What isn't LLaVA's format is an
error that names file, record and fault. What is, but can't be learnt from (an empty answer, say),
is left out by whoever reads a whole file, and counted.
"""
import hashlib
import json
import os
import re
from pathlib import Path

from core.common import UserError

# How a record's text says where the picture goes. What a user types is never read this way.
SLOT = "<image>"

Turns = list[tuple[str, str | None]]         # [(question, answer)]; the last answer may be None


def read_records(file: Path, root: Path | None = None) -> tuple[list, str]:
    """The records of a json, each made `tidy`, and the file's sha256.

    A list of records, or json lines: one record a line. root: the folder of the pictures. UserError
    if it is neither.
    """
    try:
        content = file.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        content = content.decode("utf-8-sig")            # the bytes go before the records come
        records = _lines(content) if content.lstrip()[:1] == "{" else json.loads(content)
    except OSError as e:
        raise UserError(f"can't read {file}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:            # UnicodeDecodeError is a ValueError, too
        raise UserError(f"{file} is not JSON: {e}") from None
    if not isinstance(records, list):
        raise UserError(f"{file} is not LLaVA's format: it should be a list of records")
    if not records:
        raise UserError(f"{file} is not LLaVA's format: there is no record in it")
    return [tidy(record, root) for record in records], sha256


def _lines(content: str):
    """Json lines as a list. Content that is one object over several lines is that object."""
    try:
        value = json.loads(content)
        return [value] if "conversations" in value else value
    except ValueError:
        pass
    records = []
    for number, line in enumerate(content.split("\n"), 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError as e:
            raise ValueError(f"line {number}: {e}") from None
    return records


def tidy(record, root: Path | None = None):
    """A record as LLaVA writes it, of what other tools write.

    "image": null, "" or [] is no picture, unless a human turn has its slot; ["a.png"] is "a.png";
    a path that begins with root, the folder of the pictures, is relative to it.
    """
    if not isinstance(record, dict) or "image" not in record:
        return record
    image = record["image"]
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if image is None or image == "" or image == []:
        slot = SLOT in json.dumps(record.get("conversations"))
        return record if slot else {key: x for key, x in record.items() if key != "image"}
    if isinstance(image, str) and root is not None and os.path.isabs(image):
        folder = os.path.abspath(root)
        if os.path.normpath(image).startswith(folder + os.sep):
            image = os.path.relpath(image, folder)
    return {**record, "image": image}


def check(record: dict, where: str = "record", template: str = "v1") -> tuple[Turns, int | None]:
    """The turns of a record, and which of them holds the picture (None: text only).

    The slot is already gone from that turn's question; the last answer is None if the record ends
    with a question. As in LLaVA a leading turn of the assistant is dropped, unknown keys are
    tolerated, and without an "image" key "<image>" is text like any other. Whatever else isn't
    LLaVA's format is a UserError naming `where` and the record's id: two slots, for instance, or
    none, on which LLaVA would silently train without the picture.
    """
    where = name(record, where)
    said = _said(record, where)
    questions, answers = said[0::2], said[1::2]
    picture = None
    if "image" in record:
        picture = _holder(record["image"], questions, answers, where)
        questions[picture] = questions[picture].replace(SLOT, "")
    if template == "plain" and (picture != 0 or len(said) != 2):
        raise UserError(f'{where}: the plain template takes an "image", one human turn and one '
                        "caption")
    if len(answers) < len(questions):
        answers.append(None)
    return list(zip(questions, answers)), picture


def _said(record: dict, where: str) -> list[str]:
    """What human and gpt say in turns, the human first."""
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise UserError(f'{where}: has no list "conversations"')
    turns = record["conversations"]
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt"):
            raise UserError(f"{where}: turn {i} isn't from human or gpt")
        if not isinstance(turn.get("value"), str):
            raise UserError(f"{where}: the value of turn {i} isn't text")
        if not encodable(turn["value"]):
            raise UserError(f"{where}: the value of turn {i} isn't valid Unicode")
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    if not turns:
        raise UserError(f"{where}: the human says nothing")
    if any(turn["from"] != ("human", "gpt")[i % 2] for i, turn in enumerate(turns)):
        raise UserError(f"{where}: human and gpt don't take turns")
    return [turn["value"] for turn in turns]


def _holder(path: str, questions: list[str], answers: list[str], where: str) -> int:
    """Which question holds the picture's slot."""
    if not isinstance(path, str) or not path:
        raise UserError(f'{where}: "image" isn\'t the path of one picture')
    if not inside(path):
        raise UserError(f'{where}: "image" is {path!r}, which leads out of the image folder')
    holders = [i for i, question in enumerate(questions) if SLOT in question]
    if not holders:
        raise UserError(f"{where}: it names a picture, but no human turn says {SLOT}")
    if sum(text.count(SLOT) for text in questions + answers) > 1:
        raise UserError(f"{where}: more than one {SLOT}")
    return holders[0]


def name(record: dict, where: str) -> str:
    """`where`, and the id which the record gives itself."""
    if isinstance(record, dict) and "id" in record:
        return f"{where} (id {str(record['id'])[:60]!r})"
    return where


def encodable(text: str) -> bool:
    """json can spell half of a surrogate pair, which no tokenizer can read."""
    return text.isascii() or re.search("[\ud800-\udfff]", text) is None


def inside(path: str) -> bool:
    """Whether a path stays in the folder it is relative to, on any system: "\\" parts names, too,
    C: and control characters are in none. Links in that folder may lead out: its owner made
    them."""
    names, depth = re.split(r"[/\\]", path), 0
    if names[0] == "" or re.match(r"[A-Za-z]:[/\\]", path) or re.search(r"[\x00-\x1f\x7f]", path):
        return False
    for name in names:
        if len(name) > 2 and not name.strip(" ."):       # Windows takes "... " for ".", or for ".."
            return False
        depth += (name not in ("", ".", "..")) - (name == "..")
        if depth < 0:
            return False
    return True


def lacks(turns: Turns, picture: int | None) -> str | None:
    """Why well-formed turns can't be learnt from, or None. `load` leaves such records out, and says
    so."""
    if turns[-1][1] is None:
        return "the last question has no answer"
    if not all(answer.strip() for _, answer in turns):
        return "an assistant turn is empty"
    if not all(question.strip() or i == picture for i, (question, _) in enumerate(turns)):
        return "a human turn is empty"
    return None
