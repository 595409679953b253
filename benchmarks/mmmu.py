"""MMMU, validation: college questions of 30 subjects, most of them multiple choice.

A choice is read from the answer by `said_choice`; where it finds none, one is drawn at random, so
some points are luck: `without_luck` counts such answers as wrong. An open answer is right if one of
its readings, by `readings`, is.
"""
import ast
import random
import re
import string
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks.answers import (
    LETTER,
    SHORT,
    Answer,
    Question,
    absent,
    expect,
    expect_rows,
    join,
    lettered,
    read_lines,
    read_official,
)
from benchmarks.statistics import margin, percent
from core.common import UserError

FOLDER = "mmmu"
ANNOTATIONS = ""                                         # the folder itself
PICTURES = "in the rows"
SOURCE = ("https://huggingface.co/datasets/MMMU/MMMU (the subjects' folders with "
          "validation-*.parquet)")
TEMPLATE = "{question}\n{options}\n\n" + LETTER          # MMMU's own, for LLaVA: (A) instead of A.
TEMPLATE_OPEN = "{question}\n" + SHORT
MAX_NEW_TOKENS = 128

SEED = 42                      # of the draws
DOMAINS = {
    "Art and Design": ["Art", "Art_Theory", "Design", "Music"],
    "Business": ["Accounting", "Economics", "Finance", "Manage", "Marketing"],
    "Science": ["Biology", "Chemistry", "Geography", "Math", "Physics"],
    "Health and Medicine": [
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy", "Public_Health"],
    "Humanities and Social Science": ["History", "Literature", "Sociology", "Psychology"],
    "Tech and Engineering": [
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
        "Energy_and_Power", "Materials", "Mechanical_Engineering"]}


def subject_of(id: str) -> str:
    """Of validation_Art_Theory_1: Art_Theory."""
    return "_".join(id.split("_")[1:-1])


# --------------------------------------------------------------------------------------------------
# Asking

def questions(path: Path, folder: Path) -> Iterator[Question]:
    """The rows from Hugging Face; of several pictures the first is shown, as by MMMU's own script
    for LLaVA."""
    what = "MMMU's rows with their pictures (.parquet)"
    rows = read_parquet(path, what, ["id", "question_type", "options", "question", "image_1"])
    expect_rows(rows, path, what, id=str, question_type=str, options=(str, list), question=str,
                image_1=dict)
    for row in rows:
        options, image = as_list(row["options"]), row["image_1"].get("bytes")
        good = isinstance(options, list) and image and isinstance(image, bytes)
        expect(good, path, f"{what}: {row['id']} is incomplete")
        template = TEMPLATE if row["question_type"] == "multiple-choice" else TEMPLATE_OPEN
        text = template.format(question=row["question"], options=lettered(options, "({}) {}"))
        yield Question(row["id"], text, image, part=subject_of(row["id"]))


def read_parquet(path: Path, what: str, columns: list[str]) -> list[dict]:
    """The rows of a .parquet, or of all of the validation split in a folder."""
    files = sorted(path.rglob("validation*.parquet")) if path.is_dir() else [path]
    good = all(file.is_file() and file.suffix == ".parquet" for file in files)
    expect(files and good, path, what)
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: .parquet needs pyarrow (pip install pyarrow); scoring takes "
                        ".jsonl, too") from None
    rows = []
    try:
        for file in files:
            rows += pyarrow.parquet.read_table(file, columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: not {what} ({str(e).splitlines()[0]})") from None
    return rows


def as_list(value):
    """A list that was written down as a string, as a list; anything else as it is."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return value


# --------------------------------------------------------------------------------------------------
# Scoring

def score(path: Path, answers: list[Answer], limited: bool = False) -> tuple[float, dict]:
    """See `read_scored` for the files. answer_dict_val.json has no options, so nothing can be read
    or drawn: a choice has to be the bare letter. The draws depend on the order, which is that of
    the subjects' names, and within one that of the annotations."""
    rows = read_scored(path)
    subjects = {subject for those in DOMAINS.values() for subject in those}
    expect(all(subject_of(id) in subjects for id in rows), path,
           "MMMU: an id without one of its subjects")
    joined = join(answers, rows, strangers=False)
    absent(rows, joined, "left out", limited)
    luck = random.Random(SEED)
    right, sure = defaultdict(list), defaultdict(list)   # subject -> right, with and without luck
    answered = [id for id in rows if id in joined]
    for id in sorted(answered, key=subject_of):          # stable: in order within a subject
        kind, gold, options = rows[id]
        with_luck, without = judge(joined[id].text, kind, gold, options, luck)
        right[subject_of(id)].append(with_luck)
        sure[subject_of(id)].append(without)

    def overall(those, subjects):             # the official arithmetic, for the last digit
        parts = [(sum(those[s]) / len(those[s]), len(those[s])) for s in subjects if s in those]
        return sum(accuracy * n for accuracy, n in parts) / sum(n for _, n in parts) * 100

    return overall(right, right), dict(
        overall=overall(right, right),
        without_luck=overall(sure, sure),
        margin=margin([ok for those in right.values() for ok in those]),
        n=len(joined),
        domain={domain: overall(right, those) for domain, those in DOMAINS.items()
                if set(those) & set(right)},
        subject={subject: percent(right[subject]) for subject in right})


def read_scored(path: Path) -> dict[str, tuple]:
    """{id: (question type, answer or list of answers, list of options or None)}.

    Of the rows from Hugging Face (.jsonl, .parquet, or the folder of the subjects' .parquet; "id",
    "question_type", "options", a list, or a string that holds one, and "answer"), or of
    answer_dict_val.json.
    """
    what = "MMMU's rows (.jsonl, .parquet) or answer_dict_val.json"
    if path.suffix == ".json":
        keys = read_official(path, dict, what)
        expect_rows(keys.values(), path, what, question_type=str, ground_truth=(str, list))
        rows = {id: (row["question_type"], row["ground_truth"], None) for id, row in keys.items()}
    else:
        if path.suffix == ".jsonl":
            listed = [row for _, row in read_lines(path, what)]
        else:
            listed = read_parquet(path, what, ["id", "question_type", "options", "answer"])
        expect_rows(listed, path, what, id=str, question_type=str, options=(str, list),
                    answer=(str, list))
        rows = {row["id"]: (row["question_type"], as_list(row["answer"]), as_list(row["options"]))
                for row in listed}
        expect(len(rows) == len(listed), path, "a table where every id stands once")
        good = all(isinstance(options, list) and len(options) <= 26
                   and (options or kind != "multiple-choice") for kind, _, options in rows.values())
        expect(good, path, f"{what}: a question's options")
    expect(any(gold != "?" for _, gold, _ in rows.values()), path,
           "a split with answers: the test split's are hidden")
    return rows


def judge(text: str, kind: str, gold: str | list, options: list | None,
          luck: random.Random) -> tuple[bool, bool]:
    """Whether an answer is right, with and without the luck of a draw."""
    gold = gold if isinstance(gold, list) else [gold]
    if kind != "multiple-choice":
        right = is_open_right(text, gold)
        return right, right
    found = text if options is None else said_choice(text, options)
    taken = found
    if options is not None and not found:
        taken = luck.choice(string.ascii_uppercase[:len(options)])
    return taken in gold, found in gold


def said_choice(text: str, options: list[str]) -> str | None:
    """The letter in brackets, else alone between spaces, else (of six words or more) the option
    that is quoted.

    Of several the one that comes last. Capitals only.
    """
    for mark in ",.!?;:'":                  # each once, one after the other: "B.'" keeps its period
        text = text.strip(mark)
    text = f" {text} "
    letters = string.ascii_uppercase[:len(options)]
    tries = [(text, {x: f"({x})" for x in letters}), (text, {x: f" {x} " for x in letters})]
    if len(text.split()) > 5:
        quoted = {x: str(option).lower() for x, option in zip(letters, options)}
        tries.append((text.lower(), quoted))
    for where, wanted in tries:
        if found := [x for x in letters if wanted[x] in where]:
            return max(found, key=lambda x: where.rfind(wanted[x]))
    return None


SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b",                                        # 1,000
           r"-?\d+(?:\.\d+)?[eE][+-]?\d+",                                     # 1e3
           r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")             # 3.5


def readings(text: str) -> set[str | float]:
    """What an open answer may have meant: the ends of its lines after words like "is", or all of
    it, and the numbers in these, rounded to two decimals."""
    text = text.strip().strip(".").lower()
    kept, lines = [], text.split("\n")
    for i, line in enumerate(lines):
        last = i == len(lines) - 1
        shortest = ""
        for sign in SIGNS + ("=",) * last:
            if sign in line:
                tail = line.split(sign)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in tuple(":,.!?;'"):
            kept.append(shortest)
    kept = kept or [text]
    numbers = [number for part in kept for pattern in NUMBERS
               for number in re.findall(pattern, part)]
    return {value for part in kept + numbers for value in normal(part)}


def normal(text: str) -> list[str | float]:
    """A number, or the text in lower case; a single letter only next to a space, or every "e" would
    hold an e."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def is_open_right(text: str, gold: list) -> bool:
    """A reading that is text is right if it holds a right answer, a number if it is one."""
    golds = [value for answer in gold for value in normal(str(answer))]
    for said in readings(text):
        if isinstance(said, str):
            if any(isinstance(value, str) and value in said for value in golds):
                return True
        elif said in golds:
            return True
    return False
