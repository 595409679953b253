"""Does the model look where it should? Numbers, from the toy world, whose pictures are known to the
pixel.

    python -m viz --pointing      500 held-out "Where is the X?": do the maps lie on X?
    python -m viz --depth         do questions about looks use shallower layers than questions that
                                  need counting?

Pictures and pages of single questions are drawn by sample.py (--heatmap, --html).
"""

from core import flags
from core.common import run
from eval import load_model
from toy import world as toy
from training import adapters
from viz.pointing import depths, pointing, show_depths, show_pointing


def main(argv: list[str] | None = None) -> None:
    p = flags.Parser(description=__doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--pointing", action="store_true",
                      help="score the maps of \"Where is the X?\" by X's box")
    what.add_argument("--depth", action="store_true",
                      help="mean depth of LWCA's weights by kind of question")
    p.add_argument("--model", default=toy.MODEL, help="a model folder that knows the toy world")
    adapters.option(p)
    p.add_argument("--n", type=flags.whole(2, 1_000_000), default=500,
                   help="how many questions (--depth: of each kind)")
    p.add_argument("--seed", type=flags.seed, default=0, help="which held-out questions")
    p.add_argument("--device", default="auto")
    args = p.parse_args(argv)
    model, tokenizer, _ = load_model(args.model, args.device, "float32", adapter=args.adapter)
    if args.pointing:
        return show_pointing(pointing(model, tokenizer, args.n, args.seed))
    show_depths(depths(model, tokenizer, args.n, args.seed), model.fuser.config.n_layers)


if __name__ == "__main__":
    run(main)
