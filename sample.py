"""Ask a picture a question.

    python sample.py --image assets/scene.png --q "What color is the square?"
    python sample.py --image assets/scene.png --chat          several questions, with history

The answer, and nothing else, goes to stdout as it is written; times go to stderr. The default model
is the bundled one, which knows a small world of drawn objects (python -m toy show); --model takes
any folder that train.py wrote, and LLaVA-1.5, alone or with what train.py learnt beside it:

    python sample.py --model llava-1.5-7b-hf --image x.jpg --q "What is this?"
    python sample.py --model llava-v1.5-7b --vision clip-vit-large-patch14-336 \\
                     --image x.jpg --q "What is this?"
    python sample.py --model llava-1.5-7b-hf --adapter out/mine --image x.jpg --q "What is this?"

--heatmap draws what it looked at (viz/): the paper's Figure 3 for one question, its Figure 4 for
several --q, and its Figures 2 and 6 where --beside names other models. --html writes a page to
explore, one file without anything else:

    python sample.py --image assets/scene.png --q "What color is the square?" \\
                     --heatmap out.png --html out.html

--serve is a page to ask at in a browser, with all of this beside the answers (viz/server.py):

    python sample.py --serve

--questions asks a file of questions, a line of json each, and answers in lines of json; --batch of
them at a time, greedily:

    {"image": "a.png", "question": "What is this?", "question_id": "17"}             a line to ask
    {"question_id": "17", "prompt": "What is this?", "text": "A cat."}           and its answer

The question may be called "prompt" or "text", too; without a "question_id" it is the line's number.
"image" is relative to --images, or else to the file's folder; null asks without a picture.

In a chat, "/image FILE" changes the picture and begins anew, "/new" begins anew, "/quit" or Ctrl-D
ends it, and Ctrl-C stops an answer. A new question changes what CCRA reads from the picture, so
every turn reads picture and history again.
"""
from core.common import run  # first: from here on Ctrl-C is a line

# isort: split
import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from benchmarks.own import Question, read_questions
from core import flags
from core.common import UserError, split, visible, write_beside, write_text
from core.pictures import STDIN, label, read
from core.records import Turns
from data import Sample, prompt
from eval import reply_ids
from toy import world as toy
from training import adapters
from viz import asking, explorer, figures, maps, server

try:
    import readline  # imported, it edits what input() reads
except ImportError:                 # Windows: its console does that itself
    readline = None

# --------------------------------------------------------------------------------------------------
# Asking

def picture(path: str, pipes: bool = False) -> Image.Image:
    """A picture as a viewer shows it, upright. Says what isn't shown as it is stored."""
    image, notes = read(path, upright=True, pipes=pipes)
    for note in notes:
        print(f"note: {label(path)}: {note}", file=sys.stderr)
    return image


class Asker(asking.Asker):
    """A model that answers on stdout.

    sights: what it looked at for each answer, where that is to be drawn.
    """

    def __init__(self, args: argparse.Namespace, folder: str | Path, adapter: str | None = None):
        """args: those of the program; folder: the model's; adapter: of what was learnt beside it.
        """
        super().__init__(args, folder, adapter)
        self.sights: list[maps.Sight] = []

    def look(self, image: Image.Image) -> Tensor:
        """A picture's pixels (3, size, size). Says so if the model can't know what is in it."""
        for note in self.foreign(image):
            print(f"note: {note}", file=sys.stderr)
        return self.pixels(image)

    def see(self, path: Path | None, seen: Counter) -> Tensor:
        """The pixels for a question of a file; zeros for no picture. seen: notes are counted."""
        if path is None:
            return torch.zeros(3, self.model.image["size"], self.model.image["size"])
        image, notes = read(path, upright=True)
        seen.update(notes + self.foreign(image))
        return self.pixels(image)

    def ask(self, pixels: Tensor, turns: Turns, started: float,
            image: Image.Image | None = None) -> str:
        """Write the answer as it comes, and return it.

        pixels (3, size, size); turns as for data.prompt; started: the perf_counter when waiting
        began; image: the picture, if what is looked at is to be drawn on it. UserError for an empty
        question, or one that is too long.
        """
        row = self.row(turns)
        room, batch = self.room(row), self.batch(row, pixels)
        tokens, times, answer = [], [], ""
        began = time.perf_counter()
        try:
            with maps.watch(self.model) if image else nullcontext() as seen:
                for piece in self.tokenizer.stream(self.generate(batch, tokens, times)):
                    print(piece, end="", flush=True)
                    answer += piece
        except KeyboardInterrupt:
            if not self.args.chat:
                raise
            print(" [stopped]", end="", file=sys.stderr)
            room = self.context                      # stopped, not cut
        print(flush=True)
        if tokens and len(tokens) >= min(room, self.args.max_new_tokens):
            print(f"[{self.cut(len(tokens))}]", file=sys.stderr)
        if times:
            show_times(times, began, started)
        if image:
            question, _ = turns[-1]
            self.sights.append(seen.sight(self.model, self.tokenizer, image, question, batch,
                                          tokens, self.name))
        return answer


def show_times(times: list[float], began: float, started: float) -> None:
    """times: when each token came; began: when the question was asked; started: when the user's
    wait began. Seconds."""
    first, last = times[0], times[-1]
    rate = ""
    if len(times) > 1:
        rate = f", then {(len(times) - 1) / (last - first):.1f} tokens/s"
    print(f"[first token after {first - began:.3f} s ({first - started:.2f} s with loading), "
          f"{len(times)} tokens{rate}]", file=sys.stderr)


def chat(asker: Asker, pixels: Tensor, line: str | None = None) -> None:
    """Questions from stdin until it ends. What goes wrong with one is said, and the next can be
    asked. pixels (3, size, size): the picture to begin with; line: what is asked first."""
    turns = []
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")         # a path may have any bytes
    if readline is not None:        # a Ctrl-D typed ahead of the prompt comes as a zero
        readline.parse_and_bind(r'"\C-@": "\C-d"')
    while True:
        try:
            line = typed() if line is None else line
        except EOFError:
            return print(file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends)", file=sys.stderr)
            continue
        command, _, rest = line.strip().partition(" ")
        line = None
        try:
            if command == "/quit":
                return
            elif command == "/image":
                pixels, turns = asker.look(picture(rest.strip())), []
            elif command == "/new":
                turns = []
            elif command.startswith("/"):
                raise UserError(f"{command} is unknown (choose /image FILE, /new, /quit)")
            elif "\x1b" in f"{command}{rest}":
                raise UserError("that holds a key which can't be edited with here; type it again")
            elif question := f"{command} {rest}".strip():
                answer = asker.ask(pixels, turns + [(question, None)], time.perf_counter())
                turns.append((question, answer or " "))
        except UserError as e:
            print(f"error: {visible(str(e))}", file=sys.stderr)


def typed() -> str:
    """A line of stdin, which a terminal lets one edit; EOFError at its end. The prompt goes to
    stderr, unless what edits has to know of it."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


# --------------------------------------------------------------------------------------------------
# A file of questions

@contextmanager
def growing(path: Path) -> Iterator[TextIO]:
    """A file to write to, which gets its name when it is whole: until then it is NAME.part."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            yield file
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"{part}: cannot write it ({e.strerror})") from None
    except KeyboardInterrupt:
        print(f"\nwhat was answered is in {part}", file=sys.stderr)
        raise


def answer_file(args: argparse.Namespace, asked: list[Question]) -> None:
    """--questions: a line of --answers, or of stdout, for each, in order, as they come. UserError,
    in the end, if some have none."""
    asker = Asker(args, args.model, args.adapter)
    try:
        rows = [prompt([(q.text, None)], asker.tokenizer, image=q.image is not None) for q in asked]
    except UserError as e:
        raise UserError(f"{args.questions}: {e}") from None
    room = [asker.room(row) for row in rows]
    for q, left in zip(asked, room):
        if left < 1:
            raise UserError(f"{q.at}: the question is too long: {asker.context - left} positions "
                            f"with the picture, the language model has {asker.context}")
    # who has little room is asked alone: beside a longer row it would have less
    tight = groupby(range(len(rows)), key=lambda i: room[i] < args.max_new_tokens)
    batches = [those for alone, run in tight
               for those in split(list(run), 1 if alone else args.batch)]
    failed, seen = [], Counter()
    with growing(args.answers) if args.answers else nullcontext(sys.stdout) as file:
        for those in tqdm(batches, desc="answering", unit="batch",
                          disable=None if args.answers else True):
            lines = answer_batch(asker, [asked[i] for i in those], [rows[i] for i in those],
                                 min(room[i] for i in those), seen)
            failed += [line for line in lines if "error" in line]
            print(*map(json.dumps, lines), sep="\n", file=file, flush=True)
    for note, count in seen.items():
        print(f"note: {count} of {len(asked)} questions: {note}", file=sys.stderr)
    if failed:
        raise UserError(f"{len(failed)} of {len(asked)} questions have no answer, since their "
                        f"pictures can't be read; first: {failed[0]['error']}")


def answer_batch(asker: Asker, asked: list[Question], rows: list[Sample], room: int,
                 seen: Counter) -> list[dict]:
    """What is written of some questions. room: of the one that has least; seen: notes, counted."""
    lines, pixels = [], {}
    for i, q in enumerate(asked):
        lines.append(dict(question_id=q.id, prompt=q.text))
        try:
            pixels[i] = asker.see(q.image, seen)
        except UserError as e:
            lines[i]["error"] = str(e)
            print(f"error: {q.at}: {visible(str(e))}", file=sys.stderr)
    most = min(room, asker.args.max_new_tokens)
    answers = reply_ids(asker.model, asker.tokenizer, [rows[i] for i in pixels],
                        list(pixels.values()), most, asker.device) if pixels else []
    for i, ids in zip(pixels, answers):
        lines[i]["text"] = asker.tokenizer.decode(ids).strip()
        if len(ids) == most:
            lines[i]["cut"] = asker.cut(most)
            seen[asker.cut(most)] += 1
    return lines


# --------------------------------------------------------------------------------------------------
# Drawing

def draw(args: argparse.Namespace, sights: list[list[maps.Sight]]) -> None:
    """Write --heatmap and --html. sights: for each model those of all questions."""
    own = sights[0]
    if args.html:
        write_text(Path(args.html), explorer.explorer(own[0]))
    if args.heatmap:
        if args.beside:
            sheet = figures.side_by_side(list(zip(*sights)))
        elif len(own) > 1:
            sheet = figures.figure4(own)
        else:
            sheet = figures.figure3(own[0], args.layers)
        write_beside(Path(args.heatmap), lambda tmp: sheet.save(tmp, format="PNG", optimize=True))
    print(f"[drawn: {', '.join(filter(None, (args.heatmap, args.html)))}]", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# The program

def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's. UserError for what doesn't go together, before a model is loaded."""
    p = flags.Parser(description=__doc__)
    p.add_argument("--image", action="append", help="a picture file; - reads it from stdin")
    p.add_argument("--q", action="append",
                   help="the question; given several times, each is asked by itself")
    p.add_argument("--chat", action="store_true",
                   help="several questions at a prompt (--q is the first)")
    model_options(p.add_argument_group("the model"))
    answer_options(p.add_argument_group("the answer"))
    file_options(p.add_argument_group("a file of questions"))
    drawing_options(p.add_argument_group("what the model looked at"))
    server.options(p.add_argument_group("a page in the browser"))
    args = p.parse_args(argv)
    if args.quant and args.pack:
        raise UserError("--quant and --pack exclude each other: int8 has a layout of its own")
    if server.wanted(args):
        return args
    check_file(args)
    if args.questions:
        return args
    if not args.image:
        raise UserError("no picture: give --image FILE (or --questions FILE.jsonl, or --serve)")
    if len(args.image) > 1:
        raise UserError(f"--image is given {len(args.image)} times, and the model takes one "
                        "picture a question; ask of each by itself, or of all in a file: "
                        "--questions")
    args.image = args.image[0]
    if args.q is None and not args.chat:
        raise UserError("nothing was asked: give --q \"...\" or --chat")
    if args.chat and len(args.q or []) > 1:
        raise UserError("a --chat begins with one --q; ask the others at its prompt")
    if args.chat and args.image in STDIN:
        raise UserError("a --chat reads its questions from stdin; give --image a file")
    check_drawing(args)
    return args


def model_options(g) -> None:
    g.add_argument("--model", default=toy.MODEL,
                   help="a model folder (default: the bundled model)")
    g.add_argument("--vision",
                   help="the CLIP folder for a model that has no vision tower (liuhaotian's LLaVA)")
    adapters.option(g)
    g.add_argument("--dtype", default="auto",
                   help="float32, bfloat16, float16; auto: as stored, but float32 for a model of "
                   "less than 1 GB on a CPU")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    g.add_argument("--quant", choices=["int8"],
                   help="keep the language model in 8 bits: half the memory (CPU)")
    g.add_argument("--pack", action="store_true",
                   help="lay half-precision weights out for decoding: a later start, faster "
                   "answers (CPU)")


def answer_options(g) -> None:
    g.add_argument("--temperature", type=flags.temperature, default=0.0,
                   help="0 takes the likeliest token each time")
    g.add_argument("--top-p", type=flags.top_p, default=1.0,
                   help="draw among the likeliest tokens of this total probability")
    g.add_argument("--max-new-tokens", type=flags.whole(1, flags.MANY), default=128)
    g.add_argument("--seed", type=flags.seed, default=0, help="for temperatures above 0")


def file_options(g) -> None:
    g.add_argument("--questions", type=Path, metavar="FILE.jsonl", help="ask all of these")
    g.add_argument("--images", type=Path, metavar="DIR",
                   help="what their pictures' paths are relative to (default: the file's folder)")
    g.add_argument("--answers", type=Path, metavar="FILE.jsonl",
                   help="for the answers (default: stdout); FILE.jsonl.part until all are there")
    g.add_argument("--batch", type=flags.batch, help="questions answered at a time (default: 16)")


def check_file(args: argparse.Namespace) -> None:
    """UserError for what doesn't go together with --questions, or without."""
    if not args.questions:
        alone = [name for name in ("images", "answers", "batch") if getattr(args, name)]
        if alone:
            raise UserError(f"--{alone[0]} is for --questions FILE.jsonl")
        return
    others = [name for name in ("image", "q", "chat", "heatmap", "html", "beside", "layers",
                                "temperature") if getattr(args, name)]
    if others:
        raise UserError(f"--{others[0]} doesn't go with --questions, whose answers are greedy and "
                        "text alone")
    if args.answers and (args.answers.exists() and not args.answers.is_file()
                         or not args.answers.parent.is_dir()):
        raise UserError(f"--answers {args.answers}: should be a file in a folder that exists")
    if args.answers and args.answers.exists() and args.answers.samefile(args.questions):
        raise UserError("--answers is the file of --questions; give another")
    args.batch = args.batch or 16


def drawing_options(g) -> None:
    g.add_argument("--heatmap", metavar="FILE.png", help="draw it")
    g.add_argument("--html", metavar="FILE.html", help="the same as a page to explore (one --q)")
    g.add_argument("--layers", metavar="L,L,..",
                   help="layers of the vision tower that --heatmap draws (default: half, three "
                   "quarters and all of the depth)")
    g.add_argument("--beside", action="append", default=[], metavar="FOLDER",
                   help="another model, asked the same; may be given several times")


def check_drawing(args: argparse.Namespace) -> None:
    """UserError for what --heatmap and --html can't draw. args.layers: text -> numbers."""
    if not (args.heatmap or args.html):
        if args.beside or args.layers is not None:
            raise UserError("--beside and --layers are for --heatmap FILE.png")
    elif args.chat:
        raise UserError("--heatmap and --html draw single questions, not a --chat")
    if args.html and (len(args.q) > 1 or args.beside):
        raise UserError("--html takes one --q and no --beside")
    for name, end in (("heatmap", ".png"), ("html", ".html")):
        file = getattr(args, name)
        if file and (Path(file).suffix != end or not Path(file).parent.is_dir()):
            raise UserError(f"--{name} {file}: should be a file {end} in a folder that exists")
    if args.layers is None:
        return
    try:
        args.layers = [int(layer) for layer in args.layers.split(",")]
    except ValueError:
        raise UserError(
            f"--layers {args.layers}: should be numbers with commas, as 4,6,8") from None


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    args = arguments(argv)
    if args.serve:
        return server.serve(args)
    if args.questions:
        return answer_file(args, read_questions(args.questions, args.images))
    # before the model: a wrong path should fail at once; and once, since it may be a pipe
    image = picture(args.image, pipes=True)
    draws = bool(args.heatmap or args.html)
    sights = []
    for folder, adapter in [(args.model, args.adapter), *((other, None) for other in args.beside)]:
        asker = Asker(args, folder, adapter)
        pixels = asker.look(image)
        if args.chat:
            return chat(asker, pixels, args.q[0] if args.q else None)
        for question in args.q:
            asker.ask(pixels, [(question, None)], started, image if draws else None)
        sights.append(asker.sights)
        del asker                      # one model in memory at a time
    if draws:
        draw(args, sights)


if __name__ == "__main__":
    run(main)
