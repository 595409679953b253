"""What scoring reads and writes: official annotations, and files of answers; and how these are
joined, by ids.

An answers file has one JSON object a line: "question_id" and "text", and "prompt" where the
official scorer joins by it. What the official scorer of a task tolerates is a warning with a count,
all else is a UserError.
"""
import ast
import csv
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from core.common import UserError


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
            raise UserError(
                f'{self.at}: no "prompt", which tells which of the questions about a picture this answers'
            )
        return self.prompt


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def expect(ok, path: Path, what: str) -> None:
    if not ok:
        raise UserError(f"{path}: not {what}")


def expect_rows(rows, path: Path, what: str, **fields) -> None:
    """Each of the rows is an object with at least these fields. fields: name = type, or types."""
    for row in rows:
        for name, kind in fields.items():
            expect(
                isinstance(row, dict) and isinstance(row.get(name), kind), path,
                f"{what}: no good {name!r} "
                f"in {str(row)[:60]}")


def are_texts(values: list) -> bool:
    return all(isinstance(value, str) for value in values)


def read_json(path: Path, kind: type, what: str):
    """A file's JSON value, which has to be of this kind and not empty."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(
            f"{path}: cannot read it ({e.strerror}); --annotations should lead to {what}") from None
    except (ValueError, RecursionError) as e:       # UnicodeDecodeError is a ValueError, too
        raise UserError(f"{path}: not valid JSON ({e})") from None
    expect(isinstance(content, kind) and content, path, what)
    return content


def read_lines(path: Path, what: str, skip_bad: bool = False) -> list[tuple[str, dict]]:
    """[(where it stands, JSON object)] of a file with one object a line. skip_bad: count and skip
    lines that aren't."""
    rows, bad = [], []
    try:
        # not splitlines(): a text may hold U+2028 as it is
        with open(path, encoding="utf-8") as file:
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
        warn(
            f"{path}: {len(bad)} lines are not JSON objects and are skipped (first: line {bad[0]})")
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


def join(answers: list[Answer], known, key=lambda answer: answer.id,
         strangers: bool = True) -> dict:
    """{key: Answer} of the answers to known questions.

    known: the questions' keys; a Counter where official data repeat some, which may then be
    answered as often (the last answer is taken). strangers: whether the official scorer tolerates
    answers to other questions.
    """
    # Counter(dict) would take its values
    known = known if isinstance(known, Counter) else Counter(list(known))
    given, joined, strange = Counter(), {}, []
    for answer in answers:
        which = key(answer)
        if which not in known:
            strange.append(answer)
            continue
        given[which] += 1
        if given[which] > known[which]:
            raise UserError(
                f"{answer.at}: {answer.id} is answered a second time; keep one of the two lines")
        joined[which] = answer
    if strange and not (strangers and joined):
        raise UserError(
            f"{strange[0].at}: no such question in the annotations: {strange[0].id} ({len(strange)} of "
            f"{len(answers)} answers have none); are these the answers to another task or version?")
    if strange:
        warn(
            f"{len(strange)} answers are ignored, the annotations don't have these questions (first: {strange[0].id}, "
            f"{strange[0].at})")
    return joined


def absent(questions, answered, consequence: str | None, limited: bool = False) -> list:
    """Complain of questions without an answer. consequence: what the official scorer does then;
    None if it stops.

    Returns the questions to go on with. limited: only a part was asked, so those with an answer,
    without complaint.
    """
    gone = [which for which in questions if which not in answered]
    if limited:
        return [which for which in questions if which in answered]
    if gone:
        first = " ".join(gone[0]) if isinstance(gone[0], tuple) else gone[0]
        some = f"{len(gone)} of {len(questions)} questions have no answer"
        if consequence is None:
            raise UserError(
                f"{some} (first: {first}); this task's score is that of all of them: answer the rest"
            )
        warn(f"{some}: {consequence} (first: {first})")
    return list(questions)


# What pandas, which reads the table for the official tools, takes for an empty cell: an option
# "None" is none.
EMPTY = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}


def mmbench_rows(path: Path, pictures: bool = False) -> list[dict]:
    """The table, mostly without its pictures (base64); index as a string, empty cells None."""
    what = "MMBench's table (mmbench_dev_20230712.tsv)"
    csv.field_size_limit(2 ** 31 - 1)                      # a picture is one field
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            expect({"index", "question", "A", "B", "C", "D"} <= set(reader.fieldnames or ()), path,
                   what)
            rows = [{key: None if str(value) in EMPTY else value for key, value in row.items()
                     if pictures or key != "image"} for row in reader]
    except OSError as e:
        raise UserError(
            f"{path}: cannot read it ({e.strerror}); --annotations should lead to {what}") from None
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: not {what} ({e})") from None
    expect(rows and all(None not in row and (row["index"] or "").isdecimal() for row in rows), path,
           what)
    return rows


def mmmu_rows(path: Path) -> dict[str, tuple]:
    """{id: (question type, answer or list of answers, list of options or None)}."""
    what = "MMMU's rows (.jsonl, .parquet) or answer_dict_val.json"
    if path.suffix == ".json":
        keys = read_json(path, dict, what)
        expect_rows(keys.values(), path, what, question_type=str, ground_truth=(str, list))
        rows = {id: (row["question_type"], row["ground_truth"], None) for id, row in keys.items()}
    else:
        listed = [row for _, row in read_lines(path, what)
                  ] if path.suffix == ".jsonl" else read_parquet(path, what)
        expect_rows(listed, path, what, id=str, question_type=str, options=(str, list),
                    answer=(str, list))
        rows = {
            row["id"]: (row["question_type"], *map(listed_in, (row["answer"], row["options"])))
            for row in listed}
        expect(len(rows) == len(listed), path, "a table where every id stands once")
        expect(all(isinstance(options, list) for _, _, options in rows.values()), path, what)
    expect(any(gold != "?" for _, gold, _ in rows.values()), path,
           "a split with answers: the test split's are hidden")
    return rows


def listed_in(value):
    """A list that was written down as a string, as a list; anything else as it is."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass
    return value


def read_parquet(path: Path, what: str,
                 columns=("id", "question_type", "options", "answer")) -> list[dict]:
    files = sorted(path.rglob("validation*.parquet")) if path.is_dir() else [path]
    expect(files and all(file.is_file() and file.suffix == ".parquet" for file in files), path,
           what)
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: .parquet needs pyarrow (pip install pyarrow); scoring takes .jsonl, too"
        ) from None
    try:
        return [
            row for file in files
            for row in pyarrow.parquet.read_table(file, columns=list(columns)).to_pylist()]
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: not {what} ({str(e).splitlines()[0]})") from None


def mme_task(path: Path, task: str) -> dict[tuple[str, str], str]:
    """{(picture, question): "yes" or "no"}."""
    folder = path / task / "questions_answers_YN"
    folder = folder if folder.is_dir() else path / task
    files, truth = sorted(folder.glob("*.txt")), {}
    if not files:
        raise UserError(
            f"{folder}: no questions here; --annotations should lead to MME_Benchmark_release_version"
        )
    for file in files:
        cells = [
            line.strip().split("\t")
            for line in file.read_text("utf-8", "replace").strip().split("\n")]
        expect(
            len(cells) == 2 and all(len(c) == 2 and c[1].lower() in ("yes", "no") for c in cells),
            file, "two lines of MME (question, tab, Yes or No)")
        truth |= {(file.stem, question): gold.lower() for question, gold in cells}
    return truth


def write(to: Path, content) -> None:
    """Text, or a workbook, whole or not at all."""
    beside = to.with_name(to.name + ".tmp")
    try:
        beside.write_text(content, encoding="utf-8") if isinstance(content,
                                                                   str) else content.save(beside)
        os.replace(beside, to)
    except OSError as e:
        raise UserError(f"{to}: cannot write it ({e.strerror})") from None
