"""What the model looks at while it answers, and whether that is where it should look.

    python look.py --pointing      500 held-out "Where is the X?": do the maps lie on X?
    python look.py --depth         do questions about looks use shallower layers than questions that need counting?

CCRA's maps come with every answer (ccra.py). Attention inside the language model doesn't: it is fused, its weights are
never written out. `watch` computes those of the newest position again, beside the answer, from the same queries and
keys; nothing is changed, and what isn't watched costs nothing. viz.py draws what is found:

    sight = look.ask(model, tokenizer, image, "Where is the cat?")
    viz.figure3(sight).save("out.png")
"""
import argparse
import math
import random
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from toy import world as toy
from ccra import CCRA, USED, VLM, project, smooth
from clip import preprocess
from data import collate, prompt, query_of
from llama import IMAGE_TOKEN, Tokenizer
from core.weights import UserError, pick_device, run


@dataclass
class Sight:
    """One question about one picture, and all that was looked at for the answer. Tensors are float32 on the CPU.

    llm (layers, A, N): each patch's share of the attention from which each of the answer's A tokens was said, in each
    watched block of the language model; mean over heads. What remains of 1 went to words.
    maps: CCRA's, without the batch: alpha (T), W_lp (L, N), w_l, w_hat (L), w_p (N), and `layer_map` (L, N). Empty for
    a fuser that has none.
    box: (left, top, right, bottom) of the picture in the square that the model saw, in 0..1.
    """
    image: Image.Image
    box: tuple
    grid: int              # N = grid * grid patches, row by row
    question: str
    words: list            # the query's tokens as text, one for each alpha
    tokens: list           # the answer's
    llm: Tensor
    layers: list           # which blocks these are, counted from 1
    maps: dict
    name: str = ""         # the model's

    def looked(self, token: int | None = None) -> Tensor:
        """(N): where the language model looked to say one token, or on average over all (Figure 2)."""
        mean = self.llm.mean(0)                                                      # (A, N)
        return mean.mean(0) if token is None else mean[token]


@dataclass
class Seen:
    """What `watch` notes. rows: {block: [(T) for each step]}, the attention of the position that says the next token
    to all T positions so far; mean over heads, sums to 1."""
    rows: dict
    maps: dict = field(default_factory=dict)

    def sight(self, model: VLM, tokenizer: Tokenizer, image, question, batch, tokens, name="") -> Sight:
        """batch: what model.generate was given; tokens: the ids that came out. UserError if a picture's rows aren't
        its patches."""
        grid, ids = model.vision.grid, batch["ids"][0].tolist()
        at, N = ids.index(IMAGE_TOKEN), grid ** 2
        steps = max(1, len(tokens))          # an answer that ends at once: what made it end
        if len(next(iter(self.rows.values()))[0]) != len(ids) - 1 + N:
            raise UserError(f"{name or 'this model'}: its fuser doesn't give one row for each of {N} patches, so its "
                            "attention can't be drawn on the picture")
        llm = torch.stack([torch.stack([row[at:at + N] for row in rows[:steps]]) for rows in self.rows.values()])
        asked, said = (pieces(tokenizer, ids) for ids in (batch["query"][0].tolist(), tokens))
        return Sight(*visible(image, model.image["pad"]), grid, question, asked, said or ["(nothing)"], llm,
                     [layer + 1 for layer in self.rows], self.maps, name)


def middle(n: int) -> range:
    """The blocks n/3 to 2n/3 of n, as counted from 1, whose attention the paper averages; counted from 0 here."""
    first = -(-n // 3)
    return range(first - 1, max(first, 2 * n // 3))


@contextmanager
def watch(model: VLM, layers=None):
    """Note what fuser and language model look at while ONE row (B = 1) is answered inside; yields a Seen.

    layers: which blocks of the language model, counted from 0 (default: `middle`). The queries are computed a second
    time, by the layer's own projections, whether they are packed, int8 or not; the keys are those of the cache.
    """
    layers = middle(len(model.llm.layers)) if layers is None else layers
    seen = Seen({layer: [] for layer in layers})

    def attended(attn, inputs, output):
        x, cos, sin, mask, _, cache, layer = inputs                                  # one row has no padding: no mask
        q, k, _ = attn.qkv(x, cos, sin)                                              # (1, H, T, hd), (1, n_kv, T, hd)
        if cache is not None:
            k = cache.keys[layer][:, :, :cache.length + x.shape[1]]                  # (1, n_kv, T_total, hd)
        q = q[0, :, -1].float().view(attn.n_kv, -1, attn.head_dim)                   # (n_kv, group, hd)
        scores = q @ k[0].float().transpose(1, 2) / math.sqrt(attn.head_dim)         # (n_kv, group, T_total)
        seen.rows[layer].append(scores.softmax(-1).mean((0, 1)).cpu())               # (T_total)

    def fused(fuser, inputs, output):
        maps = {name: m.float() for name, m in output[1].items()}
        if isinstance(fuser, CCRA):
            maps["layer_map"] = layer_map(fuser, inputs[0].float(), inputs[1].float(), maps)
            if maps["w_p"].ndim == 3:                                                # shuffled: a map in every layer
                maps["w_p"] = (maps["w_hat"][..., None] * maps["w_p"]).sum(1)
        seen.maps = {name: m[0].cpu() for name, m in maps.items()}

    replays, model.llm.replays = model.llm.replays, False                            # a recording calls no hooks
    hooks = [model.fuser.register_forward_hook(fused)]
    hooks += [model.llm.layers[layer].self_attn.register_forward_hook(attended) for layer in layers]
    try:
        yield seen
    finally:
        model.llm.replays = replays
        for hook in hooks:
            hook.remove()


def layer_map(fuser: CCRA, F_stack: Tensor, F_t: Tensor, maps: dict) -> Tensor:
    """LWCA mapped back to the patches, (B, L, N): eq. 7-8 without the mean that eq. 6 takes first, smoothed over depth.

    A layer's score is linear in its patches, so it is the mean of theirs; the softmax of these means is w_hat.
    """
    norm, F, parts = fuser.config.norm, F_stack, USED[fuser.config.order]            # (B, L, N, d)
    if "lwca" not in parts:
        return torch.zeros_like(maps["W_lp"])
    if "lpwca" in parts:
        F = fuser.lpwca.norm(F, 1 + maps["W_lp"], norm)
    if fuser.config.order == "shuffled":
        F = fuser.pwca.norm(F, 1 + maps["w_p"], norm)
    key = fuser.key("lwca", (maps["alpha"][:, None] @ F_t)[:, 0])                    # (B, d)
    scores = torch.stack([project(x, key) for x in F.unbind(1)], -1)                 # (B, N, L)
    if fuser.config.smooth:
        scores = smooth(scores.flatten(0, 1), fuser.config.kernel_size, fuser.config.sigma).view_as(scores)
    return scores.transpose(1, 2)


def ask(model: VLM, tokenizer: Tokenizer, image: Image.Image, question: str, layers=None, max_new_tokens=128,
        name="") -> Sight:
    """Ask greedily, and watch. layers as for `watch`; UserError for an empty question, or one that is too long."""
    row, device = prompt([(question, None)], tokenizer), next(model.parameters()).device
    batch = collate([dict(ids=row.ids, labels=row.labels, query=query_of(row.turns, model.query),
                          pixels=preprocess(image, **model.image))])
    batch = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    with watch(model, layers) as seen:
        answer = model.generate(**batch, max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids)
        tokens = [int(token[0]) for token in answer]
    return seen.sight(model, tokenizer, image, question, batch, tokens, name)


def pieces(tokenizer: Tokenizer, ids) -> list:
    """What each token adds to the text. Of the tokens of one character the last has it; the others are empty."""
    out = []

    def told():
        for id in ids:
            out.append("")
            yield id
    for text in tokenizer.stream(told()):
        out[-1] += text
    return out


def visible(image: Image.Image, pad: bool):
    """The part of a picture that the model saw, and where it lies in its square: clip.preprocess pads the picture, or
    cuts off the ends of its longer side."""
    (w, h), side, short = image.size, max(image.size), min(image.size)
    if pad:
        left, top = (side - w) // 2, (side - h) // 2
        return image, (left / side, top / side, (left + w) / side, (top + h) / side)
    left, top = (w - short) // 2, (h - short) // 2
    return image.crop((left, top, left + short, top + short)), (0.0, 0.0, 1.0, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
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
    for item in (item for item in toy.exam(seed, 12 * n + 100) if item.kind == "where"):
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
    for item in tqdm([item for item in toy.exam(seed, 8 * n) if item.kind in LOOKS + THOUGHT], desc="looking"):
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


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--pointing", action="store_true", help="score the maps of \"Where is the X?\" by X's box")
    what.add_argument("--depth", action="store_true", help="mean depth of LWCA's weights by kind of question")
    p.add_argument("--model", default=toy.MODEL, help="a model folder that knows the embedded world")
    p.add_argument("--n", type=int, default=500, help="how many questions (--depth: of each kind)")
    p.add_argument("--seed", type=int, default=0, help="which held-out questions")
    p.add_argument("--device", default="auto")
    args = p.parse_args(argv)
    if args.n < 2:
        raise UserError(f"--n {args.n}: an interval takes 2 questions or more")
    model = VLM.from_pretrained(args.model, dtype=torch.float32, device=pick_device(args.device)).eval()
    tokenizer = Tokenizer.from_pretrained(args.model)
    if args.pointing:
        return show_pointing(pointing(model, tokenizer, args.n, args.seed))
    show_depths(depths(model, tokenizer, args.n, args.seed), model.fuser.config.n_layers)


if __name__ == "__main__":
    run(main)
