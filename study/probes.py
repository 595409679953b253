"""What does each layer of the tower know? And the study's world, in which that matters.

    python study.py probe

Whether a fuser reads one layer or all can only matter if the layers know different things. So a
linear classifier is fitted to the patches of every layer, for one question after the other, and
tested on other scenes.

toy.py's eight kinds of question are answered from deep layers, printed words all the better the
deeper. What deep layers forget, since no caption told it when the CLIP was trained, is how the
background looks. So the study asks two kinds of question more, about the same scenes, which stay as
they are, pixel for pixel, and its captions tell it, too.
"""
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from clip import CLIPVision, preprocess
from core import common
from core.device import autocast_dtype
from toy import exam, questions
from toy import world as toy
from toy.towers import regions

KINDS = questions.QUESTIONS + ["tint", "shade"]
EXAM = 8                           # exam.exam's seed: not the one that toy.py's model was chosen on

# --------------------------------------------------------------------------------------------------
# The world: toy.py's, and two kinds of question about the background

def ground(scene: toy.Scene) -> list[int]:
    """The background's red, green and blue, as toy.draw draws it: each 190 to 245."""
    rng = random.Random("background/" + scene.key)
    return [rng.randint(190, 245) for _ in range(3)]


def tint(scene: toy.Scene) -> str | None:
    """Whether the background has more red or more blue; None where it is the same but for 10 levels
    of 255."""
    red, _, blue = ground(scene)
    return ("red" if red > blue else "blue") if abs(red - blue) >= 10 else None


def shade(scene: toy.Scene) -> str:
    """How light the background is, in quarters of all scenes: 1 (dark) to 4."""
    return str(1 + sum(sum(ground(scene)) >= edge for edge in (634, 653, 672)))


def ask(scene: toy.Scene, kind: str, rng: random.Random) -> questions.Turn | None:
    """A question of one of the two kinds."""
    answer = tint(scene) if kind == "tint" else shade(scene)
    text = {
        "tint": ["What color is the picture?", "Which color does the picture have?"],
        "shade": ["What is the number of the picture?", "What number does the picture have?"]}[kind]
    return answer and questions.Turn(rng.choice(text), answer, answer)


def background(scene: toy.Scene) -> str:
    """What there is to say about it: "red picture 3". In words that the tokenizer has as one piece:
    a patch, which is one row of what the Llama reads, can't say a word of five."""
    return " ".join(filter(None, [tint(scene), "picture", shade(scene)]))


def caption(scene: toy.Scene) -> str:
    """toy.caption's, and the background before it: in a place where it's known to come, it is told
    or missed; after things in any order what comes next can't be foreseen, however well the
    background is seen."""
    return background(scene) + ", " + questions.caption(scene)


def conversation(scene: toy.Scene, max_turns=8) -> list[tuple[str, str]]:
    """toy.conversation's questions, printed words more often, with the two kinds before or after;
    or, in a third of the scenes that have one question, one of the two instead."""
    rng, turns = random.Random("study/" + scene.key), questions.conversation(
        scene, max_turns, also=["word", "word"])
    more = [turn for kind in rng.sample(["tint", "shade"], 2) if (turn := ask(scene, kind, rng))]
    more = [(turn.question, turn.answer) for turn in more]
    if len(turns) == 1:
        return more[:1] if rng.random() < 1 / 3 else turns
    for turn in more:
        turns = rng.choice([turns + [turn], [turn] + turns])
    return turns


def text_rows(tokenizer, step: int, batch=32) -> list[tuple[list, list]]:
    """As towers.text_rows, [(ids, labels)], of this world: what the study's Llama reads, to know
    the two kinds of question from text as it knows the others."""
    rows = []
    for i in range(batch):
        scene = toy.make_scene(f"study/text/{step}/{i}")
        grid = [background(scene),
                questions.grid(scene)][::random.Random(scene.key).choice((1, -1))]
        seen = [
            caption(scene), " ".join(grid),
            *2 * [questions.glimpses(scene, background(scene))]][i % 4]
        if turns := conversation(scene, 12):
            record = questions.record([(seen + "\n" + turns[0][0], turns[0][1])] + turns[1:])
            sample = data.render(record, tokenizer, "v1")
            rows.append((sample.ids, sample.labels))
    return rows


def exam(n: int) -> list[exam.Item]:
    """n held-out questions, every kind equally often: exam.exam's, then those about backgrounds."""
    items, i = exam.exam(EXAM, n * len(questions.QUESTIONS) // len(KINDS)), 0
    while len(items) < n:
        scene = toy.make_scene(f"test-study/{i}")
        kind, i = KINDS[8 + len(items) % 2], i + 1
        if turn := ask(scene, kind, random.Random("exam/" + scene.key)):
            items.append(exam.Item(scene, kind, [turn], False, False))
    return items


# --------------------------------------------------------------------------------------------------
# What a linear classifier can read from each layer

@torch.no_grad()
def states(tower: CLIPVision, scenes: list) -> Tensor:
    """(B, L+1, 1+N, d) in bfloat16, of the tower in the number format and under the autocast that
    train.py has."""
    dtype = autocast_dtype(torch.device("cpu"))
    pixels = torch.stack([
        preprocess(toy.draw(s), tower.config.image_size, pad=True) for s in scenes])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return tower.to(dtype)(pixels).transpose(0, 1).bfloat16()


def bins(value: float, low: float, high: float, n: int) -> int:
    return min(n - 1, int((value - low) / (high - low) * n))


def index(values, value):
    return list(values).index(value) if value in values else None


# Of a thing, from the mean of a layer's patches over its box (thing, x, y, side, degrees as
# toy.layout has them)
OF_THINGS = {
    "word": lambda t, x, y, side, degrees: index(toy.WORDS, t.name),
    "shape": lambda t, x, y, side, degrees: index(toy.SHAPES, t.name),
    "kind of object": lambda t, x, y, side, degrees: index(toy.KINDS, t.name),
    "which look-alike": lambda t, x, y, side, degrees: index(sum(toy.ALIKE, ()), t.name),
    "colour of shape": lambda t, x, y, side, degrees: index(toy.COLORS, t.color),
    "place": lambda t, x, y, side, degrees: t.cell,
    "size, in 4": lambda t, x, y, side, degrees: bins(side, 18, 35, 4)
                  if t.what == "object" else None,
    "turned, in 5": lambda t, x, y, side, degrees: bins(degrees, -35, 35, 5)
                    if t.what == "object" else None, }
# Of a scene, from one patch with nothing on it, and from the mean of all patches
OF_SCENES = {
    "tint": lambda scene: index(("red", "blue"), tint(scene)),
    "shade, in 4": lambda scene: int(shade(scene)) - 1,
    "red of the ground, in 6": lambda scene: bins(ground(scene)[0], 190, 246, 6),
}


@torch.no_grad()
def gather(tower, split: str, n: int) -> dict[str, tuple[Tensor, list]]:
    """{question: (features (L+1, samples, d), answers; None: not asked)} of n scenes."""
    units, answers = {"thing": [], "patch": [], "picture": []}, {}
    for rows in common.split(range(n), 100):
        scenes = [toy.make_scene(f"{split}/{i}") for i in rows]
        hidden = states(tower, scenes)[:, :, 1:].float().permute(1, 0, 2, 3)        # (L+1, B, N, d)
        shares = regions(scenes)[0]                                                  # (things, B N)
        # (B), first patch without any
        free = shares.view(-1, len(scenes), hidden.shape[2]).sum(0).argmin(-1)
        units["thing"].append(shares @ hidden.flatten(1, 2))  # (L+1, things, d)
        units["patch"].append(hidden[:, range(len(scenes)), free])                 # (L+1, B, d)
        units["picture"].append(hidden.mean(2))
        for name, of in OF_THINGS.items():
            answers.setdefault(("thing", name),
                               []).extend(of(*row) for s in scenes for row in toy.layout(s))
        for unit, (name, of) in [(u, q) for u in ("patch", "picture") for q in OF_SCENES.items()]:
            answers.setdefault((unit, name), []).extend(map(of, scenes))
    return {
        f"{name} ({unit})": (torch.cat(units[unit], 1), values)
        for (unit, name), values in answers.items()}


def probe(X: Tensor, y: Tensor, X_test: Tensor, y_test: Tensor, penalty=1e-3) -> float:
    """Accuracy on X_test (m, d) of logistic regression, fitted to X (n, d) with answers y (n) long,
    until it rests."""
    mean, std = X.mean(0), X.std(0) + 1e-6
    # (n, d+1), 1 for the bias
    X, X_test = (F.pad((x - mean) / std, (0, 1), value=1.0) for x in (X, X_test))
    W = X.new_zeros(X.shape[1], 1 + int(max(y.max(), y_test.max())), requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(X @ W, y) + penalty / 2 * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return ((X_test @ W).argmax(-1) == y_test).float().mean().item()


def asked(X: Tensor, answers: list) -> tuple[Tensor, Tensor]:
    """(L+1, samples, d) and answers without those that are None."""
    there = [i for i, answer in enumerate(answers) if answer is not None]
    return X[:, there], torch.tensor([answers[i] for i in there])


def probe_table(tower, n: int, n_test: int):
    """Yields (question, share of the commonest answer, accuracy from each layer 0..L)."""
    learn, test = gather(tower, "probe", n), gather(tower, "probe-test", n_test)
    for name in learn:
        (X, y), (X_test, y_test) = (asked(*part[name]) for part in (learn, test))
        yield name, y_test.bincount().max().item() / len(y_test), [
            probe(a, y, b, y_test) for a, b in zip(X, X_test)]


def show_probes(clip: Path, n: int) -> None:
    """Print the table, of n scenes to learn from and half as many to test with."""
    L = (tower := CLIPVision.from_pretrained(clip)).config.num_hidden_layers
    print("| question | commonest | " + " | ".join(map(str, range(L + 1))) +
          " | best - worst of 1.." + f"{L} |")
    print("|---" * (L + 4) + "|")
    for name, commonest, right in probe_table(tower, n, n // 2):
        best, worst = (f(range(1, L + 1), key=lambda l: right[l]) for f in (max, min))
        print(f"| {name} | {commonest:.1%} | " + " | ".join(f"{100 * r:.1f}" for r in right)
              + f" | {100 * (right[best] - right[worst]):.1f} ({best}, {worst}) |", flush=True)
