"""What does each layer of the tower know? Whether a fuser reads one layer or all can only matter if
the layers know different things.

So a linear classifier is fitted to the patches of every layer, for one question after the other,
and tested on other scenes. What came out is the first table of docs/study.md.
"""
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fast
from clip import CLIPVision
from core.common import split
from study.features import states
from study.world import ground, shade, tint
from toy import world as toy
from toy.towers import regions

Answers = dict[str, int | None]        # to each question its answer's number; None: not asked


# --------------------------------------------------------------------------------------------------
# The questions

def index(values: Sequence, value) -> int | None:
    """Where it stands among values; None if it doesn't."""
    return list(values).index(value) if value in values else None


def bins(value: float, low: float, high: float, n: int) -> int:
    """Which of n equal parts of low to high it lies in."""
    return min(n - 1, int((value - low) / (high - low) * n))


def of_thing(thing: toy.Thing, x: float, y: float, side: float, degrees: float) -> Answers:
    """What is asked of a thing that is drawn so (toy.layout), from the mean of a layer's patches
    over its box."""
    is_object = thing.what == "object"
    return {
        "word": index(toy.WORDS, thing.name),
        "shape": index(toy.SHAPES, thing.name),
        "kind of object": index(toy.KINDS, thing.name),
        "which look-alike": index(sum(toy.ALIKE, ()), thing.name),
        "colour of shape": index(toy.COLORS, thing.color),
        "place": thing.cell,
        "size, in 4": bins(side, 18, 35, 4) if is_object else None,
        "turned, in 5": bins(degrees, -35, 35, 5) if is_object else None,
    }


def of_scene(scene: toy.Scene) -> Answers:
    """What is asked of a scene, from one patch with nothing on it, and from the mean of all."""
    return {
        "tint": index(("red", "blue"), tint(scene)),
        "shade, in 4": int(shade(scene)) - 1,
        "red of the ground, in 6": bins(ground(scene)[0], 190, 246, 6),
    }


# --------------------------------------------------------------------------------------------------
# Features and answers

@torch.no_grad()
def gather(tower: CLIPVision, scenes_of: str, n: int) -> dict[str, tuple[Tensor, list]]:
    """{question: (features (L+1, samples, d), answers; None: not asked)} of n scenes."""
    units = {"thing": [], "patch": [], "picture": []}
    answers = {}                                                   # {(unit, question): [answer]}
    for rows in split(range(n), 100):
        scenes = [toy.make_scene(f"{scenes_of}/{i}") for i in rows]
        hidden = states(tower, scenes)[:, :, 1:].float().permute(1, 0, 2, 3)     # (L+1, B, N, d)
        shares = regions(scenes)[0]                                              # (things, B N)
        covered = shares.view(-1, len(scenes), hidden.shape[2]).sum(0)           # (B, N)
        free = covered.argmin(-1)                                                # (B), a bare patch
        units["thing"].append(shares @ hidden.flatten(1, 2))                     # (L+1, things, d)
        units["patch"].append(hidden[:, range(len(scenes)), free])               # (L+1, B, d)
        units["picture"].append(hidden.mean(2))                                  # (L+1, B, d)
        given = [("thing", of_thing(*drawn)) for scene in scenes for drawn in toy.layout(scene)]
        given += [(unit, of_scene(scene)) for unit in ("patch", "picture") for scene in scenes]
        for unit, said in given:
            for question, answer in said.items():
                answers.setdefault((unit, question), []).append(answer)
    return {f"{question} ({unit})": (torch.cat(units[unit], 1), values)
            for (unit, question), values in answers.items()}


def asked(X: Tensor, answers: list) -> tuple[Tensor, Tensor]:
    """(L+1, samples, d) and answers (samples) without those that are None."""
    there = [i for i, answer in enumerate(answers) if answer is not None]
    return X[:, there], torch.tensor([answers[i] for i in there])


# --------------------------------------------------------------------------------------------------
# What a linear classifier can read

def probe(X: Tensor, y: Tensor, X_test: Tensor, y_test: Tensor, penalty: float = 1e-3) -> float:
    """Accuracy on X_test (m, d) of logistic regression, fitted to X (n, d) with answers y (n) long,
    until it rests."""
    mean = X.mean(0)
    std = X.std(0) + 1e-6
    X = F.pad((X - mean) / std, (0, 1), value=1.0)                      # (n, d+1), 1 for the bias
    X_test = F.pad((X_test - mean) / std, (0, 1), value=1.0)            # (m, d+1)
    classes = 1 + int(max(y.max(), y_test.max()))
    W = X.new_zeros(X.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(X @ W, y) + penalty / 2 * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return ((X_test @ W).argmax(-1) == y_test).float().mean().item()


def probe_table(tower: CLIPVision, n: int, n_test: int) -> Iterator[tuple[str, float, list]]:
    """Yields (question, share of the commonest answer, accuracy from each layer 0..L)."""
    learn = gather(tower, "probe", n)
    test = gather(tower, "probe-test", n_test)
    for question in learn:
        X, y = asked(*learn[question])
        X_test, y_test = asked(*test[question])
        commonest = y_test.bincount().max().item() / len(y_test)
        yield question, commonest, [probe(a, y, b, y_test) for a, b in zip(X, X_test)]


def show_probes(clip: Path, n: int) -> None:
    """Print the table, of n scenes to learn from and half as many to test with. clip: the tower's
    folder."""
    tower = fast.prepare(CLIPVision.from_pretrained(clip))
    L = tower.config.num_hidden_layers
    layers = " | ".join(map(str, range(L + 1)))
    print(f"| question | commonest | {layers} | best - worst of 1..{L} |")
    print("|---" * (L + 4) + "|")
    for question, commonest, right in probe_table(tower, n, n // 2):
        best = max(range(1, L + 1), key=right.__getitem__)
        worst = min(range(1, L + 1), key=right.__getitem__)
        percents = " | ".join(f"{100 * share:.1f}" for share in right)
        span = f"{100 * (right[best] - right[worst]):.1f} ({best}, {worst})"
        print(f"| {question} | {commonest:.1%} | {percents} | {span} |", flush=True)
