"""The toy world: look at it, and make its bundled model anew.

    python -m toy show --n 12     draw scenes into out/toy/scenes.png and print their questions
    python -m toy towers          train its tokenizer, CLIP and Llama from nothing into out/toy
    python -m toy ship            copy what was trained, in float16, to assets/toy, where sample.py
                                  and eval.py look, and draw the README's pictures

Between the last two come both stages of train.py. `sh toy/retrain.sh` does all four; that takes
hours on two cores, and started again it goes on where it was stopped.
"""
from core.common import run  # first: from here on Ctrl-C is a line

# isort: split
import argparse
import math
import shutil
from pathlib import Path

from PIL import Image

from core import flags
from core.common import write_json
from core.folders import read_config
from core.tokenizer import Tokenizer
from core.weights import Tensors, save
from data import EXAMPLE
from toy.dataset import ToyScenes
from toy.questions import caption, conversation
from toy.towers import train_towers
from toy.world import ASSETS, MODEL, OUT, SCENE, SIZE, draw, make_scene


def show(args: argparse.Namespace) -> None:
    """Scenes and their questions, as a picture to look at and as text."""
    keys = [f"{args.split}/{i}" for i in range(args.n)]
    for scene in map(make_scene, keys):
        print(f"{scene.key}: {caption(scene)}")
        for question, answer in conversation(scene):
            print(f"    {question}  {answer}")
    OUT.mkdir(parents=True, exist_ok=True)
    sheet(keys).save(OUT / "scenes.png")
    print(f"drawn in {OUT / 'scenes.png'}")


def sheet(keys: list[str], columns: int = 6) -> Image.Image:
    """The pictures of some scenes on one, at twice their size."""
    rows, step = math.ceil(len(keys) / columns), SIZE + 8
    image = Image.new("RGB", (columns * step, rows * step), "black")
    for i, key in enumerate(keys):
        image.paste(draw(make_scene(key)), (i % columns * step + 4, i // columns * step + 4))
    return image.resize((image.width * 2, image.height * 2))


def towers(args: argparse.Namespace) -> None:
    """Both towers, in order; what is already there is not done again."""
    train_towers(args.out, args.clip_steps, args.llama_steps)
    print(f"the towers are in {args.out}")


def ship(args: argparse.Namespace) -> None:
    """The bundled model, and what else of this world lies in assets."""
    source = OUT / "stage2"
    config = {**read_config(source), "world": "toy"}
    save(MODEL, {name: tensor.half() for name, tensor in Tensors(source).items()}, config)
    shutil.copyfile(source / "tokenizer.model", MODEL / "tokenizer.model")
    (MODEL / "logs").mkdir(exist_ok=True)                                # how it was trained
    for log in ("clip.csv", "llama.csv", "stage1/log.csv", "stage2/log.csv"):
        shutil.copyfile(OUT / log, MODEL / "logs" / log.replace("/log", ""))
    draw(make_scene(SCENE)).save(ASSETS / "scene.png")
    sheet([f"show/{i}" for i in range(12)]).save(ASSETS / "scenes.png", optimize=True)
    write_example(EXAMPLE)
    size = sum(file.stat().st_size for file in MODEL.iterdir())
    print(f"{MODEL}: {size / 1e6:.1f} MB")


def write_example(folder: Path) -> None:
    """Some training samples of both stages as a json of LLaVA's, with their pictures: what `python
    data.py show` shows where no json is given."""
    tokenizer = Tokenizer.from_pretrained(MODEL)
    folder.mkdir(parents=True, exist_ok=True)
    for stage, n in ((1, 8), (2, 16)):
        scenes = ToyScenes(f"train{stage}", n, stage, tokenizer)
        names = [f"train{stage}-{i}.png" for i in range(n)]
        for i, name in enumerate(names):
            draw(scenes.scene(i)).save(folder / name, optimize=True)
        write_json(folder / f"stage{stage}.json",
                   [scenes.record(i, name) for i, name in enumerate(names)])


def main(argv: list[str] | None = None) -> None:
    p = flags.Parser(prog="python -m toy", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="show | towers | ship")
    c = commands.add_parser("show", help="draw scenes and print their questions")
    c.set_defaults(run=show)
    c.add_argument("--n", type=flags.whole(1, 100_000), default=12, help="how many (default: 12)")
    c.add_argument("--split", default="train2",
                   help="which: train1, train2, test0 (held out), or any word (default: train2)")
    c = commands.add_parser("towers", help="train the tokenizer, CLIP and Llama from nothing")
    c.set_defaults(run=towers)
    c.add_argument("--clip-steps", type=flags.whole(1, flags.MANY), default=4000,
                   help="default: 4000")
    c.add_argument("--llama-steps", type=flags.whole(1, flags.MANY), default=4500,
                   help="default: 4500")
    c.add_argument("--out", type=Path, default=OUT, help=f"folder (default: {OUT})")
    c = commands.add_parser("ship", help="copy the trained model to assets/toy")
    c.set_defaults(run=ship)
    args = p.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run(main, "what was finished is kept, and the same command goes on from there")
