"""The command behind `eval.py --score`: numbers where the right answers are public, else a file to
hand in."""
import argparse
import json
import sys
from pathlib import Path

from benchmarks.answers import Answer, absent, join, mmbench_rows, read_answers, write
from benchmarks.scores import SCORERS, mmvet_questions, score, vizwiz_upload
from core.common import UserError


def submit_mmvet(path: Path, answers: list[Answer], to: Path) -> str:
    """{"v1_0": text, ...}: what the official grader reads."""
    ids = [id.removeprefix("v1_") for id in mmvet_questions(path)]
    joined = join(answers, ids)
    absent(ids, joined, None)
    write(to, json.dumps({f"v1_{id}": answer.text for id, answer in joined.items()}, indent=2))
    return "grade it with MM-Vet's mm-vet_evaluator (github.com/yuweihao/MM-Vet), then score with --grades"


def submit_vizwiz(path: Path, answers: list[Answer], to: Path) -> str:
    """[{"image", "answer"}]: normalised answers, in the annotations' order."""
    write(
        to,
        json.dumps([
            dict(image=row["image"], answer=text) for row, text in vizwiz_upload(path, answers)]))
    return "upload it to eval.ai, challenge 2185 (VizWiz VQA)"


def submit_mmbench(path: Path, answers: list[Answer], to: Path) -> str:
    """The table without hint, category, source, image, comment, l2-category, and the raw answers as
    seventh column."""
    rows = mmbench_rows(path)
    joined = join(answers, [row["index"] for row in rows])
    try:
        from openpyxl import Workbook
        from openpyxl.utils.exceptions import IllegalCharacterError
    except ImportError:
        raise UserError(
            "MMBench's upload is an .xlsx file, which needs openpyxl (pip install openpyxl)"
        ) from None
    columns = [
        c for c in rows[0] if c not in ("hint", "category", "source", "comment", "l2-category")]
    columns.insert(6, "prediction")
    book = Workbook()
    book.active.append(columns)
    for row in rows:
        answer = joined.get(row["index"])
        filled = row | {"index": int(row["index"]), "prediction": answer.text if answer else None}
        try:
            book.active.append([filled[column] for column in columns])
        except IllegalCharacterError:
            raise UserError(
                f"{to}: .xlsx can't hold a control character of question {row['index']}") from None
    write(to, book)
    return "upload it to MMBench's server (mmbench.opencompass.org.cn), which has a language model read unclear answers"


SUBMISSIONS = dict(vizwiz=(submit_vizwiz, ".json"), mmbench=(submit_mmbench, ".xlsx"),
                   mmvet=(submit_mmvet, ".json"))


def options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scoring answers, without a model (see scores.py)")
    group.add_argument("--annotations", type=Path, metavar="PATH",
                       help="the benchmark's official file or folder")
    group.add_argument(
        "--predictions", type=Path, metavar="FILE.jsonl",
        help='the answers: {"question_id", "text"}, for some tasks also "prompt", on each line')
    group.add_argument("--grades", type=Path, metavar="FILE",
                       help="mmvet: what the official grader wrote")
    group.add_argument(
        "--submission", type=Path, metavar="FILE",
        help="vizwiz, mmbench, mmvet: also write the file for the official server or grader")


def show(metrics: dict, indent: int = 2) -> None:
    for name, value in metrics.items():
        if isinstance(value, dict):
            print(" " * indent + name)
            show(value, indent + 2)
        else:
            print(f"{' ' * indent + name:44} {value:>9.2f}" if isinstance(value, float) else
                  f"{' ' * indent + name:44} {value:>9}")


def command(args) -> None:
    """What `python eval.py --score TASK` does. args: those of `options`, and score, json."""
    if args.annotations is None or args.predictions is None and not args.grades:
        raise UserError(
            f"--score {args.score} needs --annotations PATH and --predictions FILE.jsonl")
    if args.grades and args.score != "mmvet":
        raise UserError(f"--grades is for mmvet, not for {args.score}")
    if args.submission and (args.score not in SUBMISSIONS or args.predictions is None):
        raise UserError(f"--submission is for {', '.join(SUBMISSIONS)}, with --predictions")
    answers = read_answers(args.predictions, skip_bad=args.score
                           == "vizwiz") if args.predictions else []
    result = score(args.score, args.annotations, answers, args.grades)
    if args.submission or result["primary"] is None:
        submit, suffix = SUBMISSIONS[args.score]
        to = args.submission or args.predictions.with_name(args.predictions.stem + "-submission" +
                                                           suffix)
        print(f"{to}: {submit(args.annotations, answers, to)}", file=sys.stderr)
    if args.json:
        return print(json.dumps(result))
    print(f"{args.score}: " +
          ("judged elsewhere" if result["primary"] is None else f"{result['primary']:.2f}"))
    show(result["metrics"])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.splitlines()[0])
    parser.add_argument("--score", required=True, choices=SCORERS)
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object instead of a table")
    options(parser)
    command(parser.parse_args(argv))
