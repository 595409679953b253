"""How long one waits before the page of sample.py --serve, beside sample.py, and what maps add.

    python -m bench.serve                                    the bundled model
    python -m bench.serve --model DIR --image FILE --q "..." --runs 30

The time to the first word: for the page from when a new connection begins to send its question
until the first piece of the answer is read; for sample.py (a --chat, /new before each question)
from when the line is written to it until it writes. Both are processes of their own and take turns,
question by question, so both are warm and meet the same load.

What the maps add: in this process, answers of exactly --tokens tokens as sample.py has them without
--html, and as the page has them, with what it draws, by turns. Answers are greedy. Times are
medians, and beside them stands the difference's, of neighbours.
"""
from core.common import run  # first: from here on Ctrl-C is a line

# isort: split
import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import sample
from core import flags
from core.common import ROOT, UserError
from core.flags import whole
from core.pictures import read
from toy import world as toy
from viz.asking import Asker
from viz.desk import Asked, Desk, Question, answered

QUESTION = "What color is the square?"
WARM = 3                      # questions before any is timed


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = flags.Parser(prog="python -m bench.serve", description=__doc__)
    p.add_argument("--model", default=str(toy.MODEL), help="default: the bundled one")
    p.add_argument("--image", type=Path, default=ROOT / "assets" / "scene.png")
    p.add_argument("--q", default=QUESTION, help=f"default: {QUESTION}")
    p.add_argument("--tokens", type=whole(2, 4096), default=30, help="of an answer (default 30)")
    p.add_argument("--runs", type=whole(1, 10_000), default=40, help="of each (default 40)")
    p.add_argument("--device", default="auto")
    return p.parse_args(argv)


def by_turns(runs: int, *ways: Callable[[], float]) -> list[list[float]]:
    """What each way took, in seconds, each time; they take turns."""
    took = [[] for _ in ways]
    for i in range(WARM + runs):
        for seconds, way in zip(took, ways):
            each = way()
            if i >= WARM:
                seconds.append(each)
    return took


# --------------------------------------------------------------------------------------------------
# To the first word

def start(args: argparse.Namespace, *more: str) -> subprocess.Popen:
    """sample.py, spoken to by its stdin and stdout."""
    command = [sys.executable, str(ROOT / "sample.py"), "--model", args.model, "--device",
               args.device, "--max-new-tokens", str(args.tokens), *more]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL)


def of_page(port: int, body: bytes) -> float:
    """Seconds until the first word of a question to the page's server."""
    began, first = time.perf_counter(), None
    there = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    there.request("POST", "/ask", body)
    answer = there.getresponse()
    while line := answer.readline():
        if b'"text"' in line and first is None:
            first = time.perf_counter() - began
    there.close()
    if first is None:
        raise UserError("--q: its answer has no word; ask another question")
    return first


def of_chat(chat: subprocess.Popen, question: str) -> float:
    """Seconds until the first word of a question to sample.py."""
    chat.stdin.write(b"/new\n")
    began = time.perf_counter()
    chat.stdin.write(question.encode() + b"\n")
    chat.stdin.flush()
    said = os.read(chat.stdout.fileno(), 2 ** 16)
    first = time.perf_counter() - began
    while not said.endswith(b"\n"):
        more = os.read(chat.stdout.fileno(), 2 ** 16)
        if not more:
            raise UserError("sample.py ended; ask it the same to see why")
        said += more
    return first


def first_words(args: argparse.Namespace) -> list[list[float]]:
    """Of the page and of sample.py."""
    page, chat = start(args, "--serve"), start(args, "--chat", "--image", str(args.image))
    try:
        found = re.match(rb"http://127\.0\.0\.1:(\d+) ", page.stdout.readline())
        if not found:
            raise UserError("sample.py --serve ended; start it to see why")
        port = int(found[1])
        there = http.client.HTTPConnection("127.0.0.1", port)
        there.request("POST", "/picture", args.image.read_bytes())
        picture = json.load(there.getresponse())["picture"]
        there.close()
        body = json.dumps(dict(picture=picture, question=args.q)).encode()
        return by_turns(args.runs, lambda: of_page(port, body), lambda: of_chat(chat, args.q))
    finally:
        for program in (page, chat):
            program.kill()
            program.communicate()


# --------------------------------------------------------------------------------------------------
# Maps

def whole_answers(args: argparse.Namespace) -> list[list[float]]:
    """With maps, as the page has them, and without, as sample.py."""
    settings = sample.arguments(["--serve", "--model", args.model, "--device", args.device,
                                 "--max-new-tokens", str(args.tokens)])
    desk = Desk([Asker(settings, args.model)])
    asker = desk.askers[0]
    asker.tokenizer.eos_ids = frozenset()                          # no answer ends by itself
    image, notes = read(args.image, upright=True)
    picture, row = desk.prepared(image, notes), asker.row([(args.q, None)])
    asked = Asked("", [], args.q, 0.0, args.tokens, [], 0)
    pixels = asker.pixels(image)

    def with_maps() -> float:
        began = time.perf_counter()
        for line in answered(Question(asker, picture, asked, row, SimpleQueue())):
            json.dumps(line)
        return time.perf_counter() - began

    def without() -> float:
        began = time.perf_counter()
        for _ in asker.tokenizer.stream(asker.generate(asker.batch(row, pixels), [], [])):
            pass
        return time.perf_counter() - began

    return by_turns(args.runs, with_maps, without)


def show(what: str, took: list[list[float]], names: tuple[str, str], share: bool) -> None:
    """A line: medians in milliseconds, and of what the first takes more than the second beside
    it. share: in percent, too."""
    first, second = (1000 * statistics.median(seconds) for seconds in took)
    more = 1000 * statistics.median(a - b for a, b in zip(*took))
    percent = f" ({100 * more / second:+.1f}%)" if share else ""
    print(f"{what}: {names[0]} {first:.1f} ms, {names[1]} {second:.1f} ms: "
          f"{more:+.1f} ms{percent}")


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if not args.image.is_file():
        raise UserError(f"--image {args.image}: no such image")
    show("first word", first_words(args), ("page", "sample.py"), share=False)
    show(f"{args.tokens} tokens", whole_answers(args), ("with maps", "without"), share=True)


if __name__ == "__main__":
    run(main)
