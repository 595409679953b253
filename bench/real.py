"""CCRA in a LLaVA-1.5-7B of random weights, trained for two steps on this machine's CPU: how much
memory, beside what --plan says?

    python -m bench.make_llava --out out/llava-random --tokenizer vicuna-7b-v1.5/tokenizer.model
    python -m bench.real --model out/llava-random                 fuser and projector
    python -m bench.real --model out/llava-random --lora 16       and LoRA

One row of 640 positions a step, in float32 products, as most CPUs have no fast bfloat16; the frozen
weights stay as they are stored, in 2 bytes a number, mapped from their files.
"""
import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from core import flags
from core.common import ROOT, UserError, run
from data import EXAMPLE


def record(words: int) -> dict:
    """A question about a picture with an answer of so many words."""
    answer = " ".join(["crab", "square", "green"][i % 3] for i in range(words))
    return {"id": "0", "image": "train2-0.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is in the picture?"},
        {"from": "gpt", "value": answer}]}


def command(args: argparse.Namespace, folder: Path, *more: str) -> list[str]:
    """train.py's, for two steps of one row."""
    (folder / "x.json").write_text(json.dumps([record(400)] * 2))
    trained = ["--lora", str(args.lora)] if args.lora else ["--train", "fuser", "projector"]
    return [sys.executable, str(ROOT / "train.py"), "--stage", "2", "--model", args.model,
            "--fuser", "ccra", *trained, "--recompute", "--json", str(folder / "x.json"),
            "--images", str(EXAMPLE), "--batch", "1", "--steps", "2", "--max-length",
            str(args.positions), "--dtype", "float32", "--device", "cpu", "--workers", "0",
            "--out", str(folder / "out"), *more]


def main() -> None:
    p = flags.Parser(description=__doc__)
    p.add_argument("--model", required=True, help="a LLaVA-1.5, such as bench.make_llava's")
    p.add_argument("--lora", type=flags.whole(0, 1 << 16), default=0, metavar="R")
    p.add_argument("--positions", type=flags.whole(600, 4096), default=640)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as place:
        said = subprocess.run(command(args, Path(place), "--plan", "--gpus", "1"), check=True,
                              capture_output=True, text=True).stdout
        planned = float(re.search(r"total +([0-9.]+) GiB", said)[1])
        print(said)
        if subprocess.run(command(args, Path(place))).returncode:
            raise UserError("the training ended in an error; see above")
        with open(Path(place, "out", "log.csv")) as file:
            measured = max(float(row["peak_gib"]) for row in csv.DictReader(file))
    print(f"peak: {planned:.2f} GiB planned, {measured:.2f} GiB resident "
          f"({100 * (planned / measured - 1):+.1f}%)")


if __name__ == "__main__":
    run(main)
