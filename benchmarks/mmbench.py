"""MMBench-en, dev: multiple choice, every question again with its options rotated.

Circular: a question's rotations are rows of their own, at index + k * 1,000,000, and it is right if
all its rows are. (Count rows, not options: 53 questions have a row less.) Letters are found by
`can_infer`; where that finds none, the server asks a language model, and here the answer is wrong.
Plain accuracy, of each row for itself, is eight points higher. The answers of the test split are
hidden: it is uploaded.
"""
import base64
import binascii
import csv
import string
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks.answers import (
    LETTER,
    Answer,
    Question,
    absent,
    expect,
    is_index,
    join,
    lettered,
)
from benchmarks.others import can_infer
from benchmarks.statistics import by, margin, percent
from core.common import UserError, write_beside

FOLDER = "mmbench"
ANNOTATIONS = "mmbench_dev_20230712.tsv"
PICTURES = "in the table"
SOURCE = f"https://download.openmmlab.com/mmclassification/datasets/mmbench/{ANNOTATIONS}"
TEMPLATE = "{hint}{question}\n{options}\n" + LETTER      # hint: a line, or nothing
MAX_NEW_TOKENS = 1024
SUBMISSION = ".xlsx"

WHAT = f"MMBench's table ({ANNOTATIONS})"
UNROTATED = 10 ** 6            # questions have indices below this

# What pandas, which reads the table for the official tools, takes for an empty cell: an option
# "None" is none.
EMPTY = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
         "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}


def read(path: Path, pictures: bool = False) -> list[dict]:
    """The table, mostly without its pictures (base64); index as a string, empty cells None."""
    csv.field_size_limit(2 ** 31 - 1)                    # a picture is one field
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            columns = set(reader.fieldnames or ())
            expect({"index", "question", "A", "B", "C", "D"} <= columns, path, WHAT)
            rows = [{key: None if str(value) in EMPTY else value for key, value in row.items()
                     if pictures or key != "image"} for row in reader]
    except OSError as e:
        raise UserError(f"{path}: cannot read it ({e.strerror}); it should be {WHAT}") from None
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: not {WHAT} ({e})") from None
    good = all(None not in row and is_index(row["index"]) for row in rows)
    expect(rows and good, path, WHAT)
    return rows


def questions(path: Path, folder: Path) -> Iterator[Question]:
    """Every row is asked, so a question with each of its rotations. (Newer tables hold a picture
    once, and the row's index where it comes again.)"""
    rows = read(path, pictures=True)
    pictures = {row["index"]: row.get("image") for row in rows}
    for row in rows:
        image = pictures[row["index"]]
        image = pictures.get(image, image)
        expect(filled(image) and filled(row["question"]), path,
               f"MMBench's table: row {row['index']} is incomplete")
        try:
            image = base64.b64decode(image)
        except (binascii.Error, ValueError):
            raise UserError(f"{path}: the picture of row {row['index']} is not base64") from None
        texts = []
        for letter in "ABCD":
            if not filled(row[letter]):
                break
            texts.append(row[letter])
        hint = row["hint"] + "\n" if filled(row.get("hint")) else ""
        text = TEMPLATE.format(hint=hint, question=row["question"], options=lettered(texts))
        yield Question(int(row["index"]), text, image, unit=question_of(row))


def filled(cell: str | None) -> bool:
    return cell is not None and cell.lower() not in ("nan", "none")


def question_of(row: dict) -> int:
    """The index of the question that a row is a rotation of."""
    return int(row["index"]) % UNROTATED


def score(path: Path, answers: list[Answer], limited: bool = False) -> tuple[float | None, dict]:
    """Columns index, question, A, B, C, D, answer, category, l2-category, ...; None where there are
    no answers."""
    rows = read(path)
    ids = [row["index"] for row in rows]
    joined = join(answers, ids)
    kept = set(absent(ids, joined, "wrong", limited))
    rows = [row for row in rows if row["index"] in kept]
    if not any(row.get("answer") for row in rows):
        return None, {}
    expect(all(row["answer"] for row in rows), path,
           "a table with an answer in every row, or in none")
    inferred, bare = {}, {}                              # index -> right, by either reading
    for row in rows:
        text = joined[row["index"]].text if row["index"] in joined else None
        options = {x: row[x] for x in string.ascii_uppercase if row.get(x) is not None}
        inferred[row["index"]] = text is not None and can_infer(text, options) == row["answer"]
        bare[row["index"]] = text == row["answer"]
    base = [row for row in rows if int(row["index"]) < UNROTATED]
    expect(base, path, "a table with MMBench's unrotated questions")
    groups = defaultdict(list)
    for row in rows:
        groups[question_of(row)].append(row["index"])

    def circular(right: dict) -> list[bool]:
        return [all(right[i] for i in groups[int(row["index"])]) for row in base]

    def plain(right: dict) -> float:
        return percent(right[row["index"]] for row in base)

    circle = circular(inferred)
    metrics = dict(circular=percent(circle), plain_base=plain(inferred),
                   plain_all=percent(inferred.values()), margin=margin(circle), n=len(base),
                   n_rows=len(rows))
    for column in ("category", "l2-category"):
        if column in rows[0]:
            metrics[column] = by([str(row[column]) for row in base], circle)
    metrics["bare_letters"] = dict(circular=percent(circular(bare)),
                                   plain_all=percent(bare.values()), plain_base=plain(bare))
    return metrics["circular"], metrics


def submit(path: Path, answers: list[Answer], to: Path) -> str:
    """The table without hint, category, source, image, comment, l2-category, and the raw answers as
    seventh column."""
    rows = read(path)
    joined = join(answers, [row["index"] for row in rows])
    try:
        from openpyxl import Workbook
        from openpyxl.utils.exceptions import IllegalCharacterError
    except ImportError:
        raise UserError("MMBench's upload is an .xlsx file, which needs openpyxl (pip install "
                        "openpyxl)") from None
    dropped = ("hint", "category", "source", "comment", "l2-category")
    columns = [column for column in rows[0] if column not in dropped]
    columns.insert(6, "prediction")
    book = Workbook()
    book.active.append(columns)
    for row in rows:
        text = joined[row["index"]].text if row["index"] in joined else None
        filled_in = row | {"index": int(row["index"]), "prediction": text}
        try:
            cells = [filled_in[column] for column in columns]
            str(text).encode()                           # half a surrogate pair
            book.active.append(cells)
        except (IllegalCharacterError, UnicodeEncodeError):
            raise UserError(f"{to}: .xlsx can't hold a control character of question "
                            f"{row['index']}") from None
    write_beside(to, book.save)
    return ("upload it to MMBench's server (mmbench.opencompass.org.cn), which has a language "
            "model read unclear answers")
