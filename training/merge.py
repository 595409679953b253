"""Write a base model with its adapter in it as one folder.

    python -m training.merge --model llava-1.5-7b-hf --adapter out/mine --out out/mine-whole
    python -m training.merge --model llava-v1.5-7b --vision clip-vit-large-patch14-336 \\
                             --adapter out/mine --out out/mine-whole
    python -m training.merge --model llava-1.5-7b-hf --adapter lora --out whole --llava-hf

An adapter is what `train.py --lora` or `--train fuser projector` writes: megabytes beside a base
that stays as it is. `sample.py --model BASE --adapter DIR` and eval.py put the two together each
time they start; this does it once. LoRA is added to the matrices (W + alpha / r B A, summed in
float32), fuser and projector are the adapter's, and every tensor has the number format that it has
in the base. The result is a folder like any that train.py writes.

The adapter has to belong to this base: all of the base is read to make sure. LoRA that PEFT wrote
for a LLaVA (adapter_config.json, adapter_model.safetensors) is taken, too, but doesn't know its
base. --llava-hf writes llava-hf's layout, which transformers reads; only plain LLaVA, so LoRA
without CCRA, has a place in that.
"""
from core.common import run  # first: from here on Ctrl-C is a line

# isort: split
import argparse
from pathlib import Path

from ccra import VLM, outline
from core import flags
from core.common import UserError, clear_tmp, lock, make_folder
from core.layouts import open_vlm
from core.tokenizer import Tokenizer
from core.weights import stored_bytes
from fusers.llava import LLaVA
from training import adapters
from training.checkpoints import amount, free_bytes
from training.export import export_llava


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as that goes without a model."""
    p = flags.Parser(prog="python -m training.merge", description=__doc__)
    p.add_argument("--model", required=True, metavar="BASE",
                   help="the model that the adapter was trained beside")
    p.add_argument("--vision", metavar="DIR",
                   help="the CLIP folder for a base that has no vision tower (liuhaotian's LLaVA)")
    p.add_argument("--adapter", required=True, metavar="DIR", help="what was learnt beside it")
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to write")
    p.add_argument("--llava-hf", action="store_true",
                   help="in llava-hf's layout, for transformers (plain LLaVA with LoRA)")
    args = p.parse_args(argv)
    sources = [Path(dir) for dir in (args.model, args.vision, args.adapter) if dir]
    if args.out.exists() and any(dir.exists() and dir.samefile(args.out) for dir in sources):
        raise UserError(f"--out {args.out}: is read from; choose another folder")
    if adapters.files(args.out):
        raise UserError(f"--out {args.out}: holds an adapter; choose another folder")
    return args


def plain(args: argparse.Namespace) -> bool:
    """Whether what comes out is plain LLaVA."""
    about = adapters.read(args.adapter).about
    if about and about["fuser"]:
        return (about["fuser"].get("name"), about["fuser"].get("copies", 1)) == (LLaVA.name, 1)
    return isinstance(outline(*open_vlm(args.model, args.vision)).fuser, LLaVA)


def check_out(args: argparse.Namespace) -> None:
    """UserError, before work starts, for what can't be written."""
    if args.llava_hf and not plain(args):
        raise UserError("--llava-hf is for plain LLaVA, which this isn't: its fuser has no place "
                        "in that layout; leave the flag out")
    make_folder(args.out)
    need = stored_bytes(args.model) + (stored_bytes(args.vision) if args.vision else 0)
    if free_bytes(args.out) < 1.02 * need:
        raise UserError(f"--out {args.out}: the model takes {amount(need)}, but only "
                        f"{amount(free_bytes(args.out))} are free; choose another disk")


def write(model: VLM, args: argparse.Namespace) -> None:
    """The folder, with a copy of the base's tokenizer."""
    tokenizer_file = Tokenizer.from_pretrained(args.model).file
    with lock(args.out, "merge"):
        clear_tmp(args.out, "model*.safetensors", "model*.json", "config.json", "tokenizer*")
        if args.llava_hf:
            export_llava(model, args.out, tokenizer_file)
        else:
            model.save_pretrained(args.out, tokenizer_file)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    check_out(args)
    model = adapters.load(args.model, args.adapter, args.vision, whole=True)
    write(model, args)
    print(f"{args.model} with {args.adapter} written to {args.out}")


if __name__ == "__main__":
    run(main)
