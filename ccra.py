"""CCRA: which layers of the vision tower, and which places in the picture, does this question need?

A CLIP tower computes a feature for every patch in every layer; LLaVA hands the language model those
of one fixed layer. CCRA lets the words of the question weigh them first. Read it beside section 3
of the paper; F_v^l is layer l, (N, d):

    alpha        importance of every word of the question                          (T)     eq. 2
    W_lp         LPWCA: of every patch in every layer    F_stack -> F_lp           (L, N)  eq. 3-5
    w_l, w_hat   LWCA: of every layer, smoothed          F_lp -> F_semantic        (L)     eq. 6-10
    w_p          PWCA: of every place in the picture     F_semantic -> F_regional  (N)     eq. 11-13
    F_fused      [F_regional; F_v^L]                                               (N, 2d) eq. 14

`VLM` is Algorithm 1 around it: vision tower -> CCRA -> projector -> language model (eq. 15).

The equations build T x L x N scores and a reworked copy of all features. The same result takes
far less work. Scores are linear, alpha^T (Q K^T) = (alpha^T Q) K^T, so the words become one query
first, and a map is one matrix-vector product (`CCRA.key`). And a token of F_lp is a F + b in every
channel, with two numbers a, b of that token (`standardise`), so F_lp never has to exist: eq. 6 and
9 become weighted sums of F_stack. The tests compare this with the equations written out in float64.
"""
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

import fusers
from clip import CLIPVision, CLIPVisionConfig, attention
from core import weights
from core.common import UserError, copy_into
from core.fields import Depth, Range, Width, check_config
from core.layouts import Folder, fill_vlm, open_vlm
from core.sequences import check_text, places, splice
from data import QUERIES
from fusers import kept
from fusers.common import fits
from fusers.llava import LLaVAConfig
from llama import IMAGE_TOKEN, Llama, LlamaConfig

EPS = 1e-5             # of the norms
PARTS = ("lpwca", "lwca", "pwca")
ORDERS = ("progressive", "shuffled", "decoupled")
ALONE = ("lwca_only", "pwca_only")
USED = {"progressive": PARTS, "shuffled": PARTS, "decoupled": ("lwca", "pwca"),
        "lwca_only": ("lwca",), "pwca_only": ("pwca",)}          # the parts of each arrangement
NORMS = ("joint", "stack", "token")
MODES = ("on", "neutral", "off")
Maps = dict[str, Tensor]
Layers = list[Tensor]                                       # L x (B, N, d)


@dataclass
class CCRAConfig:
    """Sizes, and the readings of the paper that somebody may want changed. The defaults have its
    3.55M parameters."""
    text_dim: Width = 4096             # D, of the language model's embeddings
    vision_dim: Width = 1024           # d, of the vision tower
    n_layers: Depth = 24               # L, blocks of the vision tower
    d_hidden: Width = 128              # h, width of queries and keys
    kernel_size: Depth = 5             # k, of the smoothing over layers
    sigma: Annotated[float, Range(0.05, 1e6)] = 1.0        # of its Gaussian, in layers
    norm: Annotated[str, NORMS] = "joint"                  # LN in eq. 5 and 13: see `standardise`
    anchor_layer: Annotated[int, Range(-1000, -1)] = -1    # F_v^L: -1, the last; LLaVA's is -2
    lpwca: bool = True                 # Table 4's ablations. False is neutral: W_lp = 0 ...
    lwca: bool = True                  # ... w_hat uniform ...
    pwca: bool = True                  # ... w_p = 0 ...
    smooth: bool = True                # ... scores over layers as they are
    order: Annotated[str, ORDERS + ALONE] = "progressive"  # Figure 5: (c), (b), (a), or half of (a)

    def __post_init__(self):
        check_config(self)
        if self.anchor_layer < -self.n_layers:
            raise UserError(f"CCRA: anchor_layer = {self.anchor_layer} should be -1 (last) to "
                            f"{-self.n_layers}")


# --------------------------------------------------------------------------------------------------
# The pieces. They compute in the dtype of their input; CCRA gives them float32.

def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return nn.functional.linear(x, layer.weight.to(x.dtype))


class TokenScorer(nn.Module):
    """Eq. 2: how much each word of the question matters, alpha = softmax(out(attention(q, k, v))).

    One head, every word sees every other, no positions: F_t is rows of the embedding table.
    """

    def __init__(self, text_dim: int, d_hidden: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(text_dim, d_hidden, bias=False) for _ in range(3))
        self.out = nn.Linear(d_hidden, 1, bias=False)

    def forward(self, F_t: Tensor, mask: Tensor) -> Tensor:
        """F_t (B, T, D), mask (B, T) -> alpha (B, T); sums to 1, or to 0 without a real word."""
        q, k, v = (linear(F_t, layer)[:, None]
                   for layer in (self.q, self.k, self.v))  # (B, 1, T, h)
        context = attention(q, k, v, mask=mask[:, None, None, :])[:, 0]                # (B, T, h)
        scores = linear(context, self.out)[..., 0]                                     # (B, T)
        # The lowest finite number, not -inf: the softmax of nothing but -inf is NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).masked_fill(~mask, 0)


class Norm(nn.Module):
    """LN(c x), where c is one number per token (eq. 5 and 13)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, c: Tensor, norm: str) -> Tensor:
        """x (B, N, d) with c (B, N), or x (B, L, N, d) with c (B, L, N) -> like x."""
        a, b = standardise(c, *moments(x), norm)                                       # like c
        return self.affine(a[..., None] * x + b[..., None])

    def affine(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x.dtype) + self.bias.to(x.dtype)


class CrossAttention(nn.Module):
    """What LPWCA, LWCA and PWCA each have: Q of the words, K of the features, and a norm."""

    def __init__(self, config: CCRAConfig):
        super().__init__()
        self.q = nn.Linear(config.text_dim, config.d_hidden, bias=False)
        self.k = nn.Linear(config.vision_dim, config.d_hidden, bias=False)
        self.norm = Norm(config.vision_dim)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the channels of every token, (..., d) -> (...) twice.

    The mean is subtracted before anything is squared: mean(x^2) - mean(x)^2 loses digits where
    channels lie far from 0. vector_norm is five times as fast as .square().mean()."""
    mean = x.mean(-1)
    return mean, torch.linalg.vector_norm(x - mean[..., None], dim=-1).square() / x.shape[-1]


def standardise(c: Tensor, mean: Tensor, var: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """(a, b), each like c, with LN(c x) = a x + b before the affine, from the tokens' `moments`.

    c (B, N) or (B, L, N) is 1 + W, one factor per token. Which tokens share mean and variance?

        token   none: what "LayerNorm" means in every codebase. But then LN(c x) = LN(x) for any
                c > 0: LPWCA and PWCA have no effect and no gradient
        joint   the N tokens of a layer: the shape L x (N x d) of eq. 1 and 5; GroupNorm(1, d)
        stack   all L x N tokens; W_lp may weigh layers against each other, too
    """
    axes = {"token": (), "joint": (-1,), "stack": tuple(range(1, c.ndim))}[norm]

    def over(x):
        return x.mean(axes, keepdim=True) if axes else x

    centre = over(c * mean)
    # The variance over several tokens is the mean of their variances plus that of their means.
    scale = (over(c.square() * var + (c * mean - centre).square()) + EPS).rsqrt()
    return c * scale, (-centre * scale).expand_as(c)


def smooth(w: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Gaussian smoothing of scores (B, L) over the layers; the outermost layers are repeated:
    w'[l] = sum_j g_j w[l + j - (k-1)//2]. g sums to 1. An even k looks half a layer up."""
    L = w.shape[-1]
    j = torch.arange(kernel_size, device=w.device)
    g = torch.exp(-(j.to(w.dtype) - (kernel_size - 1) / 2).square() / (2 * sigma ** 2))    # (k)
    layers = torch.arange(L, device=w.device)[:, None] + j - (kernel_size - 1) // 2        # (L, k)
    return w[:, layers.clamp(0, L - 1)] @ (g / g.sum())                                    # (B, L)


# Three ways to read all features once. Layer by layer, since a product with the whole stack, a view
# with gaps, would copy it first. Vectors from the left: from the right CPUs are several times
# slower.

def project(x: Tensor, key: Tensor) -> Tensor:
    """x (B, N, d), key (B, d) -> (B, N): every token's product with the key."""
    return (key[:, None] @ x.transpose(1, 2))[:, 0]


def pool(layers: list[Tensor], a: Tensor) -> Tensor:
    """L x (B, N, d), a (B, L, N) -> (B, L, d): each layer's mean over tokens, weighted with a."""
    return torch.stack([(a[:, l, None] @ x)[:, 0] for l, x in enumerate(layers)], 1) / a.shape[-1]


def mix(layers: list[Tensor], a: Tensor) -> Tensor:
    """L x (B, N, d), a (B, L, N) -> (B, N, d): each place's sum over layers, weighted with a."""
    total = a[:, 0, :, None] * layers[0]
    for l, x in enumerate(layers[1:], 1):
        total = torch.addcmul(total, a[:, l, :, None], x)
    return total


# --------------------------------------------------------------------------------------------------
# CCRA

class CCRA(nn.Module):
    """Consistent Cross-layer Regional Alignment, eq. 1-14.

    An attention whose `key` is zero is neutral: W = 0 leaves features as they are, w_l = 0 makes
    w_hat uniform. So an ablated part has key 0, and a row without words has alpha = 0, hence key 0.
    """
    name, asks = "ccra", True          # what VLM and train.py want to know: see fusers/__init__.py

    def __init__(self, config: CCRAConfig):
        super().__init__()
        self.config = config
        self.width, self.n_blocks = 2 * config.vision_dim, config.n_layers
        self.scorer = TokenScorer(config.text_dim, config.d_hidden)
        self.lpwca, self.lwca, self.pwca = (CrossAttention(config) for _ in range(3))
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """requires_grad_(False) for what this configuration never uses: DDP waits for gradients."""
        used = USED[self.config.order]                       # Figure 5a has no LPWCA, for instance
        asked = [part for part in used if getattr(self.config, part)]
        for part in set(PARTS) - set(used):
            getattr(self, part).requires_grad_(False)
        for part in set(used) - set(asked):                  # no scores, but its norm stays
            getattr(self, part).q.requires_grad_(False)
            getattr(self, part).k.requires_grad_(False)
        if not asked:
            self.scorer.requires_grad_(False)

    def forward(self, F_stack: Tensor, F_t: Tensor, mask: Tensor,
                mode: str = "on") -> tuple[Tensor, Maps]:
        """F_stack (B, L, N, d): blocks 1..L, no CLS; F_t (B, T, D), mask (B, T) bool: the words ->
        F_fused (B, N, 2d) in F_stack's dtype, and maps, at least float32: alpha (B, T), W_lp
        (B, L, N), w_l (B, L) raw, w_hat (B, L) sums to 1, w_p (B, N), but (B, L, N) when shuffled.

        mode "on"; "neutral": as if nothing were asked; "off": the left half of F_fused is F_v^L
        (stage 1, which section 4.1 trains without CCRA). UserError for another mode or other sizes.
        """
        self._check(F_stack, F_t, mode)
        B, L, N, _ = F_stack.shape
        # In bfloat16 the scores and the statistics would be too coarse.
        with torch.autocast(F_stack.device.type, enabled=False):
            wide = torch.promote_types(F_stack.dtype, torch.float32)
            layers = [x.to(wide) for x in F_stack.unbind(1)]                  # L x (B, N, d), eq. 1
            F_t, anchor = F_t.to(wide), layers[self.config.anchor_layer]      # (B, T, D), (B, N, d)
            alpha = F_t.new_zeros(F_t.shape[:2])                              # (B, T)
            if mode == "on" and F_t.shape[1] > 0:
                alpha = self.scorer(F_t, mask)                                # (B, T), eq. 2
            text = (alpha[:, None] @ F_t)[:, 0]                               # (B, D)
            arrangement = getattr(self, self.config.order)
            left, maps = arrangement(layers, anchor, text)                    # (B, N, d), eq. 3-13
            left = anchor if mode == "off" else left
            F_fused = torch.cat([left, anchor], dim=-1)                       # (B, N, 2d), eq. 14
        neutral = {"W_lp": text.new_zeros(B, L, N), "w_l": text.new_zeros(B, L),
                   "w_hat": text.new_full((B, L), 1 / L), "w_p": text.new_zeros(B, N)}
        return F_fused.to(F_stack.dtype), {"alpha": alpha, **neutral, **maps}

    def _check(self, F_stack: Tensor, F_t: Tensor, mode: str) -> None:
        L, d, D = self.config.n_layers, self.config.vision_dim, self.config.text_dim
        if mode not in MODES:
            raise UserError(f"CCRA: mode = {mode!r} should be one of {', '.join(MODES)}")
        if F_stack.shape[1::2] != (L, d) or F_t.shape[-1] != D:
            raise UserError(f"CCRA: made for features (B, {L}, N, {d}) and words (B, T, {D}), but "
                            f"given {tuple(F_stack.shape)} and {tuple(F_t.shape)}")

    def key(self, part: str, text: Tensor) -> Tensor:
        """W_K^T Q(text) / sqrt(h), (B, d): its product with a feature is that feature's score (eq.
        3-4, 7-8, 11-12). text = alpha^T F_t, (B, D): Q is linear, so the mean of the queries is the
        query of the mean."""
        if not getattr(self.config, part):
            return text.new_zeros(len(text), self.config.vision_dim)
        module = getattr(self, part)
        query = linear(text, module.q)                                                 # (B, h)
        return query @ module.k.weight.to(text.dtype) / math.sqrt(self.config.d_hidden)

    # Each arrangement: the anchor F_v^L (B, N, d), text (B, D) -> the left half of F_fused, maps.

    def progressive(self, layers: Layers, anchor: Tensor, text: Tensor) -> tuple[Tensor, Maps]:
        """PAI, Figure 5c: layers and patches, then layers, then patches."""
        norm, affine = self.config.norm, self.lpwca.norm.affine
        # LPWCA, eq. 3-5. F_lp = affine(a F_stack + b) is never written out
        key = self.key("lpwca", text)                                            # (B, d)
        W_lp = torch.stack([project(x, key) for x in layers], 1)                 # (B, L, N), eq. 4
        mean, var = (torch.stack(m, 1) for m in zip(*map(moments, layers)))      # (B, L, N) both
        a, b = standardise(1 + W_lp, mean, var, norm)                            # (B, L, N) both
        # LWCA, eq. 6-10. The affine comes after eq. 9's sum, as w_hat sums to 1
        F_layer = affine(pool(layers, a) + b.mean(-1, keepdim=True))             # (B, L, d), eq. 6
        w_l, w_hat = self.layer_weights(F_layer, text)                           # (B, L), eq. 7-8
        share = w_hat[..., None]                                                 # (B, L, 1)
        F_hat = affine(mix(layers, share * a) + (share * b).sum(1)[..., None])   # (B, N, d), eq. 9
        F_semantic = self.semantic(F_hat)                                        # (B, N, d), eq. 10
        # PWCA, eq. 11-13
        w_p = project(F_semantic, self.key("pwca", text))                        # (B, N), eq. 12
        F_regional = self.pwca.norm(F_semantic, 1 + w_p, norm)                   # (B, N, d), eq. 13
        return F_regional, {"W_lp": W_lp, "w_l": w_l, "w_hat": w_hat, "w_p": w_p}

    def layer_weights(self, F_layer: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """F_layer (B, L, d) -> w_l (B, L), raw (eq. 7-8); w_hat (B, L), smoothed, then a softmax.
        The paper smooths "the raw layer attention scores"; the softmax is C.1's "normalized"."""
        cfg = self.config
        w_l = project(F_layer, self.key("lwca", text))                                # (B, L)
        smoothed = smooth(w_l, cfg.kernel_size, cfg.sigma) if cfg.smooth else w_l
        return w_l, smoothed.softmax(-1)

    def semantic(self, F_hat: Tensor) -> Tensor:
        """Eq. 10, (B, N, d) -> (B, N, d). Here LN is the usual one: no W could be cancelled."""
        norm, x = self.lwca.norm, F_hat + F_hat.mean(1, keepdim=True)
        weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return layer_norm(x, x.shape[-1:], weight, bias, EPS)

    # Figure 5's other two, for the integration study (Table 3): plainly written, not for speed.

    def shuffled(self, layers: Layers, anchor: Tensor, text: Tensor) -> tuple[Tensor, Maps]:
        """Figure 5b: LPWCA, then PWCA in every layer, then LWCA over the results."""
        key, patch_key = self.key("lpwca", text), self.key("pwca", text)              # (B, d) both
        W_lp = torch.stack([project(x, key) for x in layers], 1)                      # (B, L, N)
        F_lp = self.lpwca.norm(torch.stack(layers, 1), 1 + W_lp, self.config.norm)    # (B, L, N, d)
        w_p = torch.stack([project(x, patch_key) for x in F_lp.unbind(1)], 1)         # (B, L, N)
        F_r = self.pwca.norm(F_lp, 1 + w_p, self.config.norm)                         # (B, L, N, d)
        w_l, w_hat = self.layer_weights(F_r.mean(2), text)                            # (B, L) both
        left = self.semantic((w_hat[..., None, None] * F_r).sum(1))                   # (B, N, d)
        return left, {"W_lp": W_lp, "w_l": w_l, "w_hat": w_hat, "w_p": w_p}

    def decoupled(self, layers: Layers, anchor: Tensor, text: Tensor) -> tuple[Tensor, Maps]:
        """Figure 5a: LWCA over the layers and PWCA on F_v^L side by side, averaged; no LPWCA."""
        S, over_layers = self.lwca_only(layers, anchor, text)
        R, over_places = self.pwca_only(layers, anchor, text)
        return (S + R) / 2, {**over_layers, **over_places}

    # Its halves alone: the nearest to "LWCA" and "PWCA" before CCRA that equations exist for.

    def lwca_only(self, layers: Layers, anchor: Tensor, text: Tensor) -> tuple[Tensor, Maps]:
        """Eq. 6-10 on F_stack as the tower gives it."""
        F_layer = torch.stack([x.mean(1) for x in layers], 1)                         # (B, L, d)
        w_l, w_hat = self.layer_weights(F_layer, text)                                # (B, L) both
        even = w_hat[..., None].expand(-1, -1, anchor.shape[1])                       # (B, L, N)
        return self.semantic(mix(layers, even)), {"w_l": w_l, "w_hat": w_hat}         # (B, N, d)

    def pwca_only(self, layers: Layers, anchor: Tensor, text: Tensor) -> tuple[Tensor, Maps]:
        """Eq. 11-13 on F_v^L."""
        w_p = project(anchor, self.key("pwca", text))                                 # (B, N)
        return self.pwca.norm(anchor, 1 + w_p, self.config.norm), {"w_p": w_p}        # (B, N, d)


# --------------------------------------------------------------------------------------------------
# The vision-language model

FUSERS = {"ccra": (CCRA, CCRAConfig), **fusers.FUSERS}
NAMED = {"ccra": (CCRAConfig, {"order": "progressive"}), **fusers.NAMED,
         "pwca": (CCRAConfig, {"order": "pwca_only"}), "lwca": (CCRAConfig, {"order": "lwca_only"})}


class VLM(nn.Module):
    """Algorithm 1: vision tower -> fuser -> projector -> language model, on tensors alone.

    fuser: CCRA, or one of fusers/, as plain LLaVA-1.5's. image: size and padding of its pictures,
    for clip.preprocess. query: which of the user's turns are F_t."""

    def __init__(self, vision: CLIPVision, llm: Llama, fuser: nn.Module, projector: nn.Module,
                 pad: bool = True, query: str = "all"):
        super().__init__()
        self.vision, self.fuser, self.projector, self.llm = vision, fuser, projector, llm
        self.image = {"size": vision.config.image_size, "pad": pad}
        self.query = query

    @classmethod
    def build(cls, vision: CLIPVision, llm: Llama, config, pad=True, query="all") -> "VLM":
        """A new model from two towers and a fuser's config, one of FUSERS. Fuser and projector
        start at torch's defaults. UserError if sizes don't fit."""
        D, tower = llm.config.hidden_size, vision.config
        kind = next(kind for kind, of_config in FUSERS.values() if type(config) is of_config)
        fits(config, text_dim=D, vision_dim=tower.hidden_size, n_layers=tower.num_hidden_layers)
        if query not in QUERIES or type(pad) is not bool:
            raise UserError(f"query = {query!r} should be one of {', '.join(QUERIES)}, and "
                            f"pad = {pad!r} true or false")
        fuser = kind(config)
        # LLaVA's projector, but with CCRA it reads 2d channels.
        projector = nn.Sequential(nn.Linear(fuser.width, D), nn.GELU(), nn.Linear(D, D))
        return cls(vision, llm, fuser, projector, pad, query)

    def with_fuser(self, config) -> "VLM":
        """CCRA, or another, in plain LLaVA's place between the same towers. It answers as before:
        projector [0 | W1], anchor LLaVA's layer (fusers/kept.py). UserError if it can't."""
        config = kept.of_llava(self.fuser, config)
        new = VLM.build(self.vision, self.llm, config, self.image["pad"], self.query)
        return kept.carry_over(self, new)

    def see(self, pixels: Tensor, query: Tensor, query_mask: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) -> hidden (L+1, B, 1+N, d) of the layers that the fuser reads; query
        (B, Q), query_mask (B, Q) bool: the user's words, never the answer's -> F_t (B, Q, D)."""
        trained = any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            hidden = self.vision(pixels, self.fuser.n_blocks)                    # (L+1, B, 1+N, d)
        return hidden, self.llm.embed(query.masked_fill(~query_mask, 0))         # (B, Q, D)

    def fuse(self, hidden: Tensor, F_t: Tensor, mask: Tensor, mode="on") -> tuple[Tensor, Maps]:
        """What the fuser makes of `see`'s tensors: features (B, N', width), and maps."""
        if isinstance(self.fuser, CCRA):
            hidden = hidden[1:, :, 1:].transpose(0, 1)             # F_stack (B, L, N, d), no copy
        return self.fuser(hidden, F_t, mask, mode)

    def look(self, pixels: Tensor, query: Tensor, query_mask: Tensor,
             mode: str = "on") -> tuple[Tensor, Maps]:
        """Algorithm 1 up to the projector: the picture as visual (B, N', D), for this question, and
        the fuser's maps. Arguments as in `see`; mode: see CCRA.forward."""
        hidden, F_t = self.see(pixels, query, query_mask)
        features, maps = self.fuse(hidden, F_t, query_mask, mode)                # (B, N', width)
        return self.projector(features), maps

    @property
    def picture_rows(self) -> int:
        """N', the places that a picture takes in the language model's row."""
        N = self.vision.grid ** 2
        return self.fuser.rows(N) if hasattr(self.fuser, "rows") else N

    def merge(self, visual: Tensor | None, ids: Tensor, mask: Tensor | None = None,
              labels: Tensor | None = None, left: bool = False,
              max_length: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the language model reads: ids embedded, IMAGE_TOKEN replaced by the picture's rows.

        visual (B, N', D), or None: no pictures; ids, labels (B, T); mask (B, T) bool: real ids,
        padded on either side. left: pad on the left (to generate), not on the right (to train).
        Cut at max_length. Returns embeds (B, T', D), mask (B, T') and labels (B, T') or None.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        spans = places(ids, mask, self.llm.config.vocab_size)
        text = self.llm.embed(ids.masked_fill(~mask | (ids == IMAGE_TOKEN), 0))  # (B, T, D)
        return splice(text, visual, spans, labels, "left" if left else "right", max_length)

    def forward(self, pixels: Tensor | None, ids: Tensor, query: Tensor, query_mask: Tensor,
                mask: Tensor | None = None, labels: Tensor | None = None, mode: str = "on",
                max_length: int | None = None) -> Tensor:
        """Logits (B, T', V) of the merged sequences; UserError if they exceed the context. With
        labels (B, T), not shifted: Llama.loss, a SUM over the supervised tokens, since only the
        caller knows the whole batch, of sequences that are cut at max_length and at the context."""
        context = self.llm.config.max_position_embeddings
        visual = self.read(pixels, query, query_mask, mode)                      # (B, N', D)
        cut = None if labels is None else min(max_length or context, context)
        embeds, _, labels = self.merge(visual, ids, mask, labels, max_length=cut)
        if embeds.shape[1] > context:
            raise UserError(f"{embeds.shape[1]} positions with the picture, but the language model "
                            f"has {context}")
        # Padding is on the right and every position looks left, so attention needs no mask.
        hidden = self.llm.hidden(embeds=embeds)                                  # (B, T', D)
        return self.llm.lm_head(hidden) if labels is None else self.llm.loss(hidden, labels)

    def read(self, pixels: Tensor | None, query: Tensor, query_mask: Tensor,
             mode: str) -> Tensor | None:
        """`look`, of a query that is checked; None without pixels."""
        if pixels is None:
            return None
        check_text(query, query_mask, self.llm.config.vocab_size)
        return self.look(pixels, query, query_mask, mode)[0]                     # (B, N', D)

    @torch.no_grad()
    def generate(self, pixels: Tensor | None, ids: Tensor, query: Tensor, query_mask: Tensor,
                 mask: Tensor | None = None, mode: str = "on", **sampling) -> Iterator[Tensor]:
        """Yields the next ids, (B,) long, one position of the answers after the other.

        Arguments as in `forward` (ids may be padded on either side); sampling: Llama.generate's
        max_new_tokens, temperature, top_p, eos_ids, generator. Picture and prompt are read once.
        """
        visual = self.read(pixels, query, query_mask, mode)                      # (B, N', D)
        embeds, mask, _ = self.merge(visual, ids, mask, left=True)               # (B, T', D)
        yield from self.llm.generate(embeds, mask, **sampling)

    def save_pretrained(self, dir: str | Path, tokenizer_file: str | Path | None = None,
                        max_shard_bytes: float = 5e9, tensors: Maps | None = None) -> None:
        """Write config.json, the weights and a copy of tokenizer_file: a folder for sample.py and
        train.py. tensors: what to write in place of parameters that are sliced over processes."""
        tensors = tensors or weights.to_save(self, dir)
        config = {"model_type": "nanoccra", "vision": asdict(self.vision.config),
                  "llm": self.llm.config.to_dict(),
                  "fuser": {"name": self.fuser.name, **asdict(self.fuser.config)},
                  "image": self.image, "query": self.query}
        weights.save(dir, tensors, config, max_shard_bytes)
        copy_into(dir, tokenizer_file)

    @classmethod
    def from_pretrained(cls, dir: str | Path, dtype: torch.dtype | None = None, device=None,
                        vision: str | Path | None = None) -> "VLM":
        """Read what `save_pretrained` wrote, or LLaVA-1.5 in llava-hf's or liuhaotian's layout.
        dtype None: as stored. vision: the CLIP tower's folder, which liuhaotian's layout lacks.
        UserError for whatever doesn't fit (core/layouts.py)."""
        folder, tower = open_vlm(dir, vision)
        return fill_vlm(outline(folder, tower), folder, tower, dtype, device)


def outline(folder: Folder, tower: Folder | None = None) -> VLM:
    """The model that a folder holds, on meta. tower: its picture tower's folder, if another."""
    eyes = tower or folder
    with weights.skeleton():
        vision = CLIPVision(CLIPVisionConfig.from_dict(eyes.part("vision"), eyes.where))
        llm = Llama(LlamaConfig.from_dict(folder.part("llm"), folder.where))
        if folder.layout == "nanoccra":
            config = fusers.read_config(folder.part("fuser"), FUSERS, folder.where)
            pad, query = folder.part("image").get("pad"), folder.config.get("query")
            return VLM.build(vision, llm, config, pad, query)
        config = LLaVAConfig(vision.config.hidden_size, vision.config.num_hidden_layers)
        return VLM.build(vision, llm, config, folder.pad)
