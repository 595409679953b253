"""TODO viz/pointing.py"""
import math
import random

import torch
from torch import Tensor
from tqdm import tqdm

from ccra import VLM
from clip import preprocess
from core.common import UserError
from core.tokenizer import Tokenizer
from data import prompt, query_of
from toy import exam
from toy import world as toy
from viz.maps import ask, middle

# --------------------------------------------------------------------------------------------------
# Numbers


def mean95(values: list) -> tuple:
    """Mean, and half the width of its 95% interval; of less than two values, nan."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), 1.96 * x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan


def depth(w_hat: Tensor) -> float:
    """The mean layer, counted from 1, under the weights (L)."""
    return float((w_hat * torch.arange(1, len(w_hat) + 1)).sum())


def cover(box, grid: int, side: float) -> tuple[Tensor, Tensor]:
    """How much of each patch a box covers, (N) in 0..1, and whether the patch's centre lies in it, (N) bool.

    box (left, top, right, bottom) in pixels of a picture that is `side` wide and high.
    """
    edges = torch.arange(grid + 1, dtype=torch.float64) * side / grid
    centres = (edges[1:] + edges[:-1]) / 2
    (across, x_in), (down, y_in) = (((edges.clamp(a, b)).diff() * grid / side, (a <= centres) & (centres <= b))
                                    for a, b in (box[0::2], box[1::2]))
    return torch.outer(down, across).flatten(), torch.outer(y_in, x_in).flatten()


def where_items(seed: int, n: int) -> list:
    """n held-out (item, row of toy.layout, row of another thing in the scene or None): "where" questions about what
    is there."""
    found = []
    for item in (item for item in exam.exam(seed, 12 * n + 100) if item.kind == "where"):
        rows = toy.layout(item.scene)
        asked = [row for row in rows if toy.PLACES[row[0].cell] == item.turns[-1].short]
        if asked and len(found) < n:
            others = [row for row in rows if row is not asked[0]]
            found.append((item, asked[0], random.Random(item.scene.key).choice(others) if others else None))
    return found


def pointing(model: VLM, tokenizer: Tokenizer, n: int, seed: int) -> dict:
    """{map: {"hit", "mass", "hit other", "mass other": [a number for each question]}}; "chance": an even map's.

    hit: the centre of the highest patch lies in the box of the thing asked for; mass: the share of the map in it (w_p
    and W_lp are scores of either sign, so their softmax); other: the same for another thing of the scene.
    """
    scores, blocks = {}, len(model.llm.layers)
    names = {f"language model, block {l + 1}": [l] for l in range(blocks)}
    if len(middle(blocks)) > 1:
        names["language model, blocks n/3 to 2n/3"] = list(middle(blocks))

    def score(name, share, row, end):
        """share (N), sums to 1."""
        covered, centre = cover(toy.box(*row[:4]), grid, toy.SIZE)
        entry, highest = scores.setdefault(name, {}), share == share.max()           # several in an even map: any
        entry.setdefault("hit" + end, []).append(float(centre[highest].double().mean()))
        entry.setdefault("mass" + end, []).append(float(share.double() @ covered))

    for item, asked, other in tqdm(where_items(seed, n), desc="looking", unit="question"):
        sight = ask(model, tokenizer, toy.draw(item.scene), item.turns[-1].question, range(blocks), 24)
        grid, llm = sight.grid, sight.llm.mean(1)                                    # (blocks, N)
        shares = {"chance": torch.full((grid * grid,), 1 / grid ** 2)}
        if "w_p" in sight.maps:
            shares["LPWCA, mean of the layers"] = sight.maps["W_lp"].mean(0).softmax(-1)
            shares["PWCA"] = sight.maps["w_p"].softmax(-1)
        shares |= {name: llm[layers].mean(0) / llm[layers].mean(0).sum() for name, layers in names.items()}
        for name, share in shares.items():
            score(name, share, asked, "")
            if other:
                score(name, share, other, " other")
    return scores


def show_pointing(scores: dict) -> None:
    columns = ("hit", "mass", "hit other", "mass other")
    print(f"{'':36}" + "".join(f"{name:>16}" for name in columns))
    for name, row in scores.items():
        cells = ["{:6.1%} +-{:5.1%}".format(*mean95(row.get(column, []))) for column in columns]
        print(f"{name:36}" + "".join(f"{cell:>16}" for cell in cells))


LOOKS, THOUGHT = ("colour", "word"), ("count", "left-of")


def depths(model: VLM, tokenizer: Tokenizer, n: int, seed: int) -> dict:
    """{kind: [mean depth under w_hat of n held-out questions]}."""
    found, device = {}, next(model.parameters()).device
    for item in tqdm([item for item in exam.exam(seed, 8 * n) if item.kind in LOOKS + THOUGHT], desc="looking"):
        row = prompt([(item.turns[-1].question, None)], tokenizer)
        query = torch.tensor([query_of(row.turns, model.query)], device=device)
        pixels = preprocess(toy.draw(item.scene), **model.image)[None].to(device)
        with torch.no_grad():
            maps = model.look(pixels, query, torch.ones_like(query, dtype=torch.bool))[1]
        if "w_hat" not in maps:
            raise UserError("this model's fuser doesn't weigh layers, so there is no depth to measure")
        found.setdefault(item.kind, []).append(depth(maps["w_hat"][0].cpu()))
    return found


def show_depths(found: dict, L: int) -> None:
    print(f"mean layer of 1 to {L}; all alike: {(L + 1) / 2}")
    for kind in LOOKS + THOUGHT:
        print(f"{kind:10} {mean95(found[kind])[0]:6.3f} +- {mean95(found[kind])[1]:.3f}")
    looks, thought = ([d for kind in kinds for d in found[kind]] for kinds in (LOOKS, THOUGHT))
    (a, a95), (b, b95) = mean95(looks), mean95(thought)
    print(f"{', '.join(THOUGHT)} deeper than {', '.join(LOOKS)} by {b - a:.3f} +- {math.hypot(a95, b95):.3f}")
