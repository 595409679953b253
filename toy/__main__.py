"""TODO toy/__main__.py"""
import argparse
import math
import shutil
import subprocess
import sys

from PIL import Image

from core.common import ROOT, UserError, read_config, run
from core.weights import Tensors, save
from toy.questions import caption, conversation
from toy.world import ASSETS, MODEL, OUT, SCENE, SIZE, draw, make_scene

# --------------------------------------------------------------------------------------------------
# commands


def retrain(args):
    """Everything from nothing, in order; what is already there is not done again."""
    from toy.towers import train_towers  # which imports this file
    train_towers(OUT, args.clip_steps, args.llama_steps)
    for stage in (1, 2):
        if not (OUT / f"stage{stage}" / "model.safetensors").exists():
            call("train.py", "--stage", str(stage))
    print(f"the model is in {OUT / 'stage2'}; `python toy.py ship` puts it where sample.py looks")


def study(args):
    """study.py's runs that are not done yet, and what they say."""
    for command in ("run", "off", "table"):
        call("study.py", command)


def call(program: str, *words: str) -> None:
    """Another of these programs, in a process of its own. If it fails it has said why, and so this
    one ends, too."""
    if code := subprocess.run([sys.executable, str(ROOT / program), *words]).returncode:
        sys.exit(code)


def ship(args):
    """Write stage 2's model to assets/toy in float16, and the README's pictures."""
    source = OUT / "stage2"
    tensors = {name: tensor.half() for name, tensor in Tensors(source).items()}
    save(MODEL, tensors, {**read_config(source), "world": "toy"})
    shutil.copyfile(source / "tokenizer.model", MODEL / "tokenizer.model")
    for log in ("clip.csv", "llama.csv", "stage1/log.csv", "stage2/log.csv"):   # how it was trained
        (MODEL / "logs").mkdir(exist_ok=True)
        shutil.copyfile(OUT / log, MODEL / "logs" / log.replace("/log", ""))
    draw(make_scene(SCENE)).save(ASSETS / "scene.png")
    sheet([f"show/{i}" for i in range(12)]).save(ASSETS / "scenes.png", optimize=True)
    size = sum(f.stat().st_size for f in MODEL.iterdir())
    print(f"{MODEL}: {size / 1e6:.1f} MB")


def sheet(keys, columns=6):
    """The pictures of some scenes on one, at twice their size."""
    rows, step = math.ceil(len(keys) / columns), SIZE + 8
    image = Image.new("RGB", (columns * step, rows * step), "black")
    for i, key in enumerate(keys):
        image.paste(draw(make_scene(key)), (i % columns * step + 4, i // columns * step + 4))
    return image.resize((image.width * 2, image.height * 2))


def show(args):
    """Scenes and their questions, as a picture to look at and as text."""
    keys = [f"{args.split}/{i}" for i in range(args.n)]
    for scene in map(make_scene, keys):
        print(f"{scene.key}: {caption(scene)}")
        for question, answer in conversation(scene):
            print(f"    {question}  {answer}")
    OUT.mkdir(parents=True, exist_ok=True)
    sheet(keys).save(OUT / "scenes.png")
    print(f"drawn in {OUT / 'scenes.png'}")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="command", required=True)
    s = sub.add_parser("show", help="draw scenes and print their questions")
    s.add_argument("--n", type=int, default=12)
    s.add_argument("--split", default="train2",
                   help="which scenes: train1, train2, or test0 (held out)")
    s = sub.add_parser("retrain",
                       help="train everything from nothing (hours; goes on where it stopped)")
    s.add_argument("--clip-steps", type=int, default=4000)
    s.add_argument("--llama-steps", type=int, default=4500)
    sub.add_parser("study",
                   help="does CCRA work? (docs/study.md; hours; started twice, it uses two cores)")
    sub.add_parser("ship", help="copy the retrained model to assets/toy, where sample.py looks")
    args = p.parse_args()
    if args.command == "show" and args.n < 1:
        raise UserError("--n should be at least 1")
    dict(show=show, retrain=retrain, study=study, ship=ship)[args.command](args)


if __name__ == "__main__":
    run(main)
