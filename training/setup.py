"""The model that a stage of train.py begins with, as folders and flags say: two towers and what
stands between them in stage 1, what stage 1 wrote in stage 2, and for --plan the same without
numbers."""
import argparse
import math
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import data
from ccra import CCRA, NAMED, VLM, outline
from clip import CLIPVision, CLIPVisionConfig
from core import fields
from core.common import Lock, UserError, clear_tmp, lock, make_folder, read_json
from core.distributed import gather, say, together, where
from core.layouts import Folder, open_vlm
from core.tokenizer import Tokenizer
from core.weights import skeleton
from fast import narrow
from fusers import kept
from fusers.llava import LLaVA
from llama import Llama, LlamaConfig
from toy.dataset import ToyScenes
from training import adapters, lora
from training.digests import digest, digests
from training.options import TOY_STEPS
from training.prepared import Prepared, tokenizer_id

VICUNA = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
              num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-5,
              max_position_embeddings=4096)


def build(args: argparse.Namespace) -> tuple[VLM, Tokenizer]:
    """The model before this stage, on the CPU and as it is stored, and its tokenizer. UserError for
    flags that don't fit it."""
    if args.stage == 2:
        model = changed(VLM.from_pretrained(args.model, vision=args.vision), args)
        return model, Tokenizer.from_pretrained(args.model)
    tower = CLIPVision.from_pretrained(args.vision)
    llm = Llama.from_pretrained(args.llm, dtype=None)                                   # as stored
    config = fuser_config(args, tower.config, llm.config)
    torch.manual_seed(args.seed)                  # the projector's and the fuser's first values
    model = VLM.build(tower, llm, config, query=args.query or "all")
    if args.mode != "off" and not model.fuser.asks:
        raise UserError(f"--stage1-ccra {args.mode}: --fuser {args.fuser} doesn't read the "
                        "question; leave it out")
    return model, Tokenizer.from_pretrained(args.llm)


def sketch(args: argparse.Namespace) -> VLM:
    """The model of --plan, without numbers: of the folders if they are there, else of the paper's
    sizes."""
    with skeleton():
        if args.stage == 2 and Path(args.model, "config.json").is_file():
            return changed(outline(*open_vlm(args.model, args.vision)), args)
        vision = stored_config(args.vision, "vision")
        llm = stored_config(args.llm, "llm")
        tower = CLIPVision(CLIPVisionConfig.from_dict(vision) if vision else CLIPVisionConfig())
        llama = Llama(LlamaConfig.from_dict(llm or VICUNA))
        return VLM.build(tower, llama, fuser_config(args, tower.config, llama.config))


def stored_config(dir: str | None, part: str) -> dict | None:
    """What a folder says about one of its parts; None if there is no such model."""
    if dir is None or not Path(dir, "config.json").is_file():
        return None
    return Folder(dir).part(part)


# --------------------------------------------------------------------------------------------------
# What is trained on, and what decides a run

def settings(args: argparse.Namespace, dataset) -> dict:
    """What decides the course of a run. It is in the checkpoint, and a resume with others is
    refused."""
    n = len(dataset)
    given = {}
    if args.data:
        json = dataset.report["inputs"]["json"]
        given = dict(group=args.group, sha256_of_json=json["sha256"])
    elif args.json:
        given = dict(sha256_of_json=dataset.sha256)
    if args.fuser:
        given["fuser"] = args.fuser
    if args.upright:
        given["upright"] = True
    for key in ("train", "lora", "lora_alpha", "rates", "start"):      # those that are used
        if getattr(args, key):
            given[key] = getattr(args, key)
    return dict(stage=args.stage, steps=args.steps or math.ceil(n / args.batch), samples=n,
                batch=args.batch, lr=args.lr, warmup=args.warmup, seed=args.seed,
                max_length=args.max_length, mode=args.mode, query=args.query, dtype=args.dtype,
                **given, **variant(args))


def open_dataset(args: argparse.Namespace, tokenizer: Tokenizer, size: int):
    """What is trained on: a LLaVA json, all of it checked before the first step or long ago, or the
    toy world. size: of the pictures, in pixels."""
    template = "plain" if args.stage == 1 else "v1"
    if args.data:
        return Prepared(args.data, args.images, tokenizer, template, size, upright=args.upright,
                        say=say)
    if args.json:
        return data.load(args.json, args.images, tokenizer, template, size, say=say,
                         upright=args.upright)
    n = (args.steps or TOY_STEPS[args.stage]) * args.batch
    return ToyScenes(f"train{args.stage}", n, args.stage, tokenizer, size)


# --------------------------------------------------------------------------------------------------
# What stands between the towers

def variant(args: argparse.Namespace) -> dict:
    """What the flags say about the fuser, as fields of its configuration. What they don't say stays
    as it is."""
    said = dict(NAMED[args.fuser][1]) if args.fuser else {}
    said |= {key: getattr(args, key) for key in ("norm", "order") if getattr(args, key)}
    return said | {part: False for part in args.off or ()}


def fuser_config(args: argparse.Namespace, vision: CLIPVisionConfig, llm: LlamaConfig):
    """The configuration of --fuser (default: CCRA) for towers of these configurations."""
    kind = NAMED[args.fuser or "ccra"][0]
    sizes = dict(text_dim=llm.hidden_size, vision_dim=vision.hidden_size,
                 n_layers=vision.num_hidden_layers, d_hidden=128 if args.world == "llava" else 64)
    known = {key: n for key, n in sizes.items() if key in kind.__dataclass_fields__}
    return kind(**known, **variant(args))


def changed(model: VLM, args: argparse.Namespace) -> VLM:
    """The model that stage 2 begins with: that of --model, as the flags change it. UserError for
    what they can't."""
    if args.fuser and isinstance(model.fuser, LLaVA) and args.fuser != "llava":
        torch.manual_seed(args.seed)                        # the new fuser's first values
        config = fuser_config(args, model.vision.config, model.llm.config)
        try:
            model = model.with_fuser(config)
        except UserError as e:
            raise UserError(f"{args.model}: {e}") from e
    elif args.fuser or variant(args):
        model.fuser = refit(model.fuser, args, args.model)
    if args.start == "kept":
        start_kept(model, args.model)
    model.query = args.query or model.query
    return model


def start_kept(model: VLM, folder: str) -> None:
    """--start kept, of what stage 1 trained without CCRA; nothing to do where plain LLaVA was."""
    if not isinstance(model.fuser, CCRA):
        raise UserError(f"--start kept is for CCRA; the fuser of {folder} is {model.fuser.name!r}")
    if isinstance(model.projector[0], kept.Halves):
        return
    file = Path(folder, "train.json")
    before = read_json(file) if file.is_file() else {}
    if before.get("stage") != 1 or before.get("mode") != "off":
        raise UserError(f"--start kept: {folder} isn't of a stage 1 without CCRA (--stage1-ccra "
                        "off), whose projector alone has learnt; leave it out")
    kept.keep_right(model.projector)


def refit(fuser: nn.Module, args: argparse.Namespace, folder: str) -> nn.Module:
    """Stage 1's fuser, changed as the flags say. They may change no shape, so that stage 2 can go
    on from it: UserError."""
    new = None
    if type(fuser.config) is NAMED[args.fuser or "ccra"][0]:
        new = type(fuser)(replace(fuser.config, **variant(args)))
    if new is None or new.width != fuser.width:
        why = "--norm, --order and --off belong to CCRA"
        if args.fuser:
            why = f"--fuser {args.fuser} reads otherwise: choose it in stage 1"
        raise UserError(f"{folder}: its fuser is {fuser.name!r}; {why}")
    new.load_state_dict(fuser.state_dict())
    return new


# --------------------------------------------------------------------------------------------------
# How its blocks run

def recompute(model: VLM) -> None:
    """Blocks of the language model forget what they computed inside and do it again in the
    backward: of 2,048 tokens a block keeps its input instead of some thirty tensors as large. (A
    wrapper module would rename the parameters.)"""
    for block in model.llm.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: VLM) -> None:
    """torch.compile for what each block computes. Before `recompute`, whose wrapper it wouldn't see
    through."""
    for block in [*model.vision.layers, *model.llm.layers]:
        block.forward = torch.compile(block.forward)


# --------------------------------------------------------------------------------------------------
# Where a run writes, what it is begun with, and what it ends with

def claim(folder: Path) -> Lock | None:
    """Make the folder of --out, and in the first process make it this run's alone; what a kill left
    half-written goes. UserError, in all processes, if it can't be."""
    with together():
        make_folder(folder)
        if where()[0] > 0:
            return None
        held = lock(folder)
        clear_tmp(folder, "log.csv", "loss.png", "model*.safetensors", "model*.json", "config.json",
                  "train.json", "tokenizer*", *adapters.FILES)
    return held



def basis(model: VLM, tokenizer: Tokenizer, stage: int) -> dict[str, str]:
    """What a run is begun with, each as a sha256: the model's parts, its configuration, the
    tokenizer. It is in the checkpoint, and a resume with another is refused.

    All of every tensor is read, so nothing can differ unseen: 14 GB take 36 s on one core that has
    no instructions for SHA (0.4 GB/s), and all cores take part. Stage 1 leaves out what it trains:
    that was drawn from --seed, and is in the checkpoint. One process of each machine reads;
    UserError if two found different things.
    """
    reads = int(os.environ.get("LOCAL_RANK", 0)) == 0
    found = [one for one in gather(stored(model, tokenizer, stage) if reads else None) if one]
    if any(one != found[0] for one in found):
        raise UserError("the machines begin with different models or tokenizers: they need the "
                        "same files")
    return found[0]


def stored(model: VLM, tokenizer: Tokenizer, stage: int) -> dict[str, str]:
    """`basis`, of what this process has."""
    tensors = [(name, p) for name, p in model.named_parameters()
               if stage == 2 or not p.requires_grad]
    config = {"picture tower": asdict(model.vision.config),
              "language model": model.llm.config.to_dict(),
              "fuser": [model.fuser.name, asdict(model.fuser.config)],
              "image": model.image, "query": model.query}
    return {**digests(tensors), "configuration": digest(config),
            "tokenizer": digest(tokenizer_id(tokenizer))}


def found_again(run) -> dict[str, torch.Tensor]:
    """The parameters of the model that a run (a train.Run) was begun with, as they are stored.
    UserError if they were changed meanwhile."""
    model, tokenizer = build(run.args)
    for name, p in model.named_parameters():
        p.requires_grad_(name in run.trained)
    now = stored(model, tokenizer, run.args.stage)
    for what, sha256 in run.course["basis"].items():
        if now.get(what) != sha256:
            raise UserError(f"the {what} was changed on the disk while this run went on: put back "
                            "what it was begun with, and give the same command again")
    return dict(model.named_parameters())


def frozen_llm(args: argparse.Namespace, model: VLM, dtype: torch.dtype) -> list[nn.Linear]:
    """Where --train leaves the language model as it is: put --lora's matrices beside its own, which
    stay as narrow as they are stored. Returns those layers. dtype: of products."""
    if args.lora:
        torch.manual_seed(args.seed)                        # its first values
        lora.add(model.llm, args.lora, args.lora_alpha)
    if not args.train or "llm" in args.train:
        return []
    return narrow.keep(model.llm, dtype)


def size_at_end(model: VLM, args: argparse.Namespace, dtype: torch.dtype) -> int:
    """Bytes of the model that a run ends with: in stage 2 all in dtype, in stage 1 as stored, what
    is trained in float32; of an adapter nothing else."""
    if args.adapter:
        return sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    if args.stage == 2:
        return dtype.itemsize * sum(p.numel() for p in model.parameters())
    return sum(4 * p.numel() if p.requires_grad else p.nbytes for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# What is said about it

def choices(model: VLM) -> dict:
    """What flags may choose about a model, as it is."""
    names = ("norm", "order", "lpwca", "lwca", "pwca", "smooth", "copies", "kind")
    chosen = {key: value for key, value in vars(model.fuser.config).items() if key in names}
    return {"fuser": model.fuser.name, **chosen, "query": model.query}


def inherited(args: argparse.Namespace, model: VLM) -> str:
    """What stage 2 takes over from stage 1, or from LLaVA, and what it changes, as a line; empty in
    stage 1."""
    if isinstance(model.projector[0], kept.Halves):
        pictures = "padded" if model.image["pad"] else "cropped"
        return (f"{model.fuser.name} in plain LLaVA's place, with its answers at first (projector "
                f"[0 | W1]); LLaVA's: anchor -2, prompt, pictures {pictures}; ours: query "
                f"{model.query}")
    if args.stage == 1 or not Path(args.model, "train.json").is_file():
        return ""
    file = Path(args.model, "train.json")
    before = read_json(file)
    try:
        fields.check(before, dict(model=dict, steps=int, mode=str), str(file))
    except UserError as e:
        return f"what stage 1 chose isn't known: {e}"
    said = variant(args)
    if args.query:
        said["query"] = args.query
    was = before["model"]
    now = choices(model)
    stays = ", ".join(f"{key} {value}" for key, value in now.items() if key not in said)
    changed = ", ".join(f"{key} {was.get(key)} -> {now[key]}"
                        for key in said if was.get(key) != now[key])
    mode = f", {now['fuser']} {before['mode']}" if model.fuser.asks else ""
    line = f"from stage 1 ({before['steps']} steps{mode}): {stays}"
    return f"{line}; changed: {changed}" if changed else line
