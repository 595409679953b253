"""What the model looks at while it answers, and whether that is where it should look.

    python look.py --pointing      500 held-out "Where is the X?": do the maps lie on X?
    python look.py --depth         do questions about looks use shallower layers than questions that need counting?

CCRA's maps come with every answer (ccra.py). Attention inside the language model doesn't: it is fused, its weights are
never written out. `watch` computes those of the newest position again, beside the answer, from the same queries and
keys; nothing is changed, and what isn't watched costs nothing. viz.py draws what is found:

    sight = look.ask(model, tokenizer, image, "Where is the cat?")
    viz.figure3(sight).save("out.png")
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from ccra import CCRA, USED, VLM, project, smooth
from clip import preprocess
from core.common import UserError
from core.tokenizer import IMAGE_TOKEN, Tokenizer
from data import collate, prompt, query_of


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
