"""Does it work? The paper's comparisons again, in the embedded world, on two CPU cores. The protocol: docs/study.md.

    python study.py probe                 what every layer of the tower knows: whether layers can matter at all
    python study.py towers                the towers of `toy.py retrain`, for this world (minutes; done: study/towers)
    python study.py run                   the runs that are not done yet; start it once for each core
    python study.py run --pilot           2 fusers x 3 seeds of their own: what difference can be seen at all
    python study.py off                   what trained models still say when parts of CCRA are made neutral afterwards
    python study.py table                 accuracy by kind, paired differences, study/*.png

The scenes are toy.py's, pixel for pixel; its eight kinds of question
are answered from deep layers, so two kinds about the background, which deep layers forget, are asked as well.
A run is both stages by train.py's functions, short, then 5,000 questions by eval.py's, the same for all. What the tower
makes of the scenes is computed once (out/study). Every finished run is a row of study/results.csv, with a bit for each
question, so that all tables come from that file; a run that was stopped goes on, and one repeated gives the same row.
"""
import argparse
import hashlib
import math
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
from torch import Tensor, nn
from tqdm import tqdm

import data
import eval as exams
from training import parallel
from toy import towers
from toy import world as toy
import train
from ccra import CCRA, NAMED, VLM
from clip import CLIP, CLIPVision
from study.findings import PILOT_SEEDS, SEEDS, read, show_tables, write_tables
from llama import Llama, Tokenizer
from study.probes import KINDS, caption, conversation, exam, show_probes, states, text_rows
from core.weights import UserError, autocast_dtype, run, write_beside

OUT, TOWERS, RESULTS = Path("out/study"), toy.ROOT / "study" / "towers", Path("study/results.csv")
STEPS, LLAMA_STEPS, QUESTIONS, SWEEP_SEEDS = (900, 600), 400, 5000, 3
RATES = 1e-2, 2e-3        # of the two stages; with train.py's 3e-3 and 1e-3 seeds differ by 20 points

# name: (train.py's flags, fields of the fuser's configuration that have none)
ROWS = {name: (f"--fuser {name}", {}) for name in NAMED} | {
    "decoupled": ("--order decoupled", {}), "shuffled": ("--order shuffled", {}),
    **{f"without {part}": (f"--off {part}", {}) for part in ("lpwca", "lwca", "pwca", "smooth")},
    "token": ("--norm token", {}), "stack": ("--norm stack", {}),
    "token without": ("--norm token --off lpwca pwca", {})}
SWEEPS = {"stage1 neutral": ("--stage1-ccra neutral", {}), "stage1 on": ("--stage1-ccra on", {}),
          "query sofar": ("--query sofar", {}), "query first": ("--query first", {}),
          "anchor -2": ("", dict(anchor_layer=-2)),
          **{f"d_hidden {n}": ("", dict(d_hidden=n)) for n in (16, 256)},
          **{f"kernel {n}": ("", dict(kernel_size=n)) for n in (3, 7)}}

KEPT_ROWS = "ccra", "token", "stack"                                    # whose trained models are kept, for `off`,
NEUTRAL = (), ("lpwca",), ("pwca",), ("lpwca", "pwca"), ("lwca",)       # which makes these parts neutral


# ---------------------------------------------------------------------------------------------------------------------
# The tower's features, once for all runs

class Kept(nn.Module):
    """In the place of a tower whose states were computed before: what a VLM takes for pixels are those states."""

    def __init__(self, tower: CLIPVision):
        super().__init__()
        self.config, self.grid, self.layers = tower.config, tower.grid, nn.ModuleList()

    def forward(self, kept: Tensor, n_layers: int) -> Tensor:
        """kept (B, L+1, 1+N, d) -> hidden (n_layers+1, B, 1+N, d), no copy."""
        return kept.transpose(0, 1)[:n_layers + 1]


class Scenes(toy.ToyScenes):
    """toy.ToyScenes with the study's questions, and the tower's states for pixels."""

    def __init__(self, stage: int, n: int, tokenizer, tower: CLIPVision, out: Path, size=toy.SIZE):
        super().__init__(f"study{stage}", n, stage, tokenizer, size)
        self.kept, self.samples = features(self, tower, out), {}

    def sample(self, i):                       # each is made once: train.py wants all lengths first
        if i not in self.samples:
            self.samples[i] = self._made(i)
        return self.samples[i]

    def _made(self, i):
        turns = conversation(self.scene(i)) if self.stage == 2 else []
        record = toy.record(turns or [("Describe the picture.", caption(self.scene(i)))], image="toy")
        return data.render(record, self.tokenizer, "plain" if self.stage == 1 else "v1")

    def __getitem__(self, i):
        return data.item(self.sample(i), self.kept[i])


def features(scenes: Scenes, tower: CLIPVision, out: Path, batch=50) -> Tensor:
    """states of all of a data set's scenes, (n, L+1, 1+N, d), mapped from a file, which is written where it isn't."""
    path = out / f"{scenes.split}-{len(scenes)}-{digest(tower)}.bfloat16"
    shape = len(scenes), len(tower.layers) + 1, tower.grid ** 2 + 1, tower.config.hidden_size

    def write(tmp):
        with open(tmp, "wb") as file:
            for rows in tqdm(data.split(range(len(scenes)), batch), desc=str(path), unit="batch", file=sys.stderr):
                part = states(tower, [scenes.scene(i) for i in rows])
                file.write(part.contiguous().view(torch.uint8).numpy().tobytes())

    with closing(wait_for(out)):               # another process may be writing it
        if not path.exists():
            write_beside(path, write)
    return torch.from_file(str(path), size=math.prod(shape), dtype=torch.bfloat16).view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# What all runs begin with

def make_towers(args) -> None:
    """--towers: the CLIP of --source, and its Llama after more text, in which the background is told and asked for,
    too; in bfloat16, small enough to be committed beside the results that come from them."""
    if list((args.towers / "llama").glob("tokenizer.*")):          # written last
        return print(f"{args.towers} is there already")
    source = args.source / "llama"
    model, tokenizer = Llama.from_pretrained(source, dtype=torch.float32), Tokenizer.from_pretrained(source)
    args.out.mkdir(parents=True, exist_ok=True)
    loss = towers.text_loss(lambda step: text_rows(tokenizer, step))
    towers.pretrain("llama", model, loss, args.llama_steps, 1e-3, args.out)
    CLIP.from_pretrained(args.source / "clip", dtype=torch.bfloat16).save_pretrained(args.towers / "clip")
    model.bfloat16().save_pretrained(args.towers / "llama")
    shutil.copyfile(tokenizer.file, args.towers / "llama" / tokenizer.file.name)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def plan() -> list[tuple[str, int]]:
    """(row, seed) of all runs, seed by seed, so that a study that is cut short has all rows: three seeds of these, then
    the sweeps, then the other seeds."""
    seeds = [(name, seed) for seed in range(SEEDS) for name in ROWS]
    first = SWEEP_SEEDS * len(ROWS)
    return seeds[:first] + [(name, seed) for seed in range(SWEEP_SEEDS) for name in SWEEPS] + seeds[first:]


def arguments_of(name: str, seed: int, stage: int, args) -> argparse.Namespace:
    """train.py's, of one stage of a run."""
    flags = (ROWS | SWEEPS)[name][0].split()
    return train.arguments(["--stage", str(stage), "--seed", str(seed), *flags,
                            "--steps", str(args.steps[stage - 1]), "--lr", str(RATES[stage - 1]),
                            "--out", str(args.out / "runs" / f"{name}-{seed}".replace(" ", "-") / f"stage{stage}"),
                            "--threads", "1", "--workers", "0", "--save-every", "300", "--device", "cpu"])


def build(name: str, a: argparse.Namespace, tower: CLIPVision, llm: Llama) -> VLM:
    """The model that a run begins with: the seed decides the projector's and the fuser's first values."""
    config = replace(train.fuser_config(a, tower.config, llm.config), **(ROWS | SWEEPS)[name][1])
    torch.manual_seed(a.seed)
    model = VLM.build(tower, llm, config, query=a.query or "all")
    model.vision = Kept(tower)
    return model


def digest(*modules: nn.Module, text: str = "") -> str:
    """Eight letters that tell weights (and a text) from others."""
    weights = [p.detach().float().numpy().tobytes() for module in modules for p in module.parameters()]
    return hashlib.sha256(b"".join(weights) + text.encode()).hexdigest()[:8]


def kept_projector(model: VLM, course: dict, tower: CLIPVision, out: Path) -> Path | None:
    """Where the projector is kept that stage 1 ends with, for all rows that end it with the same. Without CCRA the
    projector alone is trained, and it reads F_v^L twice, whatever else the rows differ in. None: this row is alone."""
    if course["mode"] != "off" or model.fuser.name != "ccra":
        return None
    alike = {key: course[key] for key in ("steps", "samples", "batch", "lr", "warmup", "seed")}
    text = f"{alike} {model.fuser.config.anchor_layer}"
    return out / f"stage1-{digest(tower, model.llm, model.projector, text=text)}.pt"


def train_stage(stage: int, name: str, seed: int, args, tower, before: VLM | None) -> VLM | None:
    """The model after a stage, `before` being that of stage 1; None if SIGTERM came. Goes on from a checkpoint."""
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
    start = parallel.Checkpoints(a.out / "checkpoints", a.keep).load(trained, optimizer, course)
    with open(a.out / "steps.txt", "a") as file, redirect_stdout(file):
        done = train.loop(a, model, trained, optimizer, scenes, tokenizer, course, start, 0, 1, cpu, dtype)
    if done and kept:
        write_beside(kept, lambda tmp: torch.save(model.projector.state_dict(), tmp))
    return model if done else None


def kept_model(name: str, seed: int, args) -> Path:
    """Where the trained model of a run is kept, all of it but the tower."""
    path = args.out / "models" / f"{name}-{seed}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def ask(model: VLM, tower: CLIPVision, items: list, args) -> list[str]:
    """A trained model's answers, in float32, as eval.py and sample.py take a model of this size on a CPU."""
    model.vision = tower
    tokenizer = Tokenizer.from_pretrained(args.towers / "llama")
    return exams.sit(model.float().eval(), tokenizer, items, 100, torch.device("cpu"))


def finish(name: str, seed: int, args) -> dict | None:
    """One run: both stages, then the exam. Its row of results.csv, or None if SIGTERM came."""
    earlier = arguments_of(name, seed, 1, args).out.parent / "seconds"      # what pieces before this one took
    began = time.perf_counter() - (float(earlier.read_text()) if earlier.exists() else 0)
    tower, model = CLIPVision.from_pretrained(args.towers / "clip"), None
    tower.to(autocast_dtype(torch.device("cpu"))).requires_grad_(False)
    for stage in (1, 2):
        if not (model := train_stage(stage, name, seed, args, tower, model)):
            return write_beside(earlier, lambda tmp: tmp.write_text(f"{time.perf_counter() - began:.1f}\n"))
    trained = time.perf_counter() - began
    if name in KEPT_ROWS:
        write_beside(kept_model(name, seed, args), lambda tmp: torch.save(model.state_dict(), tmp))
    items = exam(args.questions)
    scored = score(ask(model, tower, items, args), items)
    flags, fields = (ROWS | SWEEPS)[name]
    return dict(row=name, seed=seed, config=" ".join([flags, *(f"{k}={v}" for k, v in fields.items())]).strip(),
                steps="+".join(map(str, args.steps)), train_s=f"{trained:.0f}",
                exam_s=f"{time.perf_counter() - began - trained:.0f}", **scored)


def score(texts: list[str], items: list) -> dict:
    """What a row says of answers: how many are right, of each kind, by which code, where, and a bit for each."""
    right = [text == item.turns[-1].answer for text, item in zip(texts, items)]
    kinds = {kind: [ok for ok, item in zip(right, items) if item.kind == kind] for kind in KINDS}
    return dict(questions=len(items), accuracy=f"{sum(right) / len(right):.4f}",
                **{kind: f"{sum(ok) / len(ok):.4f}" for kind, ok in kinds.items()}, commit=commit(), cpu=cpu_name(),
                right=f"{int('1' + ''.join(str(int(ok)) for ok in right), 2):x}")


@cache
def commit() -> str:
    """The commit that the code is of, with "+" if it was changed since; as it was when first asked for."""
    git = lambda *words: subprocess.run(["git", "-C", str(toy.ROOT), *words], capture_output=True, text=True).stdout
    return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(git("status", "--porcelain", "--", "*.py"))


@cache
def cpu_name() -> str:
    """What this machine's processor calls itself: another kind rounds otherwise, and training carries that far."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    name = next((line.split(":")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{' '.join(name.split())} {torch.backends.cpu.get_cpu_capability()}".replace(",", "")


def wait_for(folder: Path) -> parallel.Lock:
    """parallel.lock, when nobody else has it any more."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            return parallel.lock(folder)
        except UserError:
            time.sleep(0.2)


def add(path: Path, row: dict, key=("row", "seed")) -> None:
    """A row more in results.csv, by one process at a time. UserError if it's there already with another result."""
    with closing(wait_for(path.parent)):
        rows = read(path)
        for old in rows:
            if [old[k] for k in key] == [str(row[k]) for k in key]:
                if old["right"] == row["right"]:
                    return
                raise UserError(f"{path}: {row['row']}, seed {row['seed']} had accuracy {old['accuracy']} at "
                                f"{old['commit']}, now {row['accuracy']}: not the same code, towers or machine")
        lines = [row.keys(), *([line[key] for key in row] for line in [*rows, row])]
        write_beside(path, lambda tmp: tmp.write_text("".join(",".join(map(str, line)) + "\n" for line in lines)))


def run_all(args):
    """The runs that have no row yet, or those of --only. Several processes share them: each takes what none has."""
    commit()                                   # of the code that is running; files may change meanwhile
    lengths = "+".join(map(str, args.steps)), str(args.questions)
    if other := {(row["steps"], row["questions"]) for row in read(args.results)} - {lengths}:
        raise UserError(f"{args.results}: has runs of {' steps and '.join(min(other))} questions, not of "
                        f"{' and '.join(lengths)}: give these --results of their own")
    todo = [(name, seed) for seed in PILOT_SEEDS for name in ("ccra", "llava")] if args.pilot else plan()
    todo = [(name, seed) for name, seed in todo
            if (not args.only or name in args.only) and (not args.seeds or seed in args.seeds)]
    for name, seed in todo:
        folder = arguments_of(name, seed, 1, args).out.parent
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = parallel.lock(folder)
        except UserError:                      # another process is at it
            continue
        with closing(held):
            if not args.again and (name, str(seed)) in {(row["row"], row["seed"]) for row in read(args.results)}:
                continue
            for stage in (1, 2) if args.again else ():
                shutil.rmtree(folder / f"stage{stage}", ignore_errors=True)
                (folder / "seconds").unlink(missing_ok=True)
            row = finish(name, seed, args)
            if row is None:
                return print("stopped; the same command" + " without --again" * args.again + " goes on")
            add(args.results, row)
            for stage in (1, 2):
                shutil.rmtree(folder / f"stage{stage}" / "checkpoints", ignore_errors=True)
            (folder / "seconds").unlink(missing_ok=True)
        print(f"{name}, seed {seed}: {row['accuracy']}, {row['train_s']} + {row['exam_s']} s", flush=True)


def watch_signs(fuser: CCRA) -> dict[str, list[float]]:
    """For every batch that a fuser sees from now on, the shares of the factors 1 + W_lp and 1 + w_p below 0. There even
    the token norm lets the attention through: LN(c x) is -LN(x)."""
    shares = {"W_lp": [], "w_p": []}

    def note(module, inputs, output):
        for key, found in shares.items():
            found.append((output[1][key] < -1).float().mean().item())

    fuser.register_forward_hook(note)
    return shares


def off_all(args):
    """The kept models that are not in off.csv yet (beside results.csv): for each of NEUTRAL a row with the accuracy,
    and with the share of the answers that are what they were."""
    tower, items = CLIPVision.from_pretrained(args.towers / "clip"), exam(args.questions)
    tower.to(autocast_dtype(torch.device("cpu"))).requires_grad_(False)
    path = args.results.parent / "off.csv"
    done = {(row["row"], row["seed"], row["off"]) for row in read(path)}
    for name, seed in ((name, seed) for seed in range(SEEDS) for name in KEPT_ROWS):
        kept = kept_model(name, seed, args)
        if not kept.exists() or all((name, str(seed), " ".join(parts)) in done for parts in NEUTRAL):
            continue
        model = build(name, arguments_of(name, seed, 2, args), tower, Llama.from_pretrained(args.towers / "llama"))
        model.load_state_dict(torch.load(kept, weights_only=True))
        fuser, before = model.fuser, None
        for parts in NEUTRAL:
            model.fuser = CCRA(replace(fuser.config, **dict.fromkeys(parts, False)))
            model.fuser.load_state_dict(fuser.state_dict())
            negative = watch_signs(model.fuser)
            texts = ask(model, tower, items, args)
            before = before or texts
            same = sum(text == old for text, old in zip(texts, before)) / len(texts)
            row = dict(row=name, seed=seed, off=" ".join(parts), same=f"{same:.4f}",
                       **{f"negative_{key}": f"{sum(x) / len(x):.4f}" for key, x in negative.items()},
                       **score(texts, items))
            add(path, row, ("row", "seed", "off"))
            print(f"{name}, seed {seed}, without {row['off'] or 'nothing'}: {row['accuracy']}, {same:.1%} the same")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=("towers", "probe", "run", "off", "table"))
    p.add_argument("--towers", type=Path, default=TOWERS, help="the folder with clip and llama (default: study/towers)")
    p.add_argument("--source", type=Path, default=toy.OUT, help="towers: what they come from (default: %(default)s)")
    p.add_argument("--out", type=Path, default=OUT, help="for features and unfinished runs (default: %(default)s)")
    p.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    p.add_argument("--llama-steps", type=int, default=LLAMA_STEPS, help="towers: default %(default)s")
    p.add_argument("--n", type=int, default=3000, help="probe: scenes to learn from; half as many to test with")
    p.add_argument("--only", nargs="+", choices=[*ROWS, *SWEEPS], metavar="ROW", help="run: these rows alone")
    p.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="run: these seeds alone")
    p.add_argument("--pilot", action="store_true", help="run: ccra and llava with the pilot's seeds")
    p.add_argument("--again", action="store_true", help="run: also what has a row, which must come out the same")
    p.add_argument("--steps", type=int, nargs=2, default=STEPS, help="run: of stage 1 and 2 (default: %(default)s)")
    p.add_argument("--questions", type=int, default=QUESTIONS, help="run: how many (default: %(default)s)")
    p.add_argument("--base", default="ccra", help="table: the row that others are compared with")
    p.add_argument("--into", type=Path, metavar="FILE", help="table: don't print the tables, but replace those of a "
                   "markdown file after its line '## Results' (docs/study.md)")
    args = p.parse_args(argv)
    torch.set_num_threads(1)                   # threads change rounding
    if args.command == "towers":
        make_towers(args)
    elif args.command == "probe":
        show_probes(args.towers / "clip", args.n)
    elif args.command == "run":
        run_all(args)
    elif args.command == "off":
        off_all(args)
    elif args.into:
        write_tables(args.into, args.results)
    else:
        show_tables(args.results, args.base)


if __name__ == "__main__":
    run(main)
