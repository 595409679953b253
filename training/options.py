"""train.py's arguments: what there is, its defaults, and what doesn't go together."""
import argparse
import os
from argparse import BooleanOptionalAction
from importlib.util import find_spec
from pathlib import Path

import data
from ccra import NAMED, NORMS, ORDERS
from core import flags
from core.common import UserError
from core.flags import MANY, whole
from training import plan
from training.order import GROUPS

# Table 5 of the paper, and what suits the toy world's small towers.
RECIPES = {
    ("llava", 1): dict(batch=256, lr=1e-3, micro=8),  # 34 GiB (docs/gpu.md); LLaVA's 32 would be 97
    ("llava", 2): dict(batch=128, lr=1e-5, micro=16),
    ("toy", 1): dict(batch=32, lr=3e-3),
    ("toy", 2): dict(batch=32, lr=1e-3, micro=8),  # a quarter of the padding: see `shares`
}
# LLaVA's of finetune_lora.sh, for whatever leaves the language model's own weights as they are: its
# adapters' rate, which CCRA takes too, and the projector's
GENTLE = {"llava": dict(lr=2e-4, lr_projector=2e-5), "toy": dict(lr=1e-3)}
PARTS = ("fuser", "projector", "llm", "vision")
TOY_STEPS = {1: 300, 2: 6500}
PAPER_STEPS = {1: 2179, 2: 5194}         # Table 5, of 557,824 and 664,832 samples

HUB = "https://huggingface.co/"
# Where a stage looks, and where that comes from. {(world, stage): {flag: (place, source)}}
PLACES = {
    ("llava", 1): dict(
        data=("data/stage1", f"""python data.py prepare --template plain --out data/stage1
            --llm models/vicuna-7b-v1.5 --json data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
            --images data/LLaVA-Pretrain/images
            of {HUB}datasets/liuhaotian/LLaVA-Pretrain"""),
        vision=("models/clip-vit-large-patch14-336", f"{HUB}openai/clip-vit-large-patch14-336"),
        llm=("models/vicuna-7b-v1.5", f"{HUB}lmsys/vicuna-7b-v1.5")),
    ("llava", 2): dict(
        data=("data/stage2", f"""python data.py prepare --out data/stage2
            --llm models/vicuna-7b-v1.5 --json data/llava_v1_5_mix665k.json --images data
            of {HUB}datasets/liuhaotian/LLaVA-Instruct-150K; beside it in data/ the pictures that
            LLaVA's README links: coco/train2017, gqa/images, ocr_vqa/images,
            textvqa/train_images, vg/VG_100K, vg/VG_100K_2"""),
        model=("out/llava/stage1", "train.py --stage 1")),
    ("toy", 1): dict(
        vision=("out/toy/clip", "sh toy/retrain.sh"), llm=("out/toy/llama", "sh toy/retrain.sh")),
    ("toy", 2): dict(
        model=("out/toy/stage1", "train.py --stage 1")),
}


# --------------------------------------------------------------------------------------------------
# What there is

def arguments(argv: list[str] | None = None, about: str | None = None) -> argparse.Namespace:
    """train.py's arguments, complete. about: what -h says first. UserError for what makes no sense.
    """
    p = flags.Parser(description=about)
    general(p)
    about_data(p.add_argument_group("data"))
    about_model(p.add_argument_group("model"))
    about_trained(p.add_argument_group("what is trained (stage 2)"))
    about_steps(p.add_argument_group(
        "optimisation (the defaults are Table 5's, or the toy world's own)"))
    about_processes(p.add_argument_group("several processes and large models"))
    about_running(p.add_argument_group("while it runs"))
    about_planning(p.add_argument_group("planning"))
    return complete(p.parse_args(argv))


def general(p) -> None:
    p.add_argument("--stage", type=int, choices=(1, 2), help="1: captions; 2: instruction tuning "
                   "(default: 2 where --model is given)")
    p.add_argument("--world", choices=("toy", "llava"), help="what to train on (default: llava "
                   "under torchrun or with --json, else toy)")
    p.add_argument("--out", help="for checkpoints, log.csv, the model (default: out/WORLD/stageN)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                   help="of matrix products; what is trained is kept in float32 (auto: bfloat16 "
                   "where the hardware multiplies it)")
    p.add_argument("--threads", type=flags.threads, default=0,
                   help="CPU threads (default: torch's choice); they change rounding")


def about_data(g) -> None:
    g.add_argument("--data",
                   help="a folder that `python data.py prepare` wrote: a LLaVA json of any size")
    g.add_argument("--json", help="a LLaVA json as it is: for thousands of records, not for "
                   "hundreds of thousands")
    g.add_argument("--images", help="the folder that the pictures' paths are relative to (with "
                   "--data: prepare's)")
    g.add_argument("--upright", action="store_true", help="turn pictures as their orientation tags "
                   "(EXIF) say; LLaVA takes them as stored, which is the default")
    g.add_argument("--group", choices=GROUPS, help="samples of like length into a step (needs "
                   "--data; default: modality-length in stage 2, as LLaVA, else none)")
    g.add_argument("--workers", type=flags.workers,
                   help="processes that read pictures (default: toy world 1, else 4)")


def about_model(g) -> None:
    g.add_argument("--vision", help="stage 1: folder of the CLIP tower; stage 2: only for a "
                   "--model without one (liuhaotian's LLaVA)")
    g.add_argument("--llm", help="stage 1: folder of the language model")
    g.add_argument("--model", help="stage 2: what stage 1 wrote (default: stage 1's default "
                   "--out), any model of ours, or LLaVA-1.5. Plain LLaVA with --fuser ccra (pwca, "
                   "lwca, wide) answers as before at first, and learns from there")
    g.add_argument("--start", choices=("both", "kept"), help="stage 2 of a stage 1 without CCRA: "
                   "both halves of its projector, as the paper (default), or [0 | Wa + Wb], which "
                   "answers as stage 1 did whatever CCRA's first numbers are")
    g.add_argument("--fuser", choices=NAMED, help="what stands between the towers (README; "
                   "default: ccra, in stage 2 stage 1's)")
    g.add_argument("--stage1-ccra", choices=("off", "neutral", "on"), default="off",
                   help="stage 1 without CCRA (section 4.1), with neutral maps, or asked by the "
                   "caption's prompt")
    g.add_argument("--query", choices=data.QUERIES, help="the questions of a conversation that "
                   "CCRA reads the picture with: all (default), those so far (a row for every "
                   "turn), or the first")
    g.add_argument("--norm", choices=NORMS, help="LN of eq. 5 and 13 (README; default: joint)")
    g.add_argument("--order", choices=ORDERS, help="Figure 5 (default: progressive, which is PAI)")
    g.add_argument("--off", nargs="+", choices=("lpwca", "lwca", "pwca", "smooth"),
                   help="parts made neutral (Table 4)")


def about_trained(g) -> None:
    g.add_argument("--train", nargs="+", choices=PARTS, metavar="PART", help="of fuser, projector, "
                   "llm, vision (default: fuser projector llm). Without llm and vision --out is an "
                   "adapter: for sample.py --adapter, eval.py --adapter, python -m training.merge")
    g.add_argument("--train-vision", action="store_true", help="the vision tower, too (appendix B)")
    g.add_argument("--lora", type=whole(1, 1 << 16), metavar="R", help="instead of llm: "
                   "matrices of rank R beside the seven of each of its blocks")
    g.add_argument("--lora-alpha", type=flags.real(1e-3, 1e6), metavar="A",
                   help="what they give is multiplied by A / R (default: 2 R)")
    for part in ("fuser", "projector", "llm"):
        g.add_argument(f"--lr-{part}", type=flags.real(1e-12, 10), metavar="LR",
                       help=f"the {part}'s own peak learning rate (default: --lr's)"
                       + "; of its LoRA, too" * (part == "llm"))


def about_steps(g) -> None:
    g.add_argument("--batch", type=flags.batch,
                   help="samples in a step, over all processes")
    g.add_argument("--micro", type=flags.batch, help="samples in a forward pass of one process "
                   "(default: 8 and 16; the toy world's 32 and 8)")
    g.add_argument("--lr", type=flags.real(1e-12, 10),
                   help="peak learning rate: 3%% warm-up, then half a cosine to zero")
    g.add_argument("--warmup", type=flags.share, default=0.03, help="share of the steps")
    g.add_argument("--steps", type=whole(1, MANY), help="default: one epoch")
    g.add_argument("--max-length", type=whole(1, 1 << 17), help="tokens of a row, the picture's "
                   "included (default: 2048; for --plan of stage 1 640, since captions are short)")
    g.add_argument("--seed", type=flags.seed, default=42)


def about_processes(g) -> None:
    g.add_argument("--parallel", choices=("none", "ddp", "fsdp"), help="every process holds the "
                   "whole model, or a slice (default: none alone; together ddp in stage 1, fsdp in "
                   "stage 2)")
    g.add_argument("--shard", choices=("full", "grad"), default="full", help="fsdp: slice "
                   "parameters between forward and backward, too (least memory, like ZeRO-3), or "
                   "keep them (less talk, like ZeRO-2)")
    g.add_argument("--shard-size", type=whole(0, 65_536), default=0, help="fsdp: processes that "
                   "share one copy of the model (default: those of one machine; further machines "
                   "hold copies: HSDP)")
    g.add_argument("--recompute", action=BooleanOptionalAction, help="forget what happens inside "
                   "of a block and compute it again in the backward (default: with fsdp)")
    g.add_argument("--compile", action="store_true", help="torch.compile for every block")


def about_running(g) -> None:
    g.add_argument("--save-every", type=whole(1, MANY), default=100,
                   help="steps between checkpoints")
    g.add_argument("--keep", type=whole(1, 1000), default=2,
                   help="how many checkpoints stay")
    g.add_argument("--stop-after", type=whole(0, MANY), default=0,
                   help="stop after this step as if interrupted (0: never)")
    g.add_argument("--ask-every", type=whole(0, MANY), default=0, metavar="N",
                   help="every N steps, answers to a few held-out questions of the toy world")
    g.add_argument("--val", type=Path, metavar="FILE.json", help="held-out records in LLaVA's "
                   "format: their loss, and how many of their answers are right when asked")
    g.add_argument("--val-images", type=Path, metavar="DIR", help="the folder of their pictures "
                   "(default: the training's)")
    g.add_argument("--val-every", type=whole(1, MANY), default=100, metavar="N",
                   help="measured every N steps, and after the last (default: %(default)s)")
    g.add_argument("--val-n", type=whole(0, MANY), default=200, metavar="K", help="how many of "
                   "them are asked, always the same ones (default: %(default)s; 0: none)")
    g.add_argument("--keep-best", action="store_true", help="the model in the end is that of the "
                   "step with the most right answers, of these with the least loss")
    g.add_argument("--wandb", action="store_true", help="send the log to Weights & Biases, too")


def about_planning(g) -> None:
    g.add_argument("--plan", action="store_true", help="print what training will take, and end")
    g.add_argument("--gpus", type=whole(1, 512), default=8, help="how many")
    g.add_argument("--gpu", choices=plan.GPUS, default="a100-80", help="which")
    g.add_argument("--mfu", type=flags.real(0.001, 1), default=0.4, help="share of the GPU's peak "
                   "that is reached (docs/gpu.md: 38 to 43%%)")


# --------------------------------------------------------------------------------------------------
# Defaults that depend on other arguments, and what doesn't go together

def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The same arguments with every default filled in. UserError for what doesn't go together."""
    if args.stage is None and not args.model:
        raise UserError("say which: --stage 1 (captions; makes a model of two towers), or "
                        "--stage 2 (instruction tuning; goes on with one)")
    args.stage = args.stage or 2
    if not args.val and (args.val_images or args.keep_best):
        raise UserError("--val-images and --keep-best belong to --val FILE.json")
    choose_data(args)
    choose_model(args)
    choose_trained(args)
    choose_processes(args)
    if args.wandb and not find_spec("wandb"):
        raise UserError("--wandb needs `pip install wandb`")
    recipe = RECIPES[args.world, args.stage]
    args.batch = args.batch or recipe["batch"]
    choose_rates(args, recipe["lr"])
    args.micro = args.micro or recipe.get("micro", args.batch)
    args.max_length = args.max_length or (640 if args.plan and args.stage == 1 else 2048)
    args.out = Path(args.out or f"out/{args.world}/stage{args.stage}")
    return args


def choose_data(args) -> None:
    """The world, its places and what is read of it."""
    given = args.json or args.data
    if args.world is None:
        large = given or args.plan or "WORLD_SIZE" in os.environ
        args.world = "llava" if large else "toy"
    if args.json and args.data:
        raise UserError("--json and --data are two ways to say what to train on: give one")
    if args.world == "toy" and given:
        raise UserError(f"{given} is data of its own: leave --world toy out")
    if args.world == "toy" and args.plan:
        raise UserError("--plan is about LLaVA's data and sizes like it: leave --world toy out")
    if args.images and not given and args.world == "toy":
        raise UserError("--images belongs to --json or --data")
    if args.upright and args.world == "toy":
        raise UserError("--upright belongs to --json or --data: no toy picture is turned")
    if args.stage == 1 and args.model:
        raise UserError("--model is what stage 2 begins with; stage 1 makes one of --vision and "
                        "--llm")
    if args.stage == 2 and (args.llm or args.vision and not args.model):
        raise UserError("--vision and --llm are chosen in stage 1; stage 2 goes on with that model "
                        "(--model)")
    for flag, (place, _) in PLACES[args.world, args.stage].items():
        if getattr(args, flag) is None and not (flag == "data" and args.json):
            setattr(args, flag, place)
    args.group = args.group or ("modality-length" if args.data and args.stage == 2 else "none")
    if args.group != "none" and not args.data:
        raise UserError(f"--group {args.group} needs lengths: `python data.py prepare` the json, "
                        "and give --data")
    if args.workers is None:
        args.workers = 1 if args.world == "toy" else 4


def choose_model(args) -> None:
    """mode: how CCRA runs in this stage."""
    if args.fuser not in (None, "ccra") and (args.norm or args.order or args.off):
        raise UserError(f"--norm, --order and --off belong to CCRA, not to --fuser {args.fuser}")
    args.mode = args.stage1_ccra if args.stage == 1 else "on"


def choose_trained(args) -> None:
    """train: the parts that are trained, by name; empty for those of the stage (train.freeze)."""
    for flag in ("train", "lora", "lora_alpha", "lr_fuser", "lr_projector", "lr_llm", "start"):
        if getattr(args, flag) and args.stage == 1:
            raise UserError(f"--{flag.replace('_', '-')} belongs to --stage 2")
    if args.train_vision and args.stage == 1:
        raise UserError("--train-vision belongs to --stage 2")
    if args.lora and "llm" in (args.train or ()):
        raise UserError("--lora trains matrices beside those of the language model, and \"llm\" in "
                        "--train those themselves: choose one")
    if args.lora_alpha and not args.lora:
        raise UserError("--lora-alpha belongs to --lora")
    args.lora_alpha = args.lora_alpha or 2.0 * (args.lora or 0)
    if args.lora and not args.train:
        args.train = ["fuser", "projector"]
    args.train = [part for part in PARTS if part in (args.train or ())]
    if args.train_vision and args.train:
        args.train = [part for part in PARTS if part in (*args.train, "vision")]
    args.train_vision = args.train_vision or "vision" in args.train
    args.adapter = bool(args.train) and not {"llm", "vision"} & {*args.train}


def choose_rates(args, usual: float) -> None:
    """lr, and rates: the parts' own."""
    trained = {*(args.train or PARTS[:3]), *(["llm"] if args.lora else [])}
    given = {part: getattr(args, f"lr_{part}") for part in PARTS[:3]}
    for part, lr in given.items():
        if lr and part not in trained:
            raise UserError(f"--lr-{part}: the {part} isn't trained (--train)")
    gentle = GENTLE[args.world] if args.adapter else {}
    if args.lr is None:
        given["projector"] = given["projector"] or gentle.get("lr_projector")
    args.lr = args.lr or gentle.get("lr", usual)
    args.rates = {part: lr for part, lr in given.items()
                  if lr and lr != args.lr and part in trained}


def choose_processes(args) -> None:
    """How the model is shared out, and whether blocks are recomputed."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.parallel is None:
        together = "ddp" if args.stage == 1 else "fsdp"
        alone = args.gpus == 1 if args.plan else processes == 1
        args.parallel = "none" if alone else together
    if args.parallel == "none" and processes > 1:
        raise UserError(f"--parallel none doesn't go with {processes} processes")
    if args.parallel != "none" and "WORLD_SIZE" not in os.environ and not args.plan:
        raise UserError(f"--parallel {args.parallel} needs torchrun "
                        "(torchrun --nproc_per_node=N train.py ...)")
    if args.recompute is None:
        args.recompute = args.parallel == "fsdp"


def check_places(args) -> None:
    """UserError with everything that is missing, where it was looked for and where to get it,
    before work starts.

    In the toy world only the usual places are looked at: what was named there says itself what it
    lacks.
    """
    missing = [(flag, getattr(args, flag), place, source)
               for flag, (place, source) in PLACES[args.world, args.stage].items()
               if getattr(args, flag) and not Path(getattr(args, flag)).exists()]
    if args.world == "llava" and missing:
        lines = [line for flag, given, _, source in missing
                 for line in (f"  --{flag:7} {given}", f"            from {source}")]
        raise UserError(f"stage {args.stage} needs what isn't there; get it, or say where it is:",
                        *lines, "For the toy world, which needs nothing: --world toy")
    for _, given, place, source in missing:
        if given == place and args.stage == 1:
            raise UserError(
                f"{place}: not there yet; `{source}` makes the toy world's towers, or take the "
                "study's: --vision study/towers/clip --llm study/towers/llama")
        if given == place:
            raise UserError(f"{place}: not there yet; run --stage 1 first, or give --model")
