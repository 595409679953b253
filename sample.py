"""Ask a picture a question.

    python sample.py --image assets/scene.png --q "What color is the square?"
    python sample.py --image assets/scene.png --chat          several questions, with history

The answer, and nothing else, goes to stdout as it is written; times go to stderr. The default model
is the embedded one (toy.py), which knows a small world of drawn objects; --model takes any folder
that train.py wrote, and LLaVA-1.5:

    python sample.py --model llava-1.5-7b-hf --image x.jpg --q "What is this?"
    python sample.py --model llava-v1.5-7b --vision clip-vit-large-patch14-336 --image x.jpg --q "What is this?"

--heatmap draws what it looked at (viz.py): the paper's Figure 3 for one question, its Figure 4 for
several --q, and its Figures 2 and 6 where --beside names other models. --html writes a page to
explore, one file without anything else:

    python sample.py --image assets/scene.png --q "What color is the square?" --heatmap out.png --html out.html

In a chat, "/image FILE" changes the picture and begins anew, "/new" begins anew, "/quit" or Ctrl-D
ends it, and Ctrl-C stops an answer. A new question changes what CCRA reads from the picture, so
every turn reads picture and history again.
"""
import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from ccra import VLM
from clip import open_image, preprocess
from core.common import UserError, read_config, run, write_beside
from core.device import pick_device, pick_dtype
from core.tokenizer import Tokenizer
from core.weights import stored_bytes
from data import collate, prompt, query_of
from toy import world as toy
from viz import explorer
from viz import figures as viz
from viz import maps as look


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--image", required=True, help="a picture file")
    p.add_argument("--q", action="append",
                   help="the question; given several times, each is asked by itself")
    p.add_argument("--chat", action="store_true",
                   help="several questions at a prompt (--q is the first)")
    p.add_argument("--model", default=toy.MODEL,
                   help="a model folder (default: the embedded model)")
    p.add_argument("--vision",
                   help="the CLIP folder for a model that has no vision tower (liuhaotian's LLaVA)")
    p.add_argument(
        "--dtype", default="auto",
        help="float32, bfloat16, float16; auto: as stored, but float32 for a "
        "model of less than 1 GB on a CPU")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--quant", choices=["int8"],
                   help="keep the language model in 8 bits: half the memory (CPU)")
    p.add_argument(
        "--pack", action="store_true",
        help="lay half-precision weights out for decoding: a later start, "
        "faster answers (CPU)")
    p.add_argument("--temperature", type=float, default=0.0,
                   help="0 takes the likeliest token each time")
    p.add_argument("--top-p", type=float, default=1.0,
                   help="draw among the likeliest tokens of this total probability")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--seed", type=int, default=0, help="for temperatures above 0")
    p.add_argument("--heatmap", metavar="FILE.png", help="draw what the model looked at")
    p.add_argument("--html", metavar="FILE.html", help="the same as a page to explore (one --q)")
    p.add_argument(
        "--layers", metavar="L,L,..",
        help="layers of the vision tower that --heatmap draws (default: half, "
        "three quarters and all of the depth)")
    p.add_argument("--beside", action="append", default=[], metavar="FOLDER",
                   help="another model, asked the same; may "
                   "be given several times")
    args = p.parse_args(argv)
    if args.q is None and not args.chat:
        raise UserError("nothing was asked: give --q \"...\" or --chat")
    if args.chat and len(args.q or []) > 1:
        raise UserError("a --chat begins with one --q; ask the others at its prompt")
    if args.quant and args.pack:
        raise UserError("--quant and --pack exclude each other: int8 has a layout of its own")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        raise UserError(
            "--temperature must be 0 or more, --top-p in (0, 1], --max-new-tokens 1 or more")
    return check_drawing(args)


def check_drawing(args):
    """What --heatmap and --html can't draw is said before a model is loaded. layers: text ->
    numbers."""
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
    try:
        args.layers = None if args.layers is None else [
            int(layer) for layer in args.layers.split(",")]
    except ValueError:
        raise UserError(
            f"--layers {args.layers}: should be numbers with commas, as 4,6,8") from None
    return args


class Asker:
    """A model, its tokenizer, and how to draw answers: `ask` writes one answer to stdout and
    returns it.

    sights: what it looked at for each answer, if that is to be drawn.
    """

    def __init__(self, args, folder):
        self.args, device, self.sights, self.folder = args, pick_device(args.device), [], folder
        dtype = pick_dtype(args.dtype, device, stored_bytes(folder))
        vision = args.vision if folder == args.model else None
        self.model = VLM.from_pretrained(folder, dtype=dtype, device=device, vision=vision).eval()
        if args.quant or args.pack:
            self.model.llm.pack(int8=args.quant == "int8")
        self.tokenizer, self.device = Tokenizer.from_pretrained(folder), device
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.toy = read_config(folder).get("world") == "toy"

    def look(self, path):
        """A picture's pixels (3, size, size). Says so if the model can't know what is in it."""
        image = open_image(path)
        if self.toy and not toy.knows(image):
            print(f"note: {toy.KNOWS}", file=sys.stderr)
        return preprocess(image, **self.model.image)

    def ask(self, pixels, turns, started, image=None):
        """turns as for data.prompt, the last one without an answer; started: perf_counter when
        waiting began.

        image: the picture, if what is looked at is to be drawn on it.
        """
        row, tokens, times, answer = prompt(turns, self.tokenizer), [], [], ""
        query = query_of(row.turns, self.model.query)
        batch = collate([dict(ids=row.ids, labels=row.labels, query=query, pixels=pixels)])
        batch = {key: value.to(self.device) for key, value in batch.items() if key != "labels"}

        def ids():
            how = {
                key: getattr(self.args, key) for key in ("max_new_tokens", "temperature", "top_p")}
            for token in self.model.generate(**batch, **how, eos_ids=self.tokenizer.eos_ids,
                                             generator=self.generator):
                times.append(time.perf_counter())
                tokens.append(int(token[0]))
                yield tokens[-1]

        began = time.perf_counter()
        try:
            with look.watch(self.model) if image else nullcontext() as seen:
                for piece in self.tokenizer.stream(ids()):
                    print(piece, end="", flush=True)
                    answer += piece
        except KeyboardInterrupt:
            if not self.args.chat:
                raise
            print(" [stopped]", end="", file=sys.stderr)
        print(flush=True)
        if times:
            rate = f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(
                times) > 1 else ""
            first, whole = times[0] - began, times[0] - started
            print(
                f"[first token after {first:.3f} s ({whole:.2f} s with loading), {len(times)} tokens{rate}]",
                file=sys.stderr)
        if image:
            name = Path(self.folder).name
            self.sights.append(
                seen.sight(self.model, self.tokenizer, image, turns[-1][0], batch, tokens, name))
        return answer


def chat(asker: Asker, pixels):
    """Questions from stdin until it ends. What goes wrong with one is said, and the next can be
    asked."""
    turns, line = [], asker.args.q and asker.args.q[0]
    while True:
        try:
            if line is None:
                print("> ", end="", file=sys.stderr, flush=True)
                line = input()
        except EOFError:
            return print(file=sys.stderr)
        except KeyboardInterrupt:
            line = None
            print("\n(/quit or Ctrl-D ends)", file=sys.stderr)
            continue
        command, _, rest = line.strip().partition(" ")
        line = None
        try:
            if command == "/quit":
                return
            elif command == "/image":
                pixels, turns = asker.look(rest.strip()), []
            elif command == "/new":
                turns = []
            elif command.startswith("/"):
                raise UserError(f"{command} is unknown (choose /image FILE, /new, /quit)")
            elif question := f"{command} {rest}".strip():
                answer = asker.ask(pixels, turns + [(question, None)], time.perf_counter())
                turns.append((question, answer or " "))
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)


def draw(args, sights):
    """sights: for each model those of all questions."""
    if args.html:
        page = explorer.explorer(sights[0][0])
        write_beside(Path(args.html), lambda tmp: tmp.write_text(page, encoding="utf-8"))
    if args.heatmap:
        if args.beside:
            sheet = viz.side_by_side(list(zip(*sights)))
        else:
            sheet = viz.figure4(sights[0]) if len(args.q) > 1 else viz.figure3(
                sights[0][0], args.layers)
        write_beside(Path(args.heatmap), lambda tmp: sheet.save(tmp, format="PNG", optimize=True))
    print(f"[drawn: {', '.join(filter(None, (args.heatmap, args.html)))}]", file=sys.stderr)


def main(argv=None):
    started, args = time.perf_counter(), arguments(argv)
    image, sights = open_image(args.image), []  # before the model: a wrong path should fail at once
    for folder in [args.model, *args.beside]:
        asker = Asker(args, folder)
        pixels = asker.look(args.image)
        if args.chat:
            return chat(asker, pixels)
        for question in args.q:
            asker.ask(pixels, [(question, None)], started,
                      image if args.heatmap or args.html else None)
        sights.append(asker.sights)
        del asker                               # one model in memory at a time
    if args.heatmap or args.html:
        draw(args, sights)


if __name__ == "__main__":
    run(main)
