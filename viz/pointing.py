"""Whether the model looks where it should, in numbers: toy-world questions whose answer is in a
known place, or should need deeper layers.

    python -m viz --pointing      "Where is the X?": do the maps lie on X?
    python -m viz --depth         do questions about looks use shallower layers than counting?
"""
import math
import random

import torch
from torch import Tensor
from tqdm import tqdm

from ccra import VLM
from clip import preprocess
from core.common import UserError
from core.tokenizer import Tokenizer
from data import item, make_batch, prompt
from toy import exam
from toy import world as toy
from viz.maps import Box, Sight, ask, middle

LOOKS, THOUGHT = ("colour", "word"), ("count", "left-of")        # kinds of questions
MIDDLE = "language model, blocks n/3 to 2n/3"
Scores = dict[str, dict[str, list[float]]]     # {map: {column: a number for each question}}


def mean95(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval; of less than two values, nan."""
    x = torch.tensor(values, dtype=torch.float64)
    half = 1.96 * x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return x.mean().item(), half


# --------------------------------------------------------------------------------------------------
# Pointing

def cover(box: Box, grid: int, side: float) -> tuple[Tensor, Tensor]:
    """How much of each patch a box covers, (N) in 0..1, and whether the patch's centre lies in it,
    (N) bool. box: in pixels of a picture that is `side` wide and high."""
    edges = torch.arange(grid + 1, dtype=torch.float64) * side / grid
    centres = (edges[1:] + edges[:-1]) / 2

    def along(low: float, high: float) -> tuple[Tensor, Tensor]:
        share = edges.clamp(low, high).diff() * grid / side              # (grid)
        return share, (low <= centres) & (centres <= high)

    left, top, right, bottom = box
    across, x_in = along(left, right)
    down, y_in = along(top, bottom)
    return torch.outer(down, across).flatten(), torch.outer(y_in, x_in).flatten()


def where_items(seed: int, n: int) -> list[tuple]:
    """n held-out (item, row of toy.layout, row of another thing in the scene or None): "where"
    questions about what is there."""
    found = []
    for question in exam.exam(seed, 12 * n + 100):
        if question.kind != "where" or len(found) == n:
            continue
        rows = toy.layout(question.scene)
        place = question.turns[-1].short
        asked = [row for row in rows if toy.PLACES[row[0].cell] == place]
        if asked:
            others = [row for row in rows if row is not asked[0]]
            rng = random.Random(question.scene.key)
            found.append((question, asked[0], rng.choice(others) if others else None))
    return found


def shares(sight: Sight) -> dict[str, Tensor]:
    """{map: (N)}, each summing to 1. w_p and W_lp are scores of either sign, so their softmax."""
    N = sight.grid ** 2
    found = {"chance": torch.full((N,), 1 / N)}                          # an even map
    if "w_p" in sight.maps:
        found["LPWCA, mean of the layers"] = sight.maps["W_lp"].mean(0).softmax(-1)
        found["PWCA"] = sight.maps["w_p"].softmax(-1)
    llm = sight.llm.mean(1)                                              # (blocks, N)
    for block, values in enumerate(llm):
        found[f"language model, block {block + 1}"] = values / values.sum()
    if len(middle(len(llm))) > 1:
        values = llm[list(middle(len(llm)))].mean(0)
        found[MIDDLE] = values / values.sum()
    return found


def pointing(model: VLM, tokenizer: Tokenizer, n: int, seed: int) -> Scores:
    """How each map does on n held-out questions; the columns are hit, mass, hit other, mass other.

    hit: the centre of the highest patch lies in the box of the thing asked for; mass: the share of
    the map in it; other: the same for another thing of the scene.
    """
    scores = {}
    blocks = range(len(model.llm.layers))
    for asked, thing, other in tqdm(where_items(seed, n), desc="looking", unit="question"):
        question = asked.turns[-1].question
        sight = ask(model, tokenizer, toy.draw(asked.scene), question, blocks, 24)
        for end, row in (("", thing), (" other", other)):
            if row is None:
                continue
            covered, centre = cover(toy.box(*row[:4]), sight.grid, toy.SIZE)
            for name, share in shares(sight).items():
                highest = share == share.max()                           # of an even map: all
                columns = scores.setdefault(name, {})
                columns.setdefault("hit" + end, []).append(float(centre[highest].double().mean()))
                columns.setdefault("mass" + end, []).append(float(share.double() @ covered))
    return scores


def show_pointing(scores: Scores) -> None:
    """Print `pointing`'s means and their 95% intervals."""
    columns = ("hit", "mass", "hit other", "mass other")
    print(f"{'':36}" + "".join(f"{name:>16}" for name in columns))
    for name, row in scores.items():
        cells = ["{:6.1%} +-{:5.1%}".format(*mean95(row.get(column, []))) for column in columns]
        print(f"{name:36}" + "".join(f"{cell:>16}" for cell in cells))


# --------------------------------------------------------------------------------------------------
# Depth

def depth(w_hat: Tensor) -> float:
    """The mean layer, counted from 1, under the weights (L)."""
    return float((w_hat * torch.arange(1, len(w_hat) + 1)).sum())


def depths(model: VLM, tokenizer: Tokenizer, n: int, seed: int) -> dict[str, list[float]]:
    """{kind: [mean depth under w_hat of n held-out questions]}. UserError for a fuser that doesn't
    weigh layers."""
    found, device = {}, next(model.parameters()).device
    asked = [one for one in exam.exam(seed, 8 * n) if one.kind in LOOKS + THOUGHT]
    for one in tqdm(asked, desc="looking", unit="question"):
        row = prompt([(one.turns[-1].question, None)], tokenizer)
        pixels = preprocess(toy.draw(one.scene), **model.image)
        batch = make_batch([item(row, pixels)], model.query, device=device)
        with torch.no_grad():
            _, maps = model.look(batch["pixels"], batch["query"], batch["query_mask"])
        if "w_hat" not in maps:
            raise UserError(
                "this model's fuser doesn't weigh layers, so there is no depth to measure")
        found.setdefault(one.kind, []).append(depth(maps["w_hat"][0].cpu()))
    return found


def show_depths(found: dict[str, list[float]], L: int) -> None:
    """Print `depths` for a tower of L layers, and how much deeper thought is than looks."""
    print(f"mean layer of 1 to {L}; all alike: {(L + 1) / 2}")
    for kind in LOOKS + THOUGHT:
        mean, half = mean95(found[kind])
        print(f"{kind:10} {mean:6.3f} +- {half:.3f}")
    looks, looks_half = mean95([d for kind in LOOKS for d in found[kind]])
    thought, thought_half = mean95([d for kind in THOUGHT for d in found[kind]])
    print(f"{', '.join(THOUGHT)} deeper than {', '.join(LOOKS)} by {thought - looks:.3f} +- "
          f"{math.hypot(looks_half, thought_half):.3f}")
