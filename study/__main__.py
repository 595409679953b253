"""Does it work? The paper's comparisons again, in the toy world, on two CPU cores.

    python -m study probe          what every layer of the tower knows: can layers matter at all?
    python -m study towers         the towers that all runs begin with (done: study/towers)
    python -m study run --pilot    2 fusers x 3 seeds: what difference could be seen?
    python -m study run            the runs that are not done yet; start it once for each core
    python -m study off            trained models asked again with parts of CCRA made neutral
    python -m study table          accuracy by kind, paired differences, claims, a picture

The protocol, and what came out: docs/study.md. The scenes are toy's, pixel for pixel; its eight
kinds of question are answered from deep layers, so two kinds about the background, which deep
layers forget, are asked as well. What the tower makes of the scenes is computed once (--out). Every
finished run is a row of study/results.csv, with a bit for each question, so that all tables come
from that file; a run that was stopped goes on, and one repeated gives the same row.
"""
from core import common  # first: from here on Ctrl-C is a line

# isort: split
import argparse
from pathlib import Path

import torch

from core import flags
from study.probes import show_probes
from study.protocol import LLAMA_STEPS, OUT, QUESTIONS, RESULTS, ROWS, STEPS, SWEEPS, TOWERS
from study.runs import make_towers, off_all, run_all
from study.tables import show_tables, write_tables
from toy.world import OUT as TOY

PLACES = {
    "--towers": (TOWERS, "the folder with clip and llama"),
    "--out": (OUT, "the folder for features and unfinished runs"),
    "--results": (RESULTS, "the file with a row for every finished run"),
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = flags.Parser(prog="python -m study", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, *places: str) -> argparse.ArgumentParser:
        c = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        for flag in places:
            default, what = PLACES[flag]
            c.add_argument(flag, type=Path, default=default, help=f"{what} (default: %(default)s)")
        return c

    c = command("probe", "fit a linear classifier to the patches of every layer, for one question "
                "after the other, and print how often it is right (minutes)", "--towers")
    c.add_argument("--n", type=flags.whole(2, 1_000_000), default=3000,
                   help="scenes to learn from, half as many to test with (default: %(default)s)")
    c = command("towers", "take the toy world's CLIP and let its Llama read about backgrounds "
                "(minutes; what is there stays)", "--towers", "--out")
    c.add_argument("--source", type=Path, default=TOY,
                   help="the folder with the toy world's clip and llama, as `toy/retrain.sh` makes "
                   "them (default: %(default)s)")
    c.add_argument("--llama-steps", type=flags.whole(1, flags.MANY), default=LLAMA_STEPS,
                   help="default: %(default)s")
    c = command("run", "train and ask every row with every seed, unless that is done (ten minutes "
                "each, on one core; several processes share the runs)", *PLACES)
    add_choice(c)
    c = command("off", "ask the trained models that `run` kept again, with parts of CCRA made "
                "neutral, into off.csv beside --results", *PLACES)
    c.add_argument("--questions", type=flags.whole(1, 1_000_000), default=QUESTIONS,
                   help="default: %(default)s")
    c.set_defaults(steps=STEPS)
    c = command("table", "print what the finished runs say, in markdown, and draw it beside "
                "--results", "--results")
    c.add_argument("--base", default="ccra", metavar="ROW",
                   help="the row that others are compared with (default: %(default)s)")
    c.add_argument("--into", type=Path, metavar="FILE",
                   help="print nothing: replace the tables of a markdown file after its line "
                   "'## Results' (docs/study.md)")
    return p.parse_args(argv)


def add_choice(c: argparse.ArgumentParser) -> None:
    """`run`'s flags: which runs, and how long ones."""
    rows = [*ROWS, *SWEEPS]
    c.add_argument("--only", nargs="+", choices=rows, metavar="ROW",
                   help=f"these rows alone, of: {', '.join(rows)}")
    c.add_argument("--seeds", nargs="+", type=flags.seed, metavar="SEED", help="these seeds alone")
    c.add_argument("--pilot", action="store_true", help="ccra and llava with the pilot's seeds")
    c.add_argument("--again", action="store_true",
                   help="also what has a row, which must come out the same")
    c.add_argument("--steps", type=flags.whole(1, flags.MANY), nargs=2, default=STEPS,
                   metavar=("STAGE1", "STAGE2"),
                   help="default: %(default)s; for other numbers give --results of their own")
    c.add_argument("--questions", type=flags.whole(1, 1_000_000), default=QUESTIONS,
                   help="default: %(default)s")


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(1)                   # threads change rounding
    if args.command == "probe":
        show_probes(args.towers / "clip", args.n)
    elif args.command == "towers":
        make_towers(args)
    elif args.command == "run":
        run_all(args)
    elif args.command == "off":
        off_all(args)
    elif args.into:
        write_tables(args.into, args.results)
    else:
        show_tables(args.results, args.base)


if __name__ == "__main__":
    common.run(main, "what was finished or saved is kept, and the same command goes on from there")
