"""Score answers to a benchmark, without a model: the command behind `python eval.py --score TASK`.

Numbers where the right answers are public, else a file to hand in. It needs no torch.
"""
import argparse
import io
import json
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

from benchmarks import TASKS, mmvet
from benchmarks.answers import Answer, Question, read_answers
from core import flags
from core.common import UserError

SUBMITTED = [task for task, module in TASKS.items() if hasattr(module, "submit")]


def score(task: str, annotations: Path, answers: list[Answer], grades: Path | None = None,
          limited: bool = False) -> dict:
    """dict(task, primary: the published number, metrics: all of them). primary None: it is judged
    elsewhere.

    limited: only a part of the questions was asked. The score is that of those, instead of an error
    or a warning.
    """
    if task == "mmvet" and grades:
        primary, metrics = mmvet.score_grades(annotations, grades)
    else:
        primary, metrics = TASKS[task].score(annotations, answers, limited)
    return dict(task=task, primary=primary, metrics=metrics)


def entry(task: str, path: Path, given: list[Answer], submission: Path | None) -> dict:
    """The score of all answers there are, with its 95% interval, as results.json has it.
    submission: where to, if it is judged elsewhere."""
    result = score(task, path, given, limited=True)
    found, metrics = result["primary"], result["metrics"]
    if found is not None:
        interval = [found - metrics["margin"], found + metrics["margin"]]
        return dict(score=found, interval=interval, metrics=metrics)
    if submission is not None:
        to = submission.with_suffix(TASKS[task].SUBMISSION)
        print(f"{to}: {TASKS[task].submit(path, given, to)}", file=sys.stderr)
    return dict(score=None, interval=None, metrics=metrics)


def rehearse(task: str, path: Path, asked: list[Question], limit: int) -> None:
    """Score answers that say nothing: what a scorer can't read shall not show hours later."""
    blank = [Answer(str(q.id), "", q.prompt, f"{path}: question {q.id}") for q in asked]
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        entry(task, path, blank, None if limit else Path(folder, task + "-submission"))


def options(parser: argparse.ArgumentParser) -> None:
    """The options of `command`, but for --score and --json."""
    group = parser.add_argument_group("scoring answers, without a model (see benchmarks/)")
    group.add_argument("--annotations", type=Path, metavar="PATH",
                       help="the benchmark's official file or folder")
    group.add_argument("--predictions", type=Path, metavar="FILE.jsonl", help='the answers: '
                       '{"question_id", "text"}, for some tasks also "prompt", on each line')
    group.add_argument("--grades", type=Path, metavar="FILE",
                       help="mmvet: what the official grader wrote")
    group.add_argument("--submission", type=Path, metavar="FILE", help=f"{', '.join(SUBMITTED)}: "
                       "also write the file for the official server or grader")


def command(args: argparse.Namespace) -> None:
    """What `python eval.py --score TASK` does. args: those of `options`, and score, json."""
    check(args)
    answers = []
    if args.predictions:       # LLaVA's script for VizWiz skips bad lines
        answers = read_answers(args.predictions, skip_bad=args.score == "vizwiz")
    result = score(args.score, args.annotations, answers, args.grades)
    if args.submission or result["primary"] is None:
        module = TASKS[args.score]
        name = args.predictions.stem + "-submission" + module.SUBMISSION
        to = args.submission or args.predictions.with_name(name)
        print(f"{to}: {module.submit(args.annotations, answers, to)}", file=sys.stderr)
    if args.json:
        return print(json.dumps(result))
    primary = result["primary"]
    print(f"{args.score}: " + ("judged elsewhere" if primary is None else f"{primary:.2f}"))
    show(result["metrics"])


def check(args: argparse.Namespace) -> None:
    """UserError for words that don't go together."""
    if args.annotations is None or args.predictions is None and not args.grades:
        raise UserError(f"--score {args.score} needs --annotations PATH and --predictions "
                        "FILE.jsonl")
    if args.grades and args.score != "mmvet":
        raise UserError(f"--grades is for mmvet, not for {args.score}")
    if args.submission and (args.score not in SUBMITTED or args.predictions is None):
        raise UserError(f"--submission is for {', '.join(SUBMITTED)}, with --predictions")


def show(metrics: dict, indent: int = 2) -> None:
    """Print numbers, a line each, those of a group below its name."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            print(" " * indent + name)
            show(value, indent + 2)
        else:
            figure = f"{value:.2f}" if isinstance(value, float) else str(value)
            print(f"{' ' * indent + name:44} {figure:>9}")


def main(argv: list[str] | None = None) -> None:
    """eval.py's own main, where --score is among its words."""
    parser = flags.Parser(prog="eval.py", description="Score answers to a benchmark, without a "
                          "model.")
    parser.add_argument("--score", required=True, choices=TASKS, metavar="TASK",
                        help=", ".join(TASKS))
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object instead of a table")
    options(parser)
    command(parser.parse_args(argv))
