"""TODO viz/__main__.py"""
import argparse

import torch

from ccra import VLM
from core.common import UserError, run
from core.device import pick_device
from core.tokenizer import Tokenizer
from toy import world as toy
from viz.pointing import depths, pointing, show_depths, show_pointing


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--pointing", action="store_true", help="score the maps of \"Where is the X?\" by X's box")
    what.add_argument("--depth", action="store_true", help="mean depth of LWCA's weights by kind of question")
    p.add_argument("--model", default=toy.MODEL, help="a model folder that knows the embedded world")
    p.add_argument("--n", type=int, default=500, help="how many questions (--depth: of each kind)")
    p.add_argument("--seed", type=int, default=0, help="which held-out questions")
    p.add_argument("--device", default="auto")
    args = p.parse_args(argv)
    if args.n < 2:
        raise UserError(f"--n {args.n}: an interval takes 2 questions or more")
    model = VLM.from_pretrained(args.model, dtype=torch.float32, device=pick_device(args.device)).eval()
    tokenizer = Tokenizer.from_pretrained(args.model)
    if args.pointing:
        return show_pointing(pointing(model, tokenizer, args.n, args.seed))
    show_depths(depths(model, tokenizer, args.n, args.seed), model.fuser.config.n_layers)


if __name__ == "__main__":
    run(main)
