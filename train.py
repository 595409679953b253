"""Train a vision-language model with CCRA: both stages of the paper (section 4.1, Table 5, Algorithm 1).

    python train.py --stage 1          the projector alone learns to turn pictures into "words" (captions)
    python train.py --stage 2          projector, CCRA and language model learn to answer questions
    torchrun --nproc_per_node=8 train.py --stage 2          the paper's training on eight GPUs
    python train.py --stage 2 --plan --gpus 8 --gpu a100-80          what that takes, without a GPU

One process trains the embedded world (toy.py) on whatever this machine has; under torchrun it is LLaVA's data and
public towers, in the places that are printed when something is missing. --world says otherwise, and so does --json.

The loss is the sum over the supervised tokens of the whole global batch divided by their number, so cutting a batch
into micro-batches (--micro), or sharing it out among processes, changes no gradient. (LLaVA averages the means of
micro-batches, which gives a token of a short answer more weight.)
A run that was stopped goes on where it was, bit for bit, when the same command is given again; on another number of
processes, too, with sums in another order.
"""
import argparse
import csv
import json
import math
import os
import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import islice, tee
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from training import curve
import data
from training import parallel
from training import plan
from toy import world as toy
from ccra import NAMED, NORMS, ORDERS, VLM, outline
from clip import CLIPVision, CLIPVisionConfig
from data import GROUPS, order, split
from core.layouts import Folder
from fast.linear import keep_memory
from llama import Llama, LlamaConfig, Tokenizer
from training.parallel import total
from training.prepare import Prepared
from core.weights import UserError, autocast_dtype, read_json, run, skeleton, write_beside

# Table 5 of the paper, and what suits the embedded world's small towers.
RECIPES = {
    ("llava", 1): dict(batch=256, lr=1e-3, micro=8),        # 34 GiB (docs/gpu.md); LLaVA's 32 would be 97
    ("llava", 2): dict(batch=128, lr=1e-5, micro=16),
    ("toy", 1): dict(batch=32, lr=3e-3),
    ("toy", 2): dict(batch=32, lr=1e-3, micro=8),        # a quarter of the padding: see `shares`
}
TOY_STEPS = {1: 300, 2: 6500}
PAPER_STEPS = {1: 2179, 2: 5194}         # Table 5, of 557,824 and 664,832 samples
VICUNA = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
              num_attention_heads=32, rms_norm_eps=1e-5, max_position_embeddings=4096)

# Where `torchrun train.py --stage N` looks, and where that comes from. (flag, stage): (place, source)
HUB = "https://huggingface.co/"
PLACES = {
    ("data", 1): ("data/stage1", f"""python data.py prepare --template plain --out data/stage1
            --llm models/vicuna-7b-v1.5 --json data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
            --images data/LLaVA-Pretrain/images
            of {HUB}datasets/liuhaotian/LLaVA-Pretrain"""),
    ("data", 2): ("data/stage2", f"""python data.py prepare --out data/stage2 --llm models/vicuna-7b-v1.5
            --json data/llava_v1_5_mix665k.json --images data
            of {HUB}datasets/liuhaotian/LLaVA-Instruct-150K; beside it in data/ the pictures that
            LLaVA's README links: coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K,
            vg/VG_100K_2"""),
    ("vision", 1): ("models/clip-vit-large-patch14-336", f"{HUB}openai/clip-vit-large-patch14-336"),
    ("llm", 1): ("models/vicuna-7b-v1.5", f"{HUB}lmsys/vicuna-7b-v1.5"),
    ("model", 2): ("out/llava/stage1", "train.py --stage 1"),
}


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", type=int, choices=(1, 2), required=True, help="1: captions; 2: instruction tuning")
    p.add_argument("--world", choices=("toy", "llava"), help="what to train on (default: llava under torchrun or with "
                   "--json, else toy)")
    p.add_argument("--out", help="for checkpoints, log.csv, the model (default: out/WORLD/stageN)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of matrix products; what "
                   "is trained is kept in float32 (auto: bfloat16 where the hardware multiplies it)")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice); they change rounding")
    g = p.add_argument_group("data")
    g.add_argument("--data", help="a folder that `python data.py prepare` wrote: a LLaVA json of any size")
    g.add_argument("--json", help="a LLaVA json as it is: for thousands of records, not for hundreds of thousands")
    g.add_argument("--images", help="the folder that the pictures' paths are relative to (with --data: prepare's)")
    g.add_argument("--group", choices=GROUPS, help="samples of like length into a step (needs --data; default: "
                   "modality-length in stage 2, as LLaVA, else none)")
    g.add_argument("--workers", type=int, help="processes that read pictures (default: embedded world 1, else 4)")
    g = p.add_argument_group("model")
    g.add_argument("--vision", help="stage 1: folder of the CLIP tower")
    g.add_argument("--llm", help="stage 1: folder of the language model")
    g.add_argument("--model", help="stage 2: what stage 1 wrote (default: stage 1's default --out)")
    g.add_argument("--fuser", choices=NAMED, help="what stands between the towers (README; default: ccra, in stage 2 "
                   "stage 1's)")
    g.add_argument("--stage1-ccra", choices=("off", "neutral", "on"), default="off",
                   help="stage 1 without CCRA (section 4.1), with neutral maps, or asked by the caption's prompt")
    g.add_argument("--train-vision", action="store_true", help="stage 2: train the vision tower, too (appendix B)")
    g.add_argument("--query", choices=data.QUERIES, help="the questions of a conversation that CCRA reads the picture "
                   "with: all (default), those so far (a row for every turn), or the first")
    g.add_argument("--norm", choices=NORMS, help="LN of eq. 5 and 13 (README; default: joint)")
    g.add_argument("--order", choices=ORDERS, help="Figure 5 (default: progressive, which is PAI)")
    g.add_argument("--off", nargs="+", choices=("lpwca", "lwca", "pwca", "smooth"), help="parts made neutral (Table 4)")
    g = p.add_argument_group("optimisation (the defaults are Table 5's, or the embedded world's own)")
    g.add_argument("--batch", type=int, help="samples in a step, over all processes")
    g.add_argument("--micro", type=int, help="samples in a forward pass of one process (default: 8 and 16; "
                   "the embedded world's 32 and 8)")
    g.add_argument("--lr", type=float, help="peak learning rate: 3%% warm-up, then half a cosine to zero")
    g.add_argument("--warmup", type=float, default=0.03, help="share of the steps")
    g.add_argument("--steps", type=int, help="default: one epoch")
    g.add_argument("--max-length", type=int, help="tokens of a row, the picture's included (default: 2048; for --plan "
                   "of stage 1 640, since captions are short)")
    g.add_argument("--seed", type=int, default=42)
    g = p.add_argument_group("several processes and large models")
    g.add_argument("--parallel", choices=("none", "ddp", "fsdp"), help="every process holds the whole model, or a "
                   "slice (default: none alone; together ddp in stage 1, fsdp in stage 2)")
    g.add_argument("--shard", choices=("full", "grad"), default="full", help="fsdp: slice parameters between forward "
                   "and backward, too (least memory, like ZeRO-3), or keep them (less talk, like ZeRO-2)")
    g.add_argument("--shard-size", type=int, default=0, help="fsdp: processes that share one copy of the model "
                   "(default: those of one machine; further machines hold copies: HSDP)")
    g.add_argument("--recompute", action=argparse.BooleanOptionalAction, help="forget what happens inside of a block "
                   "and compute it again in the backward (default: with fsdp)")
    g.add_argument("--compile", action="store_true", help="torch.compile for every block")
    g = p.add_argument_group("while it runs")
    g.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    g.add_argument("--keep", type=int, default=2, help="how many checkpoints stay")
    g.add_argument("--stop-after", type=int, default=0, help="stop after this step as if interrupted (0: never)")
    g.add_argument("--ask-every", type=int, default=0, metavar="N", help="every N steps, answers to a few held-out "
                   "questions of the embedded world")
    g.add_argument("--wandb", action="store_true", help="send the log to Weights & Biases, too")
    g = p.add_argument_group("planning")
    g.add_argument("--plan", action="store_true", help="print what training will take, and end")
    g.add_argument("--gpus", type=int, default=8, help="how many")
    g.add_argument("--gpu", choices=sorted(plan.GPUS), default="a100-80", help="which")
    g.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak that is reached "
                   "(docs/gpu.md: 38 to 43%%)")
    return complete(p.parse_args(argv))


def complete(args):
    """Defaults that depend on other arguments, and what doesn't go together."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    given = args.json or args.data
    check_numbers(args)
    args.world = args.world or ("llava" if given or args.plan or "WORLD_SIZE" in os.environ else "toy")
    if args.json and args.data:
        raise UserError("--json and --data are two ways to say what to train on: give one")
    if args.world == "toy" and given:
        raise UserError(f"{given} is data of its own: leave --world toy out")
    if args.world == "toy" and args.plan:
        raise UserError("--plan is about LLaVA's data and sizes like it: leave --world toy out")
    for (flag, stage), (place, _) in PLACES.items() if args.world == "llava" else ():
        if stage == args.stage and getattr(args, flag) is None and not (flag == "data" and args.json):
            setattr(args, flag, place)
    args.group = args.group or ("modality-length" if args.data and args.stage == 2 else "none")
    if args.group != "none" and not args.data:
        raise UserError(f"--group {args.group} needs lengths: `python data.py prepare` the json, and give --data")
    if args.images and not (args.json or args.data):
        raise UserError("--images belongs to --json or --data")
    if args.stage == 1 and args.model:
        raise UserError("--model is what stage 2 begins with; stage 1 makes one of --vision and --llm")
    if args.stage == 2 and (args.vision or args.llm):
        raise UserError("--vision and --llm are chosen in stage 1; stage 2 goes on with that model (--model)")
    if args.fuser not in (None, "ccra") and (args.norm or args.order or args.off):
        raise UserError(f"--norm, --order and --off belong to CCRA, not to --fuser {args.fuser}")
    args.mode = args.stage1_ccra if args.stage == 1 else "on"
    if args.train_vision and args.stage == 1:
        raise UserError("--train-vision belongs to --stage 2")
    if args.parallel is None:
        args.parallel = "none" if processes == 1 and not args.plan else "ddp" if args.stage == 1 else "fsdp"
    if args.parallel == "none" and processes > 1:
        raise UserError(f"--parallel none doesn't go with {processes} processes")
    if args.parallel != "none" and "WORLD_SIZE" not in os.environ and not args.plan:
        raise UserError(f"--parallel {args.parallel} needs torchrun (torchrun --nproc_per_node=N train.py ...)")
    if args.wandb and not find_spec("wandb"):
        raise UserError("--wandb needs `pip install wandb`")
    args.max_length = args.max_length or (640 if args.plan and args.stage == 1 else 2048)
    args.recompute = args.parallel == "fsdp" if args.recompute is None else args.recompute
    recipe = RECIPES[args.world, args.stage]
    args.batch = args.batch or recipe["batch"]
    args.lr = args.lr or recipe["lr"]
    args.micro = args.micro or recipe.get("micro", args.batch)
    args.workers = (1 if args.world == "toy" else 4) if args.workers is None else args.workers
    args.out = Path(args.out or f"out/{args.world}/stage{args.stage}")
    return args


def check_numbers(args):
    least = dict(batch=1, micro=1, steps=1, max_length=1, save_every=1, keep=1, gpus=1, stop_after=0, ask_every=0,
                 threads=0, workers=0, shard_size=0)
    for name, low in least.items():
        if (value := getattr(args, name)) is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} {value}: should be {low} or more")
    if args.lr is not None and args.lr <= 0 or not 0 <= args.warmup <= 1 or args.mfu <= 0:
        raise UserError("--lr and --mfu should be above 0, --warmup a share from 0 to 1")


def check_places(args):
    """UserError with everything that is missing, where it was looked for and where to get it, before work starts."""
    if args.world == "toy":
        return
    missing = [(flag, getattr(args, flag), source) for (flag, stage), (_, source) in PLACES.items()
               if stage == args.stage and getattr(args, flag) and not Path(getattr(args, flag)).exists()]
    if missing:
        lines = [f"  --{flag:7} {place}\n            from {source}" for flag, place, source in missing]
        raise UserError("\n".join([f"stage {args.stage} needs what isn't there; get it, or say where it is:"] + lines
                                  + ["For the embedded world, which needs nothing: --world toy"]))


def get_lr(step, steps, peak, warmup):
    """Linear warm-up over ceil(warmup * steps), then half a cosine to zero. step counts from 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def build(args):
    """The model before this stage, on the CPU and as it is stored, and its tokenizer."""
    if args.stage == 1:
        vision, llm = Path(args.vision or toy.OUT / "clip"), Path(args.llm or toy.OUT / "llama")
        if not (args.vision and args.llm) and not (vision / "config.json").is_file():
            raise UserError(f"{vision}: not there yet; `python toy.py retrain` makes the embedded world's towers, or "
                            "take the study's: --vision study/towers/clip --llm study/towers/llama")
        tower, model = CLIPVision.from_pretrained(vision), Llama.from_pretrained(llm, dtype=None)      # as stored
        config = fuser_config(args, tower.config, model.config)
        torch.manual_seed(args.seed)                       # the projector's and the fuser's first values
        model = VLM.build(tower, model, config, query=args.query or "all")
        if args.mode != "off" and not model.fuser.asks:
            raise UserError(f"--stage1-ccra {args.mode}: --fuser {args.fuser} doesn't read the question; leave it out")
        return model, Tokenizer.from_pretrained(llm)
    folder = Path(args.model or f"out/{args.world}/stage1")
    if not args.model and not folder.is_dir():
        raise UserError(f"{folder}: not there yet; run --stage 1 first, or give --model")
    model = VLM.from_pretrained(folder)
    if args.fuser or variant(args):
        model.fuser = refit(model.fuser, args, folder)
    model.query = args.query or model.query
    return model, Tokenizer.from_pretrained(folder)


def fuser_config(args, vision, llm):
    """The configuration of --fuser (default: CCRA) for towers of these configurations."""
    kind = NAMED[args.fuser or "ccra"][0]
    sizes = dict(text_dim=llm.hidden_size, vision_dim=vision.hidden_size, n_layers=vision.num_hidden_layers,
                 d_hidden=128 if args.world == "llava" else 64)
    return kind(**{key: n for key, n in sizes.items() if key in kind.__dataclass_fields__}, **variant(args))


def refit(fuser, args, folder):
    """Stage 1's fuser, changed as the flags say. They may change no shape, so that stage 2 can go on from it."""
    kind = NAMED[args.fuser or "ccra"][0]
    new = type(fuser)(replace(fuser.config, **variant(args))) if type(fuser.config) is kind else None
    if new is None or new.width != fuser.width:
        why = f"--fuser {args.fuser} reads otherwise: choose it in stage 1" if args.fuser else \
            "--norm, --order and --off belong to CCRA"
        raise UserError(f"{folder}: its fuser is {fuser.name!r}; {why}")
    new.load_state_dict(fuser.state_dict())
    return new


def choices(model):
    """What flags may choose about a model, as it is."""
    names = ("norm", "order", "lpwca", "lwca", "pwca", "smooth", "copies", "kind")
    chosen = {key: value for key, value in vars(model.fuser.config).items() if key in names}
    return {"fuser": model.fuser.name, **chosen, "query": model.query}


def inherited(args, model):
    """What stage 2 takes over from stage 1, and what it changes, as a line; empty in stage 1."""
    before = Path(args.model or f"out/{args.world}/stage1") / "train.json"
    if args.stage == 1 or not before.is_file():
        return ""
    before = read_json(before)
    said = {**variant(args), **({"query": args.query} if args.query else {})}
    now = choices(model)
    was = before["model"]
    changed = [f"{key} {was.get(key)} -> {now[key]}" for key in said if was.get(key) != now[key]]
    kept = ", ".join(f"{key} {value}" for key, value in now.items() if key not in said)
    mode = f", {now['fuser']} {before['mode']}" * model.fuser.asks
    return f"from stage 1 ({before['steps']} steps{mode}): {kept}" + \
        (f"; changed: {', '.join(changed)}" if changed else "")


def save_precision(trained, model, dtype):
    """float32 for what is trained (master weights); what is frozen is only read, so it may be as narrow as products."""
    chosen = {id(p) for p in trained.values()}
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if id(p) in chosen else dtype)


def variant(args) -> dict:
    """What the flags say about the fuser, as fields of its configuration; what they don't say stays as it is."""
    said = dict(NAMED[args.fuser][1]) if args.fuser else {}
    said |= {key: getattr(args, key) for key in ("norm", "order") if getattr(args, key)}
    return said | {part: False for part in args.off or ()}


def freeze(model: VLM, stage: int, mode="on", train_vision=False):
    """Stage 1 trains the projector, stage 2 everything but the vision tower (Algorithm 1). Returns what is trained.

    mode is how CCRA runs: if it is on in stage 1, it is trained there as well, as is a fuser that doesn't ask. What no
    gradient reaches (an ablated part) was frozen when the model was built and stays so; what nobody reads of the tower,
    its last norm and for plain LLaVA its last block, joins it.
    """
    fuser_too = stage == 2 or mode == "on" or not model.fuser.asks
    parts = ("projector.",) + ("fuser.",) * fuser_too + ("llm.",) * (stage == 2)
    parts += ("vision.",) if train_vision else ()
    unread = ("vision.post_layernorm.",)
    unread += tuple(f"vision.layers.{i}." for i in range(model.fuser.n_blocks, len(model.vision.layers)))
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and name.startswith(parts) and not name.startswith(unread))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def pieces(rows, rank, size, micro):
    """This process's share of a step's samples in micro-batches, and how many of these count.

    All processes get as many micro-batches, since in each they wait for each other: who has fewer takes a sample again,
    which `train_step` is told not to count.
    """
    mine = split(rows[rank::size], micro)
    most = len(split(rows[::size], micro))
    return mine + [rows[:1]] * (most - len(mine)), len(mine)


def shares(steps, dataset, rank, size, micro):
    """pieces of every step. Where lengths can be told at once, a step's samples go by length, so that those of one
    micro-batch, and those of all processes at a time, need little padding. The step and its gradient stay the same."""
    for rows in steps:
        if hasattr(dataset, "length"):
            rows = sorted(rows, key=dataset.length)
        yield rows, *pieces(rows, rank, size, micro)


def settings(args, dataset):
    """What decides the course of a run. It is in the checkpoint, and a resume with others is refused."""
    n = len(dataset)
    given = dict(group=args.group, sha256_of_json=dataset.report["inputs"]["json"]["sha256"]) if args.data else \
        dict(sha256_of_json=dataset.sha256) if args.json else {}
    fuser = dict(fuser=args.fuser) if args.fuser else {}
    return dict(stage=args.stage, steps=args.steps or math.ceil(n / args.batch), samples=n, batch=args.batch,
                lr=args.lr, warmup=args.warmup, seed=args.seed, max_length=args.max_length, mode=args.mode,
                query=args.query, dtype=args.dtype, **given, **fuser, **variant(args))


def recompute(model: VLM):
    """Blocks of the language model forget what they computed inside and do it again in the backward: of 2,048 tokens a
    block keeps its input instead of some thirty tensors as large. (A wrapper module would rename the parameters.)"""
    for block in model.llm.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: VLM):
    """torch.compile for what each block computes. Before `recompute`, whose wrapper it wouldn't see through."""
    for block in [*model.vision.layers, *model.llm.layers]:
        block.forward = torch.compile(block.forward)


def adamw(trained, lr):
    """LLaVA's: no weight decay, and no gradient clipping (its DeepSpeed configuration leaves clipping off). On a GPU in
    one kernel: else a step's intermediate results take another 4 bytes a parameter."""
    on_gpu = next(iter(trained.values())).device.type == "cuda"
    return torch.optim.AdamW(trained.values(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                             fused=on_gpu or None)


def train_step(model, batches, device, dtype, mode="on", counting=None):
    """Forward and backward of one global batch, given as this process's micro-batches.

    dtype: of autocast. counting: how many of the micro-batches count (None: all); the others keep other processes
    company. Returns this process's share of the mean loss of a supervised token, to be summed.
    """
    for batch in batches[counting:] if counting is not None else ():
        batch["labels"].fill_(data.IGNORE)
    supervised = total(sum(int((b["labels"][:, 1:] != data.IGNORE).sum()) for b in batches), device=device)
    size, loss_sum = dist.get_world_size() if dist.is_initialized() else 1, 0.0
    for i, batch in enumerate(batches, 1):
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        # DDP averages gradients over processes at the end of a backward; earlier micro-batches only add to theirs.
        # FSDP sums them every time: to put it off, each process would have to keep whole gradients.
        ddp = isinstance(model, parallel.DistributedDataParallel)
        with model.no_sync() if ddp and i < len(batches) else nullcontext():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**batch, mode=mode) / max(1, supervised)
            (loss * size).backward()
        loss_sum += loss.item()
    return loss_sum


def collate(samples, query, max_length, picture_rows):
    rows = [row for sample in samples for row in data.by_query(sample, query)]
    return data.collate([data.cut(row, max_length, picture_rows) for row in rows])


def take(batches):
    """The next batch. What a reading process has to say comes as its whole traceback, of which the last line counts."""
    try:
        return next(batches)
    except UserError as e:
        line = str(e).strip().splitlines()[-1]
        raise UserError(line.partition("UserError: ")[2] or line) from None


def open_dataset(args, tokenizer, size, say):
    """What is trained on: a LLaVA json, all of it checked before the first step or long ago, or the embedded world."""
    template = "plain" if args.stage == 1 else "v1"
    if args.data:
        return Prepared(args.data, args.images, tokenizer, template, size, damaged=args.out / "damaged.jsonl")
    if args.json:
        return data.load(args.json, args.images, tokenizer, template, size, say=say)
    n = (args.steps or TOY_STEPS[args.stage]) * args.batch
    return toy.ToyScenes(f"train{args.stage}", n, args.stage, tokenizer, size)


def describe(args, model, trained, course, start, size, device, dtype):
    count = lambda parameters: sum(p.numel() for p in parameters)
    share = math.ceil(args.batch / size)
    how = [f"{size} processes, {args.parallel}"] * (size > 1)
    how += [f"{math.ceil(share / args.micro)} micro-batches of {args.micro} in each"] * (args.micro < share)
    epoch = f"; the paper has {PAPER_STEPS[args.stage]:,} steps" if args.world == "llava" else ""
    return (f"stage {args.stage} on {device} in {dtype}: {count(trained.values()):,} of {count(model.parameters()):,} "
            f"parameters trained, {course['samples']:,} samples, {course['steps']:,} steps of {args.batch}"
            + (f" ({'; '.join(how)})" if how else "") + epoch + (f", going on after step {start}" if start else ""))


def say_answers(model, tokenizer, device, dtype, mode, step, n=4):
    """Answers to the first questions of the embedded world's exam, as the model is trained (dtype, mode). Forward
    passes alone, without a cache, since every process has to take part in each pass of a sharded model; all compute
    the same."""
    for item in toy.exam(0, n):
        row = data.prompt([(turn.question, turn.answer) for turn in item.turns[:-1]]
                          + [(item.turns[-1].question, None)], tokenizer)
        size = model.vision.config.image_size if hasattr(model, "vision") else model.module.vision.config.image_size
        pixels = toy.preprocess(toy.draw(item.scene), size, pad=True)
        sample, said = dict(ids=list(row.ids), labels=list(row.labels), query=row.query, pixels=pixels), []
        for _ in range(12):
            batch = {k: v.to(device) for k, v in data.collate([sample]).items() if k != "labels"}
            with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                said.append(int(model(**batch, mode=mode)[0, -1].argmax()))
            sample["ids"].append(said[-1])
            sample["labels"].append(data.IGNORE)
        end = next((i for i, token in enumerate(said) if token in tokenizer.eos_ids), len(said))
        last = item.turns[-1]
        yield f"  step {step}: {last.question} {tokenizer.decode(said[:end])!r}, right {last.answer!r}"
    parallel.sliced_again(model)


def loop(args, model, trained, optimizer, dataset, tokenizer, course, start, rank, size, device, dtype):
    """Steps start+1..steps. True when it came to the end, False when --stop-after or SIGTERM ended it."""
    if 0 < args.stop_after <= start:
        return False
    keep_memory(device)
    steps, vlm, stop = course["steps"], getattr(model, "module", model), parallel.Stop()
    picture_rows = vlm.picture_rows
    max_length = min(args.max_length, vlm.llm.config.max_position_embeddings)
    if max_length <= picture_rows:
        raise UserError(f"{max_length} positions (--max-length, or the language model's context) leave no room beside "
                        f"the picture's {picture_rows}")
    like = {} if args.group == "none" else dict(group=args.group, pictures=dataset.has_picture(),
                                                lengths=dataset.lengths(picture_rows, max_length))
    todo = islice(order(len(dataset), steps, args.batch, args.seed, **like), start, None)
    todo, ahead = tee(shares(todo, dataset, rank, size, args.micro))
    of_a_step = math.ceil(math.ceil(args.batch / size) / args.micro)        # micro-batches; all are wanted at once
    batches = iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=(piece for _, mine, _ in ahead for piece in mine), num_workers=args.workers,
        prefetch_factor=max(2, math.ceil(of_a_step / args.workers)) if args.workers else None,
        worker_init_fn=parallel.Stop.in_reader,
        generator=torch.Generator(),                     # else it would draw from the one that a checkpoint holds
        collate_fn=partial(collate, query=vlm.query, max_length=max_length, picture_rows=picture_rows)))
    checkpoints = parallel.Checkpoints(args.out / "checkpoints", args.keep)
    log, spoilt = Log(args, start, steps) if rank == 0 else None, 0
    cost = lambda lengths, supervised: plan.flops(vlm, lengths, supervised, args.train_vision, args.stage == 2)
    for step, (rows, mine, counting) in enumerate(todo, start):
        tic, lr = time.perf_counter(), get_lr(step, steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        taken = [take(batches) for _ in mine]
        waited = time.perf_counter() - tic
        loss = train_step(model, taken, device, dtype, args.mode, counting)
        lengths = [n for b in taken for n in
                   (b["mask"].sum(1) + (picture_rows - 1) * (b["ids"] == data.IMAGE_TOKEN).sum(1)).tolist()]
        work = cost(lengths, sum(int((b["labels"] != data.IGNORE).sum()) for b in taken))
        loss, tokens, work, asked = total(loss, sum(int(b["mask"].sum()) for b in taken), work, float(stop.asked),
                                          device=device)
        norm = float(parallel.whole(torch.nn.utils.get_total_norm([p.grad for p in trained.values()
                                                                  if p.grad is not None])))
        if math.isfinite(loss) and math.isfinite(norm):               # the same on all processes
            optimizer.step()
            spoilt = 0
        else:
            spoilt += 1
            ids = ", ".join(dataset.record_id(i) for i in rows[:8])
            what = f"step {step + 1}: loss {loss}, gradient norm {norm}; not updated; samples {ids}"
            if spoilt == 3:
                raise UserError(f"{what}. That was the third step in a row: lower --lr, or look at these samples")
            if rank == 0:
                print(what, flush=True)
        optimizer.zero_grad(set_to_none=True)
        now, ends = time.perf_counter(), step + 1 == args.stop_after or asked > 0
        if rank == 0:
            log.row(step + 1, loss, lr, norm, tokens, len(rows), now - tic, waited, work / size, device)
        if (step + 1) % args.save_every == 0 or step + 1 == steps or ends:
            checkpoints.save(step + 1, trained, optimizer, course)
            if rank == 0:
                curve.draw(args.out)
        if args.ask_every and (step + 1) % args.ask_every == 0:
            for line in say_answers(model, tokenizer, device, dtype, args.mode, step + 1):
                if rank == 0:
                    print(line, flush=True)
        if ends:
            return False
    return True


COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s", "mfu", "data_wait", "peak_gib")


class Log:
    """One line a step on stdout, and the same in log.csv, which a resumed run continues. curve.py draws it."""

    def __init__(self, args, start, steps):
        path = args.out / "log.csv"
        before = path.read_text().splitlines() if start and path.exists() else []
        # what an interrupted run logged after its last checkpoint is done again
        rows = [line for line in before if line.partition(",")[0].isdecimal() and int(line.partition(",")[0]) <= start]
        write_beside(path, lambda tmp: tmp.write_text("\n".join([",".join(COLUMNS), *rows, ""])))
        self.file, self.start, self.steps, self.began = open(path, "a", newline=""), start, steps, time.perf_counter()
        self.csv, self.wandb = csv.writer(self.file, lineterminator="\n"), None
        if args.wandb:
            import wandb
            self.wandb = wandb.init(project="nanoccra", dir=args.out, config={k: str(v) for k, v in vars(args).items()})

    def row(self, step, loss, lr, norm, tokens, samples, seconds, waited, work, device):
        """work: FLOPs of one process; MFU is its share of the device's peak, where that is known."""
        if device.type == "cuda":
            peak, most = plan.peak_flops(torch.cuda.get_device_name(device)), torch.cuda.max_memory_allocated(device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak, most = None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        mfu = f"{100 * work / seconds / peak:.1f}" if peak else "-"
        left = (time.perf_counter() - self.began) / (step - self.start) * (self.steps - step) / 60
        values = (step, f"{loss:.6f}", f"{lr:.4e}", f"{norm:.4f}", f"{tokens / seconds:.0f}",
                  f"{samples / seconds:.2f}", mfu, f"{100 * waited / seconds:.1f}", f"{most / 2 ** 30:.2f}")
        print(f"step {step}/{self.steps} {100 * step / self.steps:.1f}% loss {loss:.4f} lr {lr:.2e} norm {norm:.2f} "
              f"{tokens / seconds:,.0f} tokens/s {samples / seconds:.1f} samples/s mfu {mfu}% data {values[7]}% "
              f"peak {values[8]} GiB eta {left:.1f} min", flush=True)
        self.csv.writerow(values)
        self.file.flush()
        if self.wandb:
            self.wandb.log({k: float(v) for k, v in zip(COLUMNS[1:], values[1:]) if v != "-"}, step=step)


def sketch(args):
    """The model of --plan, without numbers: of the folders if they are there, else of the paper's sizes."""
    with skeleton():
        if args.stage == 2 and Path(args.model, "config.json").is_file():
            model = outline(Folder(args.model))
            if args.fuser or variant(args):
                model.fuser = refit(model.fuser, args, args.model)
        else:
            parts = {part: getattr(args, part) and Path(getattr(args, part)) for part in ("vision", "llm")}
            vision, llm = (Folder(dir).part(part) if dir and (dir / "config.json").is_file() else None
                           for part, dir in parts.items())
            tower = CLIPVision(CLIPVisionConfig.from_dict(vision) if vision else CLIPVisionConfig())
            llama = Llama(LlamaConfig.from_dict(llm or VICUNA))
            model = VLM.build(tower, llama, fuser_config(args, tower.config, llama.config))
    save_precision(freeze(model, args.stage, args.mode, args.train_vision), model, torch.bfloat16)
    if args.recompute:
        recompute(model)
    return model


def epoch(args):
    """(steps, samples) of --plan: of the prepared data if they are there, else of LLaVA's."""
    report = Path(args.data or "", "report.json")
    samples = read_json(report)["kept"] if args.data and report.is_file() else {1: 558128, 2: 665298}[args.stage]
    return args.steps or math.ceil(samples / args.batch), samples


def write_model(args, model, trained, tokenizer, course, dtype):
    """The trained model as a folder that from_pretrained reads, and train.json, which says how it came about.

    All processes call it; the first one writes. What stage 2 ends with is in dtype. Stage 1 goes on: what it trained is
    in float32, and the rest is written as it was found, since `save_precision` may have rounded it.
    """
    first, tensors = parallel.where()[0] == 0, {}
    found = dict(build(args)[0].named_parameters()) if first and args.stage == 1 else {}
    for name, p in model.named_parameters():
        tensor = parallel.whole(p)              # one after the other: a card never holds the whole model
        if first and args.stage == 1:
            tensors[name] = tensor.to("cpu", torch.float32) if name in trained else found[name].detach()
        elif first:
            tensors[name] = tensor.to("cpu", dtype)
    if first:
        model.save_pretrained(args.out, tokenizer_file=tokenizer.file, tensors=tensors)
        text = json.dumps({**course, "model": choices(model)}, indent=1)
        write_beside(args.out / "train.json", lambda tmp: tmp.write_text(text + "\n"))


def main(argv=None):
    args = arguments(argv)
    if args.plan:
        return print(plan.report(args, sketch(args), *epoch(args)))
    check_places(args)
    rank, size, device = parallel.join(args.device, args.threads)
    say = partial(print, flush=True) if rank == 0 else (lambda *_: None)
    dtype = autocast_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    torch.manual_seed(args.seed)
    model, tokenizer = build(args)
    dataset = open_dataset(args, tokenizer, model.vision.config.image_size, say)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; choose a folder")
    args.out.mkdir(parents=True, exist_ok=True)
    held = parallel.lock(args.out) if rank == 0 else None
    course = settings(args, dataset)
    save_precision(freeze(model, args.stage, args.mode, args.train_vision), model, dtype)
    if args.compile:
        compile_blocks(model)
    if args.recompute:
        recompute(model)
    mesh = parallel.layout(device, args.shard_size) if args.parallel == "fsdp" else None
    shared = parallel.share(model, args.parallel, device, dtype, args.shard == "grad", mesh)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(trained, args.lr)
    checkpoints = parallel.Checkpoints(args.out / "checkpoints", args.keep)
    checkpoints.check_room(trained)
    start = checkpoints.load(trained, optimizer, course)
    one, two = total(float(start), float(start) ** 2, device=device)
    if one ** 2 != two * size:
        raise UserError(f"{args.out}: the processes find different checkpoints there; it has to be one folder for all "
                        "machines")
    say(describe(args, model, trained, course, start, size, device, dtype))
    if line := inherited(args, model):
        say(line)
    finished = loop(args, shared, trained, optimizer, dataset, tokenizer, course, start, rank, size, device, dtype)
    if finished:
        write_model(args, model, trained, tokenizer, course, dtype)
    say(f"model written to {args.out}" if finished else
        f"stopped early, after a checkpoint; the same command{' without --stop-after' * bool(args.stop_after)} goes on")
    parallel.leave()
    if held:
        held.close()


if __name__ == "__main__":
    run(main)
