"""Does it work? The paper's comparisons again, in the embedded world, on two CPU cores. The protocol: docs/study.md.

    python study.py probe                 what every layer of the tower knows: whether layers can matter at all
    python study.py run                   the runs that are not done yet; start it once for each core
    python study.py run --pilot           2 fusers x 3 seeds of their own: what difference can be seen at all
    python study.py table                 accuracy by kind, paired differences, study/*.png

The towers are those of `python toy.py retrain`, frozen. The scenes are toy.py's, pixel for pixel; its eight kinds of
question are answered from deep layers, so two kinds about the background, which deep layers forget, are asked as well.
A run is both stages by train.py's functions, short, then 5,000 questions by eval.py's, the same for all. What the tower
makes of the scenes is computed once (out/study). Every finished run is a row of study/results.csv, with a bit for each
question, so that all tables come from that file; a run that was stopped goes on, and one repeated gives the same row.
"""
import argparse
import csv
import hashlib
import math
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import closing, redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import data
import eval as exams
import parallel
import toy
import train
from ccra import NAMED, VLM
from clip import CLIPVision, preprocess
from llama import Llama, Tokenizer
from weights import UserError, autocast_dtype, run, write_beside

OUT, RESULTS = Path("out/study"), Path("study/results.csv")
STEPS, QUESTIONS, SEEDS, SWEEP_SEEDS, PILOT_SEEDS = (200, 900), 5000, 5, 3, (100, 101, 102)
KINDS = toy.QUESTIONS + ["tint", "shade"]
EXAM = 8                                     # toy.exam's seed: not the one that anything was chosen on

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


# ---------------------------------------------------------------------------------------------------------------------
# The world: toy.py's, and two kinds of question about the background

def ground(scene: toy.Scene) -> list[int]:
    """The background's red, green and blue, as toy.draw draws it: each 190 to 245."""
    rng = random.Random("background/" + scene.key)
    return [rng.randint(190, 245) for _ in range(3)]


def tint(scene: toy.Scene) -> str | None:
    """The background's strongest colour; None where the second is as strong but for 6 levels of 255."""
    low, high = sorted(ground(scene))[1:]
    return ("red", "green", "blue")[ground(scene).index(high)] if high - low >= 6 else None


def shade(scene: toy.Scene) -> str:
    """How light the background is, in quarters of all scenes: 1 (dark) to 4."""
    return str(1 + sum(sum(ground(scene)) >= edge for edge in (634, 653, 672)))


def ask(scene: toy.Scene, kind: str, rng: random.Random) -> toy.Turn | None:
    """A question of one of the two kinds."""
    answer = tint(scene) if kind == "tint" else shade(scene)
    text = {"tint": ["Which color is the background?", "What is the color of the background?"],
            "shade": ["How light is the background?", "Tell me how light the background is."]}[kind]
    return answer and toy.Turn(rng.choice(text), answer, answer)


def conversation(scene: toy.Scene) -> list[tuple[str, str]]:
    """toy.conversation's questions, with each of the two in half of the scenes, before or after; or, in a fifth of the
    scenes that have one question, instead."""
    rng, turns = random.Random("study/" + scene.key), toy.conversation(scene)
    more = [turn for kind in rng.sample(["tint", "shade"], 2) if (turn := ask(scene, kind, rng))]
    more = [(turn.question, turn.answer) for turn in more]
    if len(turns) == 1:
        return more[:1] if rng.random() < 0.2 else turns
    for turn in more:
        turns = [turns, turns + [turn], [turn] + turns][rng.choice([0, 0, 1, 2])]
    return turns


def exam(n: int) -> list[toy.Item]:
    """n held-out questions, every kind equally often: toy.exam's, then those about backgrounds."""
    items, i = toy.exam(EXAM, n * len(toy.QUESTIONS) // len(KINDS)), 0
    while len(items) < n:
        scene = toy.make_scene(f"test-study/{i}")
        kind, i = KINDS[8 + len(items) % 2], i + 1
        if turn := ask(scene, kind, random.Random("exam/" + scene.key)):
            items.append(toy.Item(scene, kind, [turn], False, False))
    return items


# ---------------------------------------------------------------------------------------------------------------------
# The tower's features, once for all runs

class Kept(nn.Module):
    """In the place of a tower whose states were computed before: what a VLM takes for pixels are those states."""

    def __init__(self, tower: CLIPVision):
        super().__init__()
        self.config, self.grid, self.layers = tower.config, tower.grid, ()

    def forward(self, kept: Tensor, n_layers: int) -> Tensor:
        """kept (B, L+1, 1+N, d) -> hidden (n_layers+1, B, 1+N, d), no copy."""
        return kept.transpose(0, 1)[:n_layers + 1]


class Scenes(toy.ToyScenes):
    """toy.ToyScenes with the study's questions, and the tower's states for pixels."""

    def __init__(self, stage: int, n: int, tokenizer, tower: CLIPVision, out: Path, size=toy.SIZE):
        super().__init__(f"study{stage}", n, stage, tokenizer, size)
        self.kept = features(self, tower, out)

    @cache                                     # noqa: B019 (one object a process, and train.py wants lengths first)
    def sample(self, i):
        turns = conversation(self.scene(i)) if self.stage == 2 else []
        record = toy.record(turns or [("Describe the picture.", toy.caption(self.scene(i)))], image="toy")
        return data.render(record, self.tokenizer, "plain" if self.stage == 1 else "v1")

    def __getitem__(self, i):
        return data.item(self.sample(i), self.kept[i])


@torch.no_grad()
def states(tower: CLIPVision, scenes: list) -> Tensor:
    """(B, L+1, 1+N, d) in bfloat16, of the tower in the number format and under the autocast that train.py has."""
    dtype = autocast_dtype(torch.device("cpu"))
    pixels = torch.stack([preprocess(toy.draw(s), tower.config.image_size, pad=True) for s in scenes])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return tower.to(dtype)(pixels).transpose(0, 1).bfloat16()


def features(scenes: Scenes, tower: CLIPVision, out: Path, batch=50) -> Tensor:
    """states of all of a data set's scenes, (n, L+1, 1+N, d), mapped from a file, which is written where it isn't."""
    sha = hashlib.sha256(b"".join(p.detach().float().numpy().tobytes() for p in tower.parameters())).hexdigest()[:8]
    path = out / f"{scenes.split}-{len(scenes)}-{sha}.bfloat16"
    shape = len(scenes), len(tower.layers) + 1, tower.grid ** 2 + 1, tower.config.hidden_size

    def write(tmp):
        with open(tmp, "wb") as file:
            for rows in data.split(list(range(len(scenes))), batch):
                part = states(tower, [scenes.scene(i) for i in rows])
                file.write(part.contiguous().view(torch.uint8).numpy().tobytes())
                print(f"\r{path} {rows[-1] + 1}/{len(scenes)}", end="", file=sys.stderr, flush=True)

    with closing(wait_for(out)):               # another process may be writing it
        if not path.exists():
            write_beside(path, write)
    return torch.from_file(str(path), size=math.prod(shape), dtype=torch.bfloat16).view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Probes: what a linear classifier can read from each layer

def bins(value: float, low: float, high: float, n: int) -> int:
    return min(n - 1, int((value - low) / (high - low) * n))


def index(values, value):
    return list(values).index(value) if value in values else None


# Of a thing, from the mean of a layer's patches over its box (thing, x, y, side, degrees as toy.layout has them)
OF_THINGS = {
    "word": lambda t, x, y, side, degrees: index(toy.WORDS, t.name),
    "shape": lambda t, x, y, side, degrees: index(toy.SHAPES, t.name),
    "kind of object": lambda t, x, y, side, degrees: index(toy.KINDS, t.name),
    "which look-alike": lambda t, x, y, side, degrees: index(sum(toy.ALIKE, ()), t.name),
    "colour of shape": lambda t, x, y, side, degrees: index(toy.COLORS, t.color),
    "place": lambda t, x, y, side, degrees: t.cell,
    "size, in 4": lambda t, x, y, side, degrees: bins(side, 18, 35, 4) if t.what == "object" else None,
    "turned, in 5": lambda t, x, y, side, degrees: bins(degrees, -35, 35, 5) if t.what == "object" else None,
}
# Of a scene, from one patch with nothing on it, and from the mean of all patches
OF_SCENES = {
    "tint": lambda scene: index(("red", "green", "blue"), tint(scene)),
    "shade, in 4": lambda scene: int(shade(scene)) - 1,
    "red of the ground, in 6": lambda scene: bins(ground(scene)[0], 190, 246, 6),
}


@torch.no_grad()
def gather(tower, split: str, n: int) -> dict[str, tuple[Tensor, list]]:
    """{question: (features (L+1, samples, d), answers; None: not asked)} of n scenes."""
    units, answers = {"thing": [], "patch": [], "picture": []}, {}
    for rows in data.split(range(n), 100):
        scenes = [toy.make_scene(f"{split}/{i}") for i in rows]
        hidden = states(tower, scenes)[:, :, 1:].float().permute(1, 0, 2, 3)             # (L+1, B, N, d)
        shares = toy.regions(scenes)[0]                                                  # (things, B N)
        free = shares.view(-1, len(scenes), hidden.shape[2]).sum(0).argmin(-1)           # (B), first patch without any
        units["thing"].append(shares @ hidden.flatten(1, 2))                             # (L+1, things, d)
        units["patch"].append(hidden[:, range(len(scenes)), free])                       # (L+1, B, d)
        units["picture"].append(hidden.mean(2))
        for name, of in OF_THINGS.items():
            answers.setdefault(("thing", name), []).extend(of(*row) for s in scenes for row in toy.layout(s))
        for unit, (name, of) in [(u, q) for u in ("patch", "picture") for q in OF_SCENES.items()]:
            answers.setdefault((unit, name), []).extend(map(of, scenes))
    return {f"{name} ({unit})": (torch.cat(units[unit], 1), values) for (unit, name), values in answers.items()}


def probe(X: Tensor, y: Tensor, X_test: Tensor, y_test: Tensor, penalty=1e-3) -> float:
    """Accuracy on X_test (m, d) of logistic regression, fitted to X (n, d) with answers y (n) long, until it rests."""
    mean, std = X.mean(0), X.std(0) + 1e-6
    X, X_test = (F.pad((x - mean) / std, (0, 1), value=1.0) for x in (X, X_test))        # (n, d+1), 1 for the bias
    W = X.new_zeros(X.shape[1], 1 + int(max(y.max(), y_test.max())), requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(X @ W, y) + penalty / 2 * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return ((X_test @ W).argmax(-1) == y_test).float().mean().item()


def probe_table(tower, n: int, n_test: int):
    """Yields (question, scenes' share of the commonest answer, accuracy of each layer 0..L)."""
    learn, test = gather(tower, "probe", n), gather(tower, "probe-test", n_test)
    for name in learn:
        (X, y), (X_test, y_test) = ((x[:, [i for i, v in enumerate(a) if v is not None]],
                                     torch.tensor([v for v in a if v is not None])) for x, a in (learn[name], test[name]))
        yield name, y_test.bincount().max().item() / len(y_test), [probe(a, y, b, y_test) for a, b in zip(X, X_test)]


def show_probes(args):
    L = (tower := CLIPVision.from_pretrained(args.towers / "clip")).config.num_hidden_layers
    print("| question | commonest | " + " | ".join(map(str, range(L + 1))) + " | best - worst of 1.." + f"{L} |")
    print("|---" * (L + 4) + "|")
    for name, commonest, right in probe_table(tower, args.n, args.n // 2):
        best, worst = (f(range(1, L + 1), key=lambda l: right[l]) for f in (max, min))
        print(f"| {name} | {commonest:.1%} | " + " | ".join(f"{100 * r:.1f}" for r in right)
              + f" | {100 * (right[best] - right[worst]):.1f} ({best}, {worst}) |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def plan() -> list[tuple[str, int]]:
    """(row, seed) of all runs, seed by seed, so that a study that is cut short has all rows."""
    return [(name, seed) for seed in range(SEEDS) for name in [*ROWS, *(SWEEPS if seed < SWEEP_SEEDS else ())]]


def arguments_of(name: str, seed: int, stage: int, args) -> argparse.Namespace:
    """train.py's, of one stage of a run."""
    flags = (ROWS | SWEEPS)[name][0].split()
    return train.arguments(["--stage", str(stage), "--seed", str(seed), "--steps", str(args.steps[stage - 1]), *flags,
                            "--out", str(args.out / "runs" / f"{name}-{seed}".replace(" ", "-") / f"stage{stage}"),
                            "--threads", "1", "--workers", "0", "--save-every", "300", "--device", "cpu"])


def train_stage(stage: int, name: str, seed: int, args, tower, before: VLM | None) -> VLM | None:
    """The model after a stage, `before` being that of stage 1; None if SIGTERM came. Goes on from a checkpoint."""
    a, llm = arguments_of(name, seed, stage, args), Llama.from_pretrained(args.towers / "llama", dtype=torch.float32)
    config = replace(train.fuser_config(a, tower.config, llm.config), **(ROWS | SWEEPS)[name][1])
    torch.manual_seed(seed)
    model = VLM.build(tower, llm, config, query=a.query or "all")
    model.vision = Kept(tower)
    if before:
        model.fuser.load_state_dict(before.fuser.state_dict())
        model.projector.load_state_dict(before.projector.state_dict())
    tokenizer = Tokenizer.from_pretrained(args.towers / "llama")
    scenes = Scenes(stage, a.steps * a.batch, tokenizer, tower, args.out, tower.config.image_size)
    a.out.mkdir(parents=True, exist_ok=True)
    course, cpu = train.settings(a, scenes), torch.device("cpu")
    dtype = autocast_dtype(cpu)
    trained = train.freeze(model, stage, a.mode)
    train.save_precision(trained, model, dtype)
    optimizer = train.adamw(trained, a.lr)
    start = parallel.Checkpoints(a.out / "checkpoints", a.keep).load(trained, optimizer, course)
    with open(a.out / "steps.txt", "a") as file, redirect_stdout(file):
        done = train.loop(a, model, trained, optimizer, scenes, tokenizer, course, start, 0, 1, cpu, dtype)
    return model if done else None


def finish(name: str, seed: int, args) -> dict | None:
    """One run: both stages, then the exam. Its row of results.csv, or None if SIGTERM came."""
    began, tower, model = time.perf_counter(), CLIPVision.from_pretrained(args.towers / "clip"), None
    tower.to(autocast_dtype(torch.device("cpu"))).requires_grad_(False)
    for stage in (1, 2):
        if not (model := train_stage(stage, name, seed, args, tower, model)):
            return None
    trained = time.perf_counter() - began
    model.vision, items = tower, exam(args.questions)
    model = model.float().eval()               # as eval.py and sample.py take a model of this size on a CPU
    texts = exams.sit(model, Tokenizer.from_pretrained(args.towers / "llama"), items, 100, torch.device("cpu"))
    right = [text == item.turns[-1].answer for text, item in zip(texts, items)]
    share = {kind: [ok for ok, item in zip(right, items) if item.kind == kind] for kind in KINDS}
    flags, fields = (ROWS | SWEEPS)[name]
    return dict(row=name, seed=seed, config=" ".join([flags, *(f"{k}={v}" for k, v in fields.items())]).strip(),
                steps="+".join(map(str, args.steps)), questions=len(items), accuracy=f"{sum(right) / len(right):.4f}",
                **{kind: f"{sum(ok) / len(ok):.4f}" for kind, ok in share.items()}, train_s=f"{trained:.0f}",
                exam_s=f"{time.perf_counter() - began - trained:.0f}", commit=commit(),
                right=f"{int('1' + ''.join(str(int(ok)) for ok in right), 2):x}")


def commit() -> str:
    """The commit that the code is of, with "+" if it was changed since."""
    git = lambda *words: subprocess.run(["git", "-C", str(toy.ROOT), *words], capture_output=True, text=True).stdout
    return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(git("status", "--porcelain", "--", "*.py"))


def read(path: Path) -> list[dict]:
    """The rows of a results.csv; none if there is no file."""
    with open(path if path.exists() else os.devnull, newline="") as file:
        return list(csv.DictReader(file))


def wait_for(folder: Path) -> parallel.Lock:
    """parallel.lock, when nobody else has it any more."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            return parallel.lock(folder)
        except UserError:
            time.sleep(0.2)


def add(path: Path, row: dict) -> None:
    """A row more in results.csv. Written beside and renamed, and one process at a time. UserError if it's there with
    another result: then something isn't the same any more."""
    with closing(wait_for(path.parent)):
        rows = read(path)
        for old in rows:
            if (old["row"], old["seed"], old["steps"]) == (row["row"], str(row["seed"]), row["steps"]):
                if old["right"] == row["right"]:
                    return
                raise UserError(f"{path}: {row['row']}, seed {row['seed']} had accuracy {old['accuracy']} at "
                                f"{old['commit']}, now {row['accuracy']}: not the same code, towers or machine")
        lines = [row.keys(), *([line[key] for key in row] for line in [*rows, row])]
        write_beside(path, lambda tmp: tmp.write_text("".join(",".join(map(str, line)) + "\n" for line in lines)))


def run_all(args):
    """The runs that have no row yet, or those of --only. Several processes share them: each takes what none has."""
    torch.set_num_threads(1)                   # threads change rounding
    todo = [(name, seed) for seed in PILOT_SEEDS for name in ("ccra", "llava")] if args.pilot else plan()
    for name, seed in todo:
        done = {(row["row"], row["seed"]) for row in read(args.results)}
        folder = arguments_of(name, seed, 1, args).out.parent
        if args.only and name not in args.only or not args.again and (name, str(seed)) in done:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = parallel.lock(folder)
        except UserError:                      # another process is at it
            continue
        with closing(held):
            if args.again:
                shutil.rmtree(folder / "stage1", ignore_errors=True), shutil.rmtree(folder / "stage2", ignore_errors=True)
            row = finish(name, seed, args)
            if row is None:
                return print("stopped; the same command goes on")
            add(args.results, row)
            for stage in (1, 2):
                shutil.rmtree(folder / f"stage{stage}" / "checkpoints")
        print(f"{name}, seed {seed}: {row['accuracy']}, {row['train_s']} + {row['exam_s']} s", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Tables

T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}    # 97.5% of Student's t
T80 = {1: 1.376, 2: 1.061, 3: 0.978, 4: 0.941, 5: 0.920, 6: 0.906, 7: 0.896, 8: 0.889, 9: 0.883}   # 80%


def error(d: Tensor) -> tuple[float, float]:
    """(mean, standard error) of d (S, Q): seeds down, questions across.

    Seeds and questions are both samples, and both are crossed: every seed answers every question. So the variance is
    that of the seeds' means over S, plus that of the questions' means over Q. (What is due to neither is in both terms,
    so it's a little too much.) With one seed only that of the questions is known.
    """
    S, Q = d.shape
    seeds = d.mean(1).var().item() / S if S > 1 else 0.0
    return d.mean().item(), math.sqrt(seeds + d.mean(0).var().item() / Q)


def interval(d: Tensor) -> tuple[float, float]:
    """(mean, half of the 95% interval): `error` times Student's t with S - 1 degrees of freedom."""
    mean, e = error(d)
    return mean, T[max(1, len(d) - 1)] * e


def bits(row: dict) -> list[int]:
    return [int(b) for b in f"{int(row['right'], 16):b}"[1:]]


def collect(rows: list[dict], pilot=False) -> dict[str, dict[int, Tensor]]:
    """{row: {seed: right (Q)}} in percent, of the study's seeds or of the pilot's."""
    found = {}
    for row in rows:
        if (int(row["seed"]) in PILOT_SEEDS) == pilot:
            found.setdefault(row["row"], {})[int(row["seed"])] = 100.0 * torch.tensor(bits(row))
    if len({len(right) for seeds in found.values() for right in seeds.values()}) > 1:
        raise UserError("results.csv: its rows were asked different numbers of questions")
    return found


def paired(a: dict[int, Tensor], b: dict[int, Tensor]) -> Tensor:
    """a - b (S, Q), of the seeds that both have."""
    seeds = sorted(a.keys() & b.keys())
    return torch.stack([a[seed] - b[seed] for seed in seeds]) if seeds else torch.zeros(0, 1)


def by_kind(Q: int) -> dict[str, list[int]]:
    """{kind: its questions' places in `exam`}, and of all."""
    old = Q * len(toy.QUESTIONS) // len(KINDS)
    kinds = [KINDS[i % 8] if i < old else KINDS[8 + i % 2] for i in range(Q)]
    return {"all": list(range(Q)), **{kind: [i for i in range(Q) if kinds[i] == kind] for kind in KINDS}}


def lines(rows: dict[str, dict[int, Tensor]], base: dict[int, Tensor] | None) -> dict[str, tuple[int, dict]]:
    """{row: (seeds, {kind: (mean, half)})}: accuracies, or paired differences from base."""
    found, kinds = {}, by_kind(len(next(iter(next(iter(rows.values())).values()))))
    for name, seeds in rows.items():
        d = torch.stack([seeds[s] for s in sorted(seeds)]) if base is None else paired(seeds, base)
        if len(d) and seeds is not base:
            found[name] = len(d), {kind: interval(d[:, places]) for kind, places in kinds.items()}
    return found


def show(title: str, found: dict[str, tuple[int, dict]], mark=False) -> None:
    """lines as markdown. mark: what excludes 0 is bold."""
    print(f"\n{title}\n\n| row | seeds | " + " | ".join(["all"] + KINDS) + " |\n" + "|---" * (len(KINDS) + 3) + "|")
    for name, (seeds, cells) in found.items():
        texts = [f"{mean:+.1f} ± {half:.1f}" if mark else f"{mean:.1f} ± {half:.1f}" for mean, half in cells.values()]
        bold = [mark and seeds > 1 and abs(mean) > half for mean, half in cells.values()]
        print(f"| {name} | {seeds} | " + " | ".join(f"**{t}**" if b else t for t, b in zip(texts, bold)) + " |")


def plot(found: dict[str, tuple[int, dict]], title: str) -> Image.Image:
    """A column for each kind, a line for each row: the difference, its interval, and 0."""
    left, top, width, line, fine = 130, 60, 110, 22, 2
    image = Image.new("RGB", (fine * (left + width * (len(KINDS) + 1) + 10), fine * (top + line * len(found) + 20)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12 * fine)
    most = max([abs(mean) + half for _, cells in found.values() for mean, half in cells.values()] + [1.0])
    write = lambda x, y, text, anchor: pen.text((fine * x, fine * y), text, font=font, fill=(60, 60, 60), anchor=anchor)
    write(10, 14, f"{title}; a column is {most:.1f} points wide to each side", "lm")
    for column, kind in enumerate(["all"] + KINDS):
        x = lambda value: fine * (left + width * (column + 0.5) + (width / 2 - 6) * value / most)
        write(left + width * (column + 0.5), 42, kind, "mm")
        pen.line([x(0), fine * top, x(0), fine * (top + line * len(found))], fill=(200, 200, 200), width=fine)
        for i, (name, (_, cells)) in enumerate(found.items()):
            y, (mean, half) = fine * (top + line * (i + 0.5)), cells[kind]
            color = (31, 80, 160) if abs(mean) > half else (150, 150, 150)
            pen.line([x(mean - half), y, x(mean + half), y], fill=color, width=2 * fine)
            pen.ellipse([x(mean) - 3 * fine, y - 3 * fine, x(mean) + 3 * fine, y + 3 * fine], fill=color)
            write(left - 8, top + line * (i + 0.5), name, "rm")
    return image.resize((image.width // fine, image.height // fine), Image.LANCZOS)


def show_tables(args):
    table = read(args.results)
    rows, pilot = collect(table), collect(table, pilot=True)
    if pilot.keys() >= {"ccra", "llava"} and len(d := paired(pilot["llava"], pilot["ccra"])) > 1:
        for kind, places in by_kind(d.shape[1]).items():
            part, S = d[:, places], len(d)
            e = math.sqrt(part.mean(1).var().item() / SEEDS + part.mean(0).var().item() / len(places))
            print(f"pilot, {S} seeds, {kind}: llava - ccra = {part.mean():+.1f}; with {SEEDS} seeds a difference of "
                  f"{(T[SEEDS - 1] + T80[SEEDS - 1]) * e:.1f} would be found in 80% of studies")
    if not rows:
        return print(f"{args.results}: no run of the study yet")
    if args.base not in rows:
        raise UserError(f"{args.results} has no row {args.base!r} to compare with")
    found = lines(rows, rows[args.base])
    show("Accuracy in percent, with its 95% interval", lines(rows, None))
    show(f"Points more than {args.base}, paired; bold: the 95% interval excludes 0", found, mark=True)
    path = args.results.parent / f"differences-from-{args.base.replace(' ', '-')}.png"
    write_beside(path, lambda tmp: plot(found, f"points more than {args.base}").save(tmp, format="PNG"))
    seconds = sum(float(row["train_s"]) + float(row["exam_s"]) for row in table)
    print(f"\n{len(table)} runs, {seconds / 3600:.1f} hours of one core; drawn in {path}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=("probe", "run", "table"))
    p.add_argument("--towers", type=Path, default=toy.OUT, help="the folder with clip and llama (default: %(default)s)")
    p.add_argument("--out", type=Path, default=OUT, help="for features and unfinished runs (default: %(default)s)")
    p.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    p.add_argument("--n", type=int, default=3000, help="probe: scenes to learn from; half as many to test with")
    p.add_argument("--only", nargs="+", choices=[*ROWS, *SWEEPS], metavar="ROW", help="run: these rows alone")
    p.add_argument("--pilot", action="store_true", help="run: ccra and llava with the pilot's seeds")
    p.add_argument("--again", action="store_true", help="run: also what has a row, which must come out the same")
    p.add_argument("--steps", type=int, nargs=2, default=STEPS, help="run: of stage 1 and 2 (default: %(default)s)")
    p.add_argument("--questions", type=int, default=QUESTIONS, help="run: how many (default: %(default)s)")
    p.add_argument("--base", default="ccra", help="table: the row that others are compared with")
    args = p.parse_args(argv)
    dict(probe=show_probes, run=run_all, table=show_tables)[args.command](args)


if __name__ == "__main__":
    run(main)
