"""A run: from the towers to a row of results.csv. And `off`: trained models asked again without
some of their parts.

A run is both stages by train.py's functions, short, then the exam by eval.py's. The same run gives
the same row, to the last bit, on the same kind of machine. One that was stopped goes on, and
several processes share what is to be done.
"""
import argparse
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch

import eval as exams
import fast
import train
from ccra import CCRA, VLM
from clip import CLIP, CLIPVision
from core.common import UserError, lock, make_folder, write_beside, write_text
from core.device import autocast_dtype
from core.tokenizer import Tokenizer
from llama import Llama
from study.features import Kept, Scenes, digest
from study.protocol import (
    KEPT_ROWS,
    NEUTRAL,
    ROWS,
    SEEDS,
    SWEEPS,
    arguments_of,
    folder_of,
    pilot,
    plan,
)
from study.results import add, commit, read, score
from study.world import exam, text_rows
from toy.exam import Item
from toy.pretrain import pretrain
from toy.towers import text_loss
from training import setup

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# What all runs begin with

def make_towers(args: argparse.Namespace) -> None:
    """--towers: the CLIP of --source, and its Llama after more text, in which the background is
    told and asked for, too; in bfloat16, small enough to be committed beside the results that come
    from them."""
    clip, llama = args.towers / "clip", args.towers / "llama"
    if list(llama.glob("tokenizer.*")):                                    # written last
        return print(f"{args.towers} is there already")
    tokenizer = Tokenizer.from_pretrained(args.source / "llama")
    model = Llama.from_pretrained(args.source / "llama", dtype=torch.float32)
    make_folder(args.out)
    loss = text_loss(lambda step: text_rows(tokenizer, step))
    pretrain("llama", model, loss, args.llama_steps, 1e-3, args.out)
    CLIP.from_pretrained(args.source / "clip", dtype=torch.bfloat16).save_pretrained(clip)
    model.bfloat16().save_pretrained(llama)
    shutil.copyfile(tokenizer.file, llama / tokenizer.file.name)


def read_tower(args: argparse.Namespace) -> CLIPVision:
    """The vision tower of --towers, as train.py reads a frozen one."""
    tower = CLIPVision.from_pretrained(args.towers / "clip")
    return fast.prepare(tower.to(autocast_dtype(CPU)).requires_grad_(False))


def build(name: str, a: argparse.Namespace, tower: CLIPVision, llm: Llama) -> VLM:
    """The model that a run begins with: the seed decides the projector's and the fuser's first
    values. a: train.py's arguments."""
    _, fields = (ROWS | SWEEPS)[name]
    config = replace(setup.fuser_config(a, tower.config, llm.config), **fields)
    torch.manual_seed(a.seed)
    model = VLM.build(tower, llm, config, query=a.query or "all")
    model.vision = Kept(tower)
    return model


def projector_file(model: VLM, course: dict, tower: CLIPVision, out: Path) -> Path | None:
    """Where the projector is kept that stage 1 ends with, for all rows that end it with the same.
    Without CCRA the projector alone is trained, and it reads F_v^L twice, whatever else the rows
    differ in. None: this row is alone."""
    if course["mode"] != "off" or model.fuser.name != "ccra":
        return None
    alike = {key: course[key] for key in ("steps", "samples", "batch", "lr", "warmup", "seed")}
    text = f"{alike} {model.fuser.config.anchor_layer}"
    return out / f"stage1-{digest(tower, model.llm, model.projector, text=text)}.pt"


# --------------------------------------------------------------------------------------------------
# One run

def train_stage(stage: int, name: str, seed: int, args: argparse.Namespace, tower: CLIPVision,
                before: VLM | None) -> VLM | None:
    """The model after a stage, `before` being that of stage 1; None if SIGTERM came. Goes on from a
    checkpoint."""
    a = arguments_of(name, seed, stage, args)
    model = build(name, a, tower, Llama.from_pretrained(args.towers / "llama", dtype=torch.float32))
    if before:
        model.fuser.load_state_dict(before.fuser.state_dict())
        model.projector.load_state_dict(before.projector.state_dict())
    tokenizer = Tokenizer.from_pretrained(args.towers / "llama")
    scenes = Scenes(stage, a.steps * a.batch, tokenizer, tower, args.out, tower.config.image_size)
    make_folder(a.out)
    kept = projector_file(model, train.settings(a, scenes), tower, args.out)
    run = train.begin(a, model, tokenizer, scenes, CPU)
    if kept and kept.exists() and not args.again:
        model.projector.load_state_dict(torch.load(kept, weights_only=True))
        return model
    start = train.resume(run)
    with open(a.out / "steps.txt", "a") as file, redirect_stdout(file):
        done = train.loop(run, start)
    if done and kept:
        write_beside(kept, lambda tmp: torch.save(model.projector.state_dict(), tmp))
    return model if done else None


def model_file(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Where the trained model of a run is kept, all of it but the tower."""
    return args.out / "models" / f"{name}-{seed}.pt"


def ask(model: VLM, tower: CLIPVision, items: list[Item], args: argparse.Namespace) -> list[str]:
    """A trained model's answers, in float32, as eval.py and sample.py take a model of this size on
    a CPU."""
    model.vision = tower
    tokenizer = Tokenizer.from_pretrained(args.towers / "llama")
    fast.prepare(model)
    return exams.sit(model.float().eval(), tokenizer, items, 100, CPU)


def finish(name: str, seed: int, args: argparse.Namespace) -> dict | None:
    """One run: both stages, then the exam. Its row of results.csv, or None if SIGTERM came."""
    earlier = folder_of(name, seed, args.out) / "seconds"        # what pieces before this one took
    began = time.perf_counter() - (float(earlier.read_text()) if earlier.exists() else 0)
    tower = read_tower(args)
    model = None
    for stage in (1, 2):
        model = train_stage(stage, name, seed, args, tower, model)
        if model is None:
            write_text(earlier, f"{time.perf_counter() - began:.1f}\n")
            return None
    trained = time.perf_counter() - began
    if name in KEPT_ROWS:
        file = model_file(name, seed, args)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_beside(file, lambda tmp: torch.save(model.state_dict(), tmp))
    items = exam(args.questions)
    scored = score(ask(model, tower, items, args), items)
    asked = time.perf_counter() - began - trained
    flags, fields = (ROWS | SWEEPS)[name]
    config = " ".join(flags.split() + [f"{key}={value}" for key, value in fields.items()])
    return {"row": name, "seed": seed, "config": config, "steps": "+".join(map(str, args.steps)),
            "train_s": f"{trained:.0f}", "exam_s": f"{asked:.0f}", **scored}


# --------------------------------------------------------------------------------------------------
# All of them

def chosen(args: argparse.Namespace) -> list[tuple[str, int]]:
    """(row, seed) of the runs that are asked for, done or not."""
    return [(name, seed) for name, seed in (pilot() if args.pilot else plan())
            if (not args.only or name in args.only) and (not args.seeds or seed in args.seeds)]


def run_all(args: argparse.Namespace) -> None:
    """The runs that have no row yet, or those of --only. Several processes share them: each takes
    what none has. UserError if results.csv has runs of other lengths."""
    commit()                               # of the code that is running; files may change meanwhile
    lengths = "+".join(map(str, args.steps)), str(args.questions)
    if other := {(row["steps"], row["questions"]) for row in read(args.results)} - {lengths}:
        raise UserError(
            f"{args.results}: has runs of {' steps and '.join(min(other))} questions, not of "
            f"{' and '.join(lengths)}: give these --results of their own")
    for name, seed in chosen(args):
        folder = folder_of(name, seed, args.out)
        make_folder(folder)
        try:
            held = lock(folder)
        except UserError:                  # another process is at it
            continue
        with closing(held):
            if args.again:
                clear(folder)
            elif (name, str(seed)) in {(row["row"], row["seed"]) for row in read(args.results)}:
                continue
            row = finish(name, seed, args)
            if row is None:
                same = "the same command" + (" without --again" if args.again else "")
                return print(f"stopped; {same} goes on")
            add(args.results, row)
            clear(folder, "checkpoints")
        print(f"{name}, seed {seed}: {row['accuracy']}, {row['train_s']} + {row['exam_s']} s",
              flush=True)


def clear(folder: Path, part: str = "") -> None:
    """Forget a run's stages, or a part of each, and what it took so far."""
    for stage in (1, 2):
        shutil.rmtree(folder / f"stage{stage}" / part, ignore_errors=True)
    (folder / "seconds").unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Parts made neutral after training

def watch_signs(fuser: CCRA) -> dict[str, list[float]]:
    """For every batch that a fuser sees from now on, the shares of the factors 1 + W_lp and 1 + w_p
    below 0. There even the token norm lets the attention through: LN(c x) is -LN(x)."""
    shares = {"W_lp": [], "w_p": []}

    def note(module, inputs, output) -> None:
        _, maps = output
        for key, found in shares.items():
            found.append((maps[key] < -1).float().mean().item())

    fuser.register_forward_hook(note)
    return shares


def off_all(args: argparse.Namespace) -> None:
    """The kept models that are not in off.csv yet (beside results.csv): for each of NEUTRAL a row
    with the accuracy, and with the share of the answers that are what they were."""
    tower, items = read_tower(args), exam(args.questions)
    path = args.results.parent / "off.csv"
    done = {(row["row"], row["seed"], row["off"]) for row in read(path)}
    for name, seed in ((name, seed) for seed in range(SEEDS) for name in KEPT_ROWS):
        wanted = {(name, str(seed), " ".join(parts)) for parts in NEUTRAL}
        if model_file(name, seed, args).exists() and not wanted <= done:
            for row in without_parts(name, seed, args, tower, items):
                add(path, row, ("row", "seed", "off"))
                print(f"{name}, seed {seed}, without {row['off'] or 'nothing'}: {row['accuracy']}, "
                      f"{float(row['same']):.1%} the same")


def without_parts(name: str, seed: int, args: argparse.Namespace, tower: CLIPVision,
                  items: list[Item]) -> Iterator[dict]:
    """A kept model's rows of off.csv, one for each of NEUTRAL; the first has all parts."""
    model = build(name, arguments_of(name, seed, 2, args), tower,
                  Llama.from_pretrained(args.towers / "llama"))
    model.load_state_dict(torch.load(model_file(name, seed, args), weights_only=True))
    fuser, before = model.fuser, None
    for parts in NEUTRAL:
        model.fuser = CCRA(replace(fuser.config, **dict.fromkeys(parts, False)))
        model.fuser.load_state_dict(fuser.state_dict())
        negative = watch_signs(model.fuser)
        texts = ask(model, tower, items, args)
        before = before or texts
        same = sum(text == old for text, old in zip(texts, before)) / len(texts)
        signs = {f"negative_{key}": f"{sum(shares) / len(shares):.4f}"
                 for key, shares in negative.items()}
        yield {"row": name, "seed": seed, "off": " ".join(parts), "same": f"{same:.4f}", **signs,
               **score(texts, items)}
