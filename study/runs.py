"""Does it work? The paper's comparisons again, in the embedded world, on two CPU cores. The
protocol: docs/study.md.

    python study.py probe                 what every layer of the tower knows: whether layers can matter at all
    python study.py towers                the towers of `toy.py retrain`, for this world (minutes; done: study/towers)
    python study.py run                   the runs that are not done yet; start it once for each core
    python study.py run --pilot           2 fusers x 3 seeds of their own: what difference can be seen at all
    python study.py off                   what trained models still say when parts of CCRA are made neutral afterwards
    python study.py table                 accuracy by kind, paired differences, study/*.png

The scenes are toy.py's, pixel for pixel; its eight kinds of question are answered from deep layers,
so two kinds about the background, which deep layers forget, are asked as well. A run is both stages
by train.py's functions, short, then 5,000 questions by eval.py's, the same for all. What the tower
makes of the scenes is computed once (out/study). Every finished run is a row of study/results.csv,
with a bit for each question, so that all tables come from that file; a run that was stopped goes
on, and one repeated gives the same row.
"""
import argparse
import platform
import shutil
import subprocess
import sys
import time
from contextlib import closing, redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

import eval as exams
import train
from ccra import CCRA, VLM
from clip import CLIP, CLIPVision
from core import common
from core.common import UserError, wait_for, write_beside
from core.device import autocast_dtype
from core.tokenizer import Tokenizer
from llama import Llama
from study.features import Kept, Scenes, digest
from study.findings import PILOT_SEEDS, SEEDS, read
from study.probes import KINDS, exam, text_rows
from study.protocol import KEPT_ROWS, NEUTRAL, ROWS, SWEEPS, arguments_of, plan
from toy import towers
from training.checkpoints import Checkpoints

# --------------------------------------------------------------------------------------------------
# What all runs begin with


def make_towers(args) -> None:
    """--towers: the CLIP of --source, and its Llama after more text, in which the background is
    told and asked for, too; in bfloat16, small enough to be committed beside the results that come
    from them."""
    if list((args.towers / "llama").glob("tokenizer.*")):          # written last
        return print(f"{args.towers} is there already")
    source = args.source / "llama"
    model, tokenizer = Llama.from_pretrained(source,
                                             dtype=torch.float32), Tokenizer.from_pretrained(source)
    args.out.mkdir(parents=True, exist_ok=True)
    loss = towers.text_loss(lambda step: text_rows(tokenizer, step))
    towers.pretrain("llama", model, loss, args.llama_steps, 1e-3, args.out)
    CLIP.from_pretrained(args.source / "clip",
                         dtype=torch.bfloat16).save_pretrained(args.towers / "clip")
    model.bfloat16().save_pretrained(args.towers / "llama")
    shutil.copyfile(tokenizer.file, args.towers / "llama" / tokenizer.file.name)


def build(name: str, a: argparse.Namespace, tower: CLIPVision, llm: Llama) -> VLM:
    """The model that a run begins with: the seed decides the projector's and the fuser's first
    values."""
    config = replace(train.fuser_config(a, tower.config, llm.config), **(ROWS | SWEEPS)[name][1])
    torch.manual_seed(a.seed)
    model = VLM.build(tower, llm, config, query=a.query or "all")
    model.vision = Kept(tower)
    return model


def kept_projector(model: VLM, course: dict, tower: CLIPVision, out: Path) -> Path | None:
    """Where the projector is kept that stage 1 ends with, for all rows that end it with the same.
    Without CCRA the projector alone is trained, and it reads F_v^L twice, whatever else the rows
    differ in. None: this row is alone."""
    if course["mode"] != "off" or model.fuser.name != "ccra":
        return None
    alike = {key: course[key] for key in ("steps", "samples", "batch", "lr", "warmup", "seed")}
    text = f"{alike} {model.fuser.config.anchor_layer}"
    return out / f"stage1-{digest(tower, model.llm, model.projector, text=text)}.pt"


def train_stage(stage: int, name: str, seed: int, args, tower, before: VLM | None) -> VLM | None:
    """The model after a stage, `before` being that of stage 1; None if SIGTERM came. Goes on from a
    checkpoint."""
    a = arguments_of(name, seed, stage, args)
    model = build(name, a, tower, Llama.from_pretrained(args.towers / "llama", dtype=torch.float32))
    if before:
        model.fuser.load_state_dict(before.fuser.state_dict())
        model.projector.load_state_dict(before.projector.state_dict())
    tokenizer = Tokenizer.from_pretrained(args.towers / "llama")
    scenes = Scenes(stage, a.steps * a.batch, tokenizer, tower, args.out, tower.config.image_size)
    a.out.mkdir(parents=True, exist_ok=True)
    course, cpu = train.settings(a, scenes), torch.device("cpu")
    kept = kept_projector(model, course, tower, args.out)
    dtype = autocast_dtype(cpu)
    trained = train.freeze(model, stage, a.mode)
    train.save_precision(trained, model, dtype)
    if kept and kept.exists() and not args.again:
        model.projector.load_state_dict(torch.load(kept, weights_only=True))
        return model
    optimizer = train.adamw(trained, a.lr)
    start = Checkpoints(a.out / "checkpoints", a.keep).load(trained, optimizer, course)
    with open(a.out / "steps.txt", "a") as file, redirect_stdout(file):
        done = train.loop(a, model, trained, optimizer, scenes, tokenizer, course, start, 0, 1, cpu,
                          dtype)
    if done and kept:
        write_beside(kept, lambda tmp: torch.save(model.projector.state_dict(), tmp))
    return model if done else None


def kept_model(name: str, seed: int, args) -> Path:
    """Where the trained model of a run is kept, all of it but the tower."""
    path = args.out / "models" / f"{name}-{seed}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def ask(model: VLM, tower: CLIPVision, items: list, args) -> list[str]:
    """A trained model's answers, in float32, as eval.py and sample.py take a model of this size on
    a CPU."""
    model.vision = tower
    tokenizer = Tokenizer.from_pretrained(args.towers / "llama")
    return exams.sit(model.float().eval(), tokenizer, items, 100, torch.device("cpu"))


def finish(name: str, seed: int, args) -> dict | None:
    """One run: both stages, then the exam. Its row of results.csv, or None if SIGTERM came."""
    # what pieces before this one took
    earlier = arguments_of(name, seed, 1, args).out.parent / "seconds"
    began = time.perf_counter() - (float(earlier.read_text()) if earlier.exists() else 0)
    tower, model = CLIPVision.from_pretrained(args.towers / "clip"), None
    tower.to(autocast_dtype(torch.device("cpu"))).requires_grad_(False)
    for stage in (1, 2):
        if not (model := train_stage(stage, name, seed, args, tower, model)):
            return write_beside(earlier,
                                lambda tmp: tmp.write_text(f"{time.perf_counter() - began:.1f}\n"))
    trained = time.perf_counter() - began
    if name in KEPT_ROWS:
        write_beside(kept_model(name, seed, args), lambda tmp: torch.save(model.state_dict(), tmp))
    items = exam(args.questions)
    scored = score(ask(model, tower, items, args), items)
    flags, fields = (ROWS | SWEEPS)[name]
    return dict(row=name, seed=seed,
                config=" ".join([flags, *(f"{k}={v}" for k, v in fields.items())]).strip(),
                steps="+".join(map(str, args.steps)), train_s=f"{trained:.0f}",
                exam_s=f"{time.perf_counter() - began - trained:.0f}", **scored)


def score(texts: list[str], items: list) -> dict:
    """What a row says of answers: how many are right, of each kind, by which code, where, and a bit
    for each."""
    right = [text == item.turns[-1].answer for text, item in zip(texts, items)]
    kinds = {kind: [ok for ok, item in zip(right, items) if item.kind == kind] for kind in KINDS}
    return dict(questions=len(items), accuracy=f"{sum(right) / len(right):.4f}",
                **{kind: f"{sum(ok) / len(ok):.4f}" for kind, ok in kinds.items()}, commit=commit(),
                cpu=cpu_name(), right=f"{int('1' + ''.join(str(int(ok)) for ok in right), 2):x}")


@cache
def commit() -> str:
    """The commit that the code is of, with "+" if it was changed since; as it was when first asked
    for."""
    git = lambda *words: subprocess.run(["git", "-C", str(common.ROOT), *words], capture_output=
                                        True, text=True).stdout
    return git("rev-parse", "--short",
               "HEAD").strip() + "+" * bool(git("status", "--porcelain", "--", "*.py"))


@cache
def cpu_name() -> str:
    """What this machine's processor calls itself: another kind rounds otherwise, and training
    carries that far."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    name = next((line.split(":")[1] for line in lines if line.startswith("model name")),
                platform.processor())
    return f"{' '.join(name.split())} {torch.backends.cpu.get_cpu_capability()}".replace(",", "")


def add(path: Path, row: dict, key=("row", "seed")) -> None:
    """A row more in results.csv, by one process at a time. UserError if it's there already with
    another result."""
    with closing(wait_for(path.parent)):
        rows = read(path)
        for old in rows:
            if [old[k] for k in key] == [str(row[k]) for k in key]:
                if old["right"] == row["right"]:
                    return
                raise UserError(
                    f"{path}: {row['row']}, seed {row['seed']} had accuracy {old['accuracy']} at "
                    f"{old['commit']}, now {row['accuracy']}: not the same code, towers or machine")
        lines = [row.keys(), *([line[key] for key in row] for line in [*rows, row])]
        write_beside(
            path,
            lambda tmp: tmp.write_text("".join(",".join(map(str, line)) + "\n" for line in lines)))


def run_all(args):
    """The runs that have no row yet, or those of --only. Several processes share them: each takes
    what none has."""
    commit()                               # of the code that is running; files may change meanwhile
    lengths = "+".join(map(str, args.steps)), str(args.questions)
    if other := {(row["steps"], row["questions"]) for row in read(args.results)} - {lengths}:
        raise UserError(
            f"{args.results}: has runs of {' steps and '.join(min(other))} questions, not of "
            f"{' and '.join(lengths)}: give these --results of their own")
    todo = [(name, seed) for seed in PILOT_SEEDS
            for name in ("ccra", "llava")] if args.pilot else plan()
    todo = [(name, seed) for name, seed in todo
            if (not args.only or name in args.only) and (not args.seeds or seed in args.seeds)]
    for name, seed in todo:
        folder = arguments_of(name, seed, 1, args).out.parent
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = common.lock(folder)
        except UserError:                  # another process is at it
            continue
        with closing(held):
            if not args.again and (name, str(seed)) in {
                (row["row"], row["seed"]) for row in read(args.results)}:
                continue
            for stage in (1, 2) if args.again else ():
                shutil.rmtree(folder / f"stage{stage}", ignore_errors=True)
                (folder / "seconds").unlink(missing_ok=True)
            row = finish(name, seed, args)
            if row is None:
                return print("stopped; the same command" + " without --again" * args.again +
                             " goes on")
            add(args.results, row)
            for stage in (1, 2):
                shutil.rmtree(folder / f"stage{stage}" / "checkpoints", ignore_errors=True)
            (folder / "seconds").unlink(missing_ok=True)
        print(f"{name}, seed {seed}: {row['accuracy']}, {row['train_s']} + {row['exam_s']} s",
              flush=True)


def watch_signs(fuser: CCRA) -> dict[str, list[float]]:
    """For every batch that a fuser sees from now on, the shares of the factors 1 + W_lp and 1 + w_p
    below 0. There even the token norm lets the attention through: LN(c x) is -LN(x)."""
    shares = {"W_lp": [], "w_p": []}

    def note(module, inputs, output):
        for key, found in shares.items():
            found.append((output[1][key] < -1).float().mean().item())

    fuser.register_forward_hook(note)
    return shares


def off_all(args):
    """The kept models that are not in off.csv yet (beside results.csv): for each of NEUTRAL a row
    with the accuracy, and with the share of the answers that are what they were."""
    tower, items = CLIPVision.from_pretrained(args.towers / "clip"), exam(args.questions)
    tower.to(autocast_dtype(torch.device("cpu"))).requires_grad_(False)
    path = args.results.parent / "off.csv"
    done = {(row["row"], row["seed"], row["off"]) for row in read(path)}
    for name, seed in ((name, seed) for seed in range(SEEDS) for name in KEPT_ROWS):
        kept = kept_model(name, seed, args)
        if not kept.exists() or all(
            (name, str(seed), " ".join(parts)) in done for parts in NEUTRAL):
            continue
        model = build(name, arguments_of(name, seed, 2, args), tower,
                      Llama.from_pretrained(args.towers / "llama"))
        model.load_state_dict(torch.load(kept, weights_only=True))
        fuser, before = model.fuser, None
        for parts in NEUTRAL:
            model.fuser = CCRA(replace(fuser.config, **dict.fromkeys(parts, False)))
            model.fuser.load_state_dict(fuser.state_dict())
            negative = watch_signs(model.fuser)
            texts = ask(model, tower, items, args)
            before = before or texts
            same = sum(text == old for text, old in zip(texts, before)) / len(texts)
            row = dict(
                row=name, seed=seed, off=" ".join(parts), same=f"{same:.4f}",
                **{f"negative_{key}": f"{sum(x) / len(x):.4f}" for key, x in negative.items()},
                **score(texts, items))
            add(path, row, ("row", "seed", "off"))
            print(
                f"{name}, seed {seed}, without {row['off'] or 'nothing'}: {row['accuracy']}, {same:.1%} the same"
            )
