"""TODO study/__main__.py"""
import argparse
from pathlib import Path

import torch

from study.findings import show_tables, write_tables
from study.probes import show_probes
from study.protocol import LLAMA_STEPS, OUT, QUESTIONS, RESULTS, ROWS, STEPS, SWEEPS, TOWERS
from study.runs import make_towers, off_all, run_all
from toy import world as toy


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=("towers", "probe", "run", "off", "table"))
    p.add_argument("--towers", type=Path, default=TOWERS,
                   help="the folder with clip and llama (default: study/towers)")
    p.add_argument("--source", type=Path, default=toy.OUT,
                   help="towers: what they come from (default: %(default)s)")
    p.add_argument("--out", type=Path, default=OUT,
                   help="for features and unfinished runs (default: %(default)s)")
    p.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    p.add_argument("--llama-steps", type=int, default=LLAMA_STEPS,
                   help="towers: default %(default)s")
    p.add_argument("--n", type=int, default=3000,
                   help="probe: scenes to learn from; half as many to test with")
    p.add_argument("--only", nargs="+", choices=[*ROWS, *SWEEPS], metavar="ROW",
                   help="run: these rows alone")
    p.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="run: these seeds alone")
    p.add_argument("--pilot", action="store_true",
                   help="run: ccra and llava with the pilot's seeds")
    p.add_argument("--again", action="store_true",
                   help="run: also what has a row, which must come out the same")
    p.add_argument("--steps", type=int, nargs=2, default=STEPS,
                   help="run: of stage 1 and 2 (default: %(default)s)")
    p.add_argument("--questions", type=int, default=QUESTIONS,
                   help="run: how many (default: %(default)s)")
    p.add_argument("--base", default="ccra", help="table: the row that others are compared with")
    p.add_argument(
        "--into", type=Path, metavar="FILE",
        help="table: don't print the tables, but replace those of a "
        "markdown file after its line '## Results' (docs/study.md)")
    args = p.parse_args(argv)
    torch.set_num_threads(1)                   # threads change rounding
    if args.command == "towers":
        make_towers(args)
    elif args.command == "probe":
        show_probes(args.towers / "clip", args.n)
    elif args.command == "run":
        run_all(args)
    elif args.command == "off":
        off_all(args)
    elif args.into:
        write_tables(args.into, args.results)
    else:
        show_tables(args.results, args.base)


if __name__ == "__main__":
    run(main)
