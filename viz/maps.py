"""What a model looks at while it answers.

CCRA's maps come with every answer (ccra.py). Attention inside the language model doesn't: it is
fused, its weights are never written out. `watch` keeps the queries of the newest position beside
the answer, and computes those weights again from the same queries and keys. Nothing is changed, and
what isn't watched costs nothing. figures.py draws what is found, explorer.py makes a page of it:

    sight = ask(model, tokenizer, image, "Where is the cat?")
    figures.figure3(sight).save("out.png")
"""
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor, nn

from ccra import CCRA, USED, VLM, project, smooth
from clip import preprocess
from core.common import UserError, split
from core.tokenizer import IMAGE_TOKEN, Tokenizer
from data import item, make_batch, prompt
from fast.graph import unrecorded

Box = tuple[float, float, float, float]          # left, top, right, bottom
Step = tuple[Tensor, int, Tensor]    # a token's query (H, hd), of how many of the keys, and those,
                                     # (1, n_kv, room, hd)
AT_ONCE = 64                         # steps: of 4,096 positions and 32 heads 34 MB


# --------------------------------------------------------------------------------------------------
# What is found

@dataclass
class Sight:
    """One question about one picture, and all that was looked at for the answer. Tensors are
    float32 on the CPU."""
    image: Image.Image     # what the model saw of the picture
    box: Box               # where that lies in the square that it saw, in 0..1
    grid: int              # N = grid * grid patches, row by row
    question: str
    words: list[str]       # the query's tokens as text, one for each alpha
    tokens: list[str]      # the answer's
    # (layers, A, N): each patch's share of the attention from which each of the answer's A tokens
    # was said, in each watched block; mean over heads. What remains of 1 went to words.
    llm: Tensor
    layers: list[int]      # which blocks of the language model these are, counted from 1
    # CCRA's, without the batch: alpha (T), W_lp (L, N), w_l, w_hat (L), w_p (N), and `layer_map`
    # (L, N). Empty for a fuser that has none.
    maps: dict[str, Tensor]
    name: str = ""         # the model's

    def looked(self, token: int | None = None) -> Tensor:
        """(N): where the language model looked to say one token, or on average over all
        (Figure 2)."""
        mean = self.llm.mean(0)                                          # (A, N)
        return mean.mean(0) if token is None else mean[token]


class Seen:
    """What `watch` notes of some blocks of the language model, and of the fuser.

    While the answer is made only queries are kept, a copy each: what they look at is computed once
    it is asked for, all tokens at once.
    """

    def __init__(self, layers: Sequence[int]):
        self.steps: dict[int, list[Step]] = {layer: [] for layer in layers}
        self.newest: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.maps: dict[str, Tensor] = {}

    def noting(self, attn: nn.Module) -> Callable:
        """An attention's qkv, but it notes queries and keys."""
        qkv = attn.qkv

        def noted(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = qkv(*given)
            self.newest[attn] = q, k
            return q, k, v

        return noted

    def attended(self, attn, inputs, output) -> None:
        """A hook of llama.Attention. One row has no padding, so the mask hides nothing."""
        *_, cache, layer = inputs
        q, keys = self.newest.pop(attn)                                  # (1, H or n_kv, T, hd)
        length = q.shape[2]
        if cache is not None:
            length, keys = cache.length + length, cache.keys[layer]      # (1, n_kv, room, hd)
        self.steps[layer].append((q[0, :, -1].clone(), length, keys))

    @property
    def rows(self) -> dict[int, list[Tensor]]:
        """{block: [(T) for each step]}: the attention of the position that says the next token to
        all T positions so far; mean over heads, sums to 1. On the CPU."""
        return {layer: attention_rows(steps) for layer, steps in self.steps.items()}

    def fused(self, fuser, inputs, output) -> None:
        """A hook of the fuser."""
        maps = {name: m.float() for name, m in output[1].items()}
        if isinstance(fuser, CCRA):
            F_stack, F_t = inputs[:2]
            maps["layer_map"] = layer_map(fuser, F_stack.float(), F_t.float(), maps)
            if maps["w_p"].ndim == 3:                                    # shuffled: in every layer
                maps["w_p"] = (maps["w_hat"][..., None] * maps["w_p"]).sum(1)
        self.maps = {name: m[0].cpu() for name, m in maps.items()}

    def sight(self, model: VLM, tokenizer: Tokenizer, image: Image.Image, question: str,
              batch: dict[str, Tensor], tokens: list[int], name: str = "") -> Sight:
        """batch: what model.generate was given; tokens: the ids that came out. UserError if a
        picture's rows aren't its patches."""
        grid, ids = model.vision.grid, batch["ids"][0].tolist()
        at, N, seen = ids.index(IMAGE_TOKEN), grid ** 2, self.rows
        first = next(iter(seen.values()))[0]
        if len(first) != len(ids) - 1 + N:
            raise UserError(f"{name or 'this model'}: its fuser doesn't give one row for each of "
                            f"{N} patches, so its attention can't be drawn on the picture")
        steps = max(1, len(tokens))     # an answer that ends at once: what made it end
        llm = [torch.stack([row[at:at + N] for row in rows[:steps]]) for rows in seen.values()]
        words = pieces(tokenizer, batch["query"][0].tolist())
        said = pieces(tokenizer, tokens) or ["(nothing)"]
        layers = [layer + 1 for layer in seen]
        shown, box = visible(image, model.image["pad"])
        return Sight(shown, box, grid, question, words, said, torch.stack(llm), layers, self.maps,
                     name)


def attention_rows(steps: list[Step]) -> list[Tensor]:
    """[(T)] of some steps: the shares of attention. Steps with the same keys, an answer's, are
    computed together; each sees what was there when it came."""
    rows = []
    for _, same in groupby(steps, key=lambda step: id(step[2])):
        for some in split(list(same), AT_ONCE):
            queries, lengths, keys = zip(*some)
            q = torch.stack(queries, 1).float()                          # (H, S, hd)
            shares = mean_shares(q, keys[0][0, :, :max(lengths)].float(), lengths)
            rows += [row[:length] for row, length in zip(shares.cpu(), lengths)]
    return rows


@torch.no_grad()
def mean_shares(q: Tensor, k: Tensor, lengths: Sequence[int]) -> Tensor:
    """Softmax of q k^T / sqrt(hd), mean over heads. q (H, S, hd), k (n_kv, T, hd), lengths: how
    many of the T keys each of the S queries sees -> (S, T)."""
    (H, S, hd), (n_kv, T, _) = q.shape, k.shape
    scores = q.reshape(n_kv, -1, hd) @ k.mT / math.sqrt(hd)              # (n_kv, group S, T)
    later = torch.arange(T) >= torch.tensor(lengths)[:, None]            # (S, T)
    scores = scores.view(H, S, T).masked_fill(later.to(k.device), -math.inf)
    return scores.softmax(-1).mean(0)


# --------------------------------------------------------------------------------------------------
# Looking

def middle(n: int) -> range:
    """The blocks n/3 to 2n/3 of n, as counted from 1, whose attention the paper averages; counted
    from 0 here."""
    first = -(-n // 3)
    return range(first - 1, max(first, 2 * n // 3))


@contextmanager
def watch(model: VLM, layers: Sequence[int] | None = None) -> Iterator[Seen]:
    """Note what fuser and language model look at while ONE row (B = 1) is answered inside.

    layers: which blocks of the language model, counted from 0 (default: `middle`). The queries are
    those that the layer itself computes, whether it is packed, int8 or not; the keys are those of
    the cache.
    """
    layers = middle(len(model.llm.layers)) if layers is None else layers
    seen, watched = Seen(layers), [model.llm.layers[layer].self_attn for layer in layers]
    hooks = [model.fuser.register_forward_hook(seen.fused)]
    for attn in watched:
        hooks.append(attn.register_forward_hook(seen.attended))
        attn.qkv = seen.noting(attn)
    try:
        with unrecorded(model.llm):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for attn in watched:
            del attn.qkv                             # and the method is there again


def ask(model: VLM, tokenizer: Tokenizer, image: Image.Image, question: str,
        layers: Sequence[int] | None = None, max_new_tokens: int = 128, name: str = "") -> Sight:
    """Ask greedily, and watch. layers as for `watch`; UserError for an empty question, or one that
    is too long."""
    row = prompt([(question, None)], tokenizer)
    device = next(model.parameters()).device
    batch = make_batch([item(row, preprocess(image, **model.image))], model.query, device=device)
    with watch(model, layers) as seen:
        answer = model.generate(**batch, max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids)
        tokens = [int(token[0]) for token in answer]
    return seen.sight(model, tokenizer, image, question, batch, tokens, name)


def layer_map(fuser: CCRA, F_stack: Tensor, F_t: Tensor, maps: dict[str, Tensor]) -> Tensor:
    """LWCA mapped back to the patches, (B, L, N): eq. 7-8 without the mean that eq. 6 takes first,
    smoothed over depth.

    F_stack (B, L, N, d), F_t (B, T, D), maps: what the fuser read and gave, float32. A layer's
    score is linear in its patches, so it is the mean of theirs; the softmax of these means is
    w_hat.
    """
    config, F = fuser.config, F_stack                                    # (B, L, N, d)
    parts = USED[config.order]
    if "lwca" not in parts:
        return torch.zeros_like(maps["W_lp"])
    if "lpwca" in parts:
        F = fuser.lpwca.norm(F, 1 + maps["W_lp"], config.norm)
    if config.order == "shuffled":
        F = fuser.pwca.norm(F, 1 + maps["w_p"], config.norm)
    key = fuser.key("lwca", (maps["alpha"][:, None] @ F_t)[:, 0])        # (B, d)
    scores = torch.stack([project(x, key) for x in F.unbind(1)], -1)     # (B, N, L)
    if config.smooth:
        rows = scores.flatten(0, 1)                                      # (B N, L)
        scores = smooth(rows, config.kernel_size, config.sigma).view_as(scores)
    return scores.transpose(1, 2)


# --------------------------------------------------------------------------------------------------
# Text and picture as the model had them

def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text. Of the tokens of one character the last has it; the others
    are empty."""
    out = []

    def told() -> Iterator[int]:
        for id in ids:
            out.append("")
            yield id

    for text in tokenizer.stream(told()):
        out[-1] += text
    return out


def visible(image: Image.Image, pad: bool) -> tuple[Image.Image, Box]:
    """The part of a picture that the model saw, and where it lies in its square: clip.preprocess
    pads the picture, or cuts off the ends of its longer side."""
    w, h = image.size
    side, short = max(w, h), min(w, h)
    if pad:
        left, top = (side - w) // 2, (side - h) // 2
        return image, (left / side, top / side, (left + w) / side, (top + h) / side)
    left, top = (w - short) // 2, (h - short) // 2
    return image.crop((left, top, left + short, top + short)), (0.0, 0.0, 1.0, 1.0)
