"""CCRA: which layers of the vision tower, and which places in the picture, does this question need?

A CLIP tower computes a feature for every patch in every layer; LLaVA hands the language model those
of one fixed layer. CCRA lets the words of the question weigh them first. Read it beside section 3
of the paper; F_v^l is layer l, (N, d):

    alpha        importance of every word of the question                                   (T)     eq. 2
    W_lp         LPWCA: of every patch in every layer         F_stack -> F_lp               (L, N)  eq. 3-5
    w_l, w_hat   LWCA:  of every layer, smoothed over depth   F_lp -> F_semantic            (L)     eq. 6-10
    w_p          PWCA:  of every place in the picture         F_semantic -> F_regional      (N)     eq. 11-13
    F_fused      [F_regional; F_v^L]: what the question sees beside what the tower saw      (N, 2d) eq. 14

`CCRA` is that; `VLM` is Algorithm 1 around it: vision tower -> CCRA -> projector -> language model
(eq. 15).

The same result for less work: the equations build T x L x N scores and a reworked copy of all
features. But scores are linear, alpha^T (Q K^T) = (alpha^T Q) K^T: the words melt into one query
first, W_K^T carries it over to the features (`CCRA.key`), and a map is one matrix-vector product.
And a token of F_lp is a F + b in every channel, with two numbers a, b of that token
(`standardise`), so F_lp never has to exist: eq. 6 and 9, which alone read it, become weighted sums
of F_stack. The tests compare all this with the equations written out, gradients included.
"""
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip import FIXED, CLIPVision, CLIPVisionConfig, attention
from core import common, weights
from core.common import UserError
from core.layouts import Folder, llava_hf_name
from core.tokenizer import IGNORE, IMAGE_TOKEN
from fast.linear import Linear
from fusers.dense_connector import DENSE, DenseConnector, DenseConnectorConfig
from fusers.igva import IGVA, IGVAConfig
from fusers.llava import LLaVA, LLaVAConfig
from fusers.mlvf import MLVF, MLVFConfig
from fusers.mmfuser import MMFuser, MMFuserConfig
from llama import Llama, LlamaConfig

EPS = 1e-5             # of the norms
LOSS_ROWS = 4096       # supervised positions whose logits exist at once

PARTS = ("lpwca", "lwca", "pwca")
ORDERS = ("progressive", "shuffled", "decoupled")
ALONE = ("lwca_only", "pwca_only")
USED = {
    "progressive": PARTS, "shuffled": PARTS, "decoupled": ("lwca", "pwca"), "lwca_only": ("lwca", ),
    "pwca_only": ("pwca", )}  # the parts of each arrangement
NORMS = ("joint", "stack", "token")
MODES = ("on", "neutral", "off")
QUERIES = ("all", "sofar", "first")


@dataclass
class CCRAConfig:
    """Sizes, and the readings of the paper that somebody may want changed. The defaults have its
    3.55M parameters."""
    text_dim: int = 4096        # D, of the language model's embeddings
    vision_dim: int = 1024      # d, of the vision tower
    n_layers: int = 24          # L, blocks of the vision tower
    d_hidden: int = 128         # h, width of queries and keys
    kernel_size: int = 5        # k, of the smoothing over layers
    sigma: float = 1.0          # of its Gaussian, in layers
    norm: str = "joint"         # what LN in eq. 5 and 13 means: see `standardise`
    anchor_layer: int = -1      # F_v^L: -1 is the last layer, as in the paper; -2 is LLaVA's habit
    lpwca: bool = True          # Table 4's ablations. False is neutral: W_lp = 0 ...
    lwca: bool = True           # ... w_hat uniform ...
    pwca: bool = True           # ... w_p = 0 ...
    smooth: bool = True         # ... scores over layers as they are
    # Figure 5: (c) progressive, (b) shuffled, (a) decoupled; or a half of (a) alone
    order: str = "progressive"

    def __post_init__(self):
        def require(name, good, what):
            if not good(getattr(self, name)):
                raise UserError(f"CCRA: {name} = {getattr(self, name)!r} should be {what}")
        for name in ("text_dim", "vision_dim", "n_layers", "d_hidden", "kernel_size"):
            require(name, lambda x: type(x) is int and x > 0, "a positive whole number")
        for name in PARTS + ("smooth",):
            require(name, lambda x: type(x) is bool, "true or false")
        require("sigma", lambda x: type(x) in (int, float) and 0 < x < math.inf,
                "a positive number")
        require("anchor_layer", lambda x: type(x) is int and -self.n_layers <= x < 0,
                f"-1 (last) to -{self.n_layers}")
        require("norm", lambda x: x in NORMS, "one of " + ", ".join(NORMS))
        require("order", lambda x: x in ORDERS + ALONE, "one of " + ", ".join(ORDERS + ALONE))


# --------------------------------------------------------------------------------------------------
# The pieces. They compute in the dtype of their input, whatever the parameters are kept in: CCRA
# gives them float32.

def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return nn.functional.linear(x, layer.weight.to(x.dtype))


class TokenScorer(nn.Module):
    """Eq. 2: how much each word of the question matters, alpha = softmax(out(attention(q, k, v))).

    One head, every word sees every other, and no positions: F_t has none either, it is the table of
    embeddings.
    """

    def __init__(self, text_dim: int, d_hidden: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(text_dim, d_hidden, bias=False) for _ in range(3))
        self.out = nn.Linear(d_hidden, 1, bias=False)

    def forward(self, F_t: Tensor, mask: Tensor) -> Tensor:
        """F_t (B, T, D), mask (B, T) -> alpha (B, T), sums to 1; 0 on padding, so a row of padding
        only sums to 0."""
        q, k, v = (linear(F_t, layer)[:, None]
                   for layer in (self.q, self.k, self.v))  # each (B, 1, T, h)
        context = attention(q, k, v, mask=mask[:, None, None, :])[:, 0]                # (B, T, h)
        scores = linear(context, self.out)[..., 0]                                     # (B, T)
        # The lowest finite number, not -inf: a row of nothing but -inf has NaN for a softmax, and
        # for a gradient.
        return scores.masked_fill(~mask,
                                  torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0)


class Norm(nn.Module):
    """LN(c x), where c is one number per token (eq. 5 and 13)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, c: Tensor, norm: str) -> Tensor:
        """x (B, N, d) with c (B, N), or x (B, L, N, d) with c (B, L, N) -> like x."""
        a, b = standardise(c, *moments(x), norm)                                       # like c
        return self.affine(a[..., None] * x + b[..., None])

    def affine(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x.dtype) + self.bias.to(x.dtype)


class CrossAttention(nn.Module):
    """What LPWCA, LWCA and PWCA each have for themselves: Q of the words, K of the features, and a
    norm."""

    def __init__(self, config: CCRAConfig):
        super().__init__()
        self.q = nn.Linear(config.text_dim, config.d_hidden, bias=False)
        self.k = nn.Linear(config.vision_dim, config.d_hidden, bias=False)
        self.norm = Norm(config.vision_dim)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the channels of every token, (..., d) -> (...) twice.

    The mean goes off before anything is squared: mean(x^2) - mean(x)^2 loses its digits when
    channels lie far from 0. vector_norm sums the squares as it goes; .square().mean() writes them
    out first and takes five times as long.
    """
    mean = x.mean(-1)
    return mean, torch.linalg.vector_norm(x - mean[..., None], dim=-1).square() / x.shape[-1]


def standardise(c: Tensor, mean: Tensor, var: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """(a, b), each like c, with LN(c x) = a x + b before the affine: from the tokens' `moments`,
    without touching x.

    c (B, N) or (B, L, N) is 1 + W, one factor per token. The question is which tokens share their
    mean and variance:

        token   none: what "LayerNorm" means in every codebase. But then LN(c x) = LN(x) for any c > 0. The attention
                that made c can't be felt, nor learned: LPWCA and PWCA do nothing at all
        joint   the N tokens of a layer, as the shape L x (N x d) in eq. 1 and 5 says. This is GroupNorm(1, d)
        stack   all L x N tokens; now W_lp may weigh layers against each other, too
    """
    axes = {"token": (), "joint": (-1,), "stack": tuple(range(1, c.ndim))}[norm]

    def over(x):
        return x.mean(axes, keepdim=True) if axes else x

    centre = over(c * mean)
    # The variance over several tokens is the mean of their own variances plus the variance of their
    # means.
    scale = (over(c.square() * var + (c * mean - centre).square()) + EPS).rsqrt()
    return c * scale, (-centre * scale).expand_as(c)


def smooth(w: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Gaussian smoothing of scores (B, L) over the layers; beyond the ends the outermost layer is
    repeated.

    w'[l] = sum_j g_j w[l + j - (k-1)//2]; g sums to 1, its centre is (k-1)/2, so an even k looks
    half a layer up.
    """
    j = torch.arange(kernel_size, device=w.device)
    g = torch.exp(-(j.to(w.dtype) - (kernel_size - 1) / 2).square() / (2 * sigma ** 2))  # (k)
    layers = torch.arange(w.shape[-1], device=w.device)[:,
                                                        None] + j - (kernel_size - 1) // 2  # (L, k)
    return w[:, layers.clamp(0, w.shape[-1] - 1)] @ (g / g.sum())                        # (B, L)


# Three ways to read all features once. Layer by layer: the tower's stack without CLS is a view with
# gaps, and a product with all of it would copy it first. Vectors from the left: CPUs multiply
# batches several times slower from the right.

def project(x: Tensor, key: Tensor) -> Tensor:
    """x (B, N, d), key (B, d) -> (B, N): every token's product with the key."""
    return (key[:, None] @ x.transpose(1, 2))[:, 0]


def pool(layers: list[Tensor], a: Tensor) -> Tensor:
    """L x (B, N, d), a (B, L, N) -> (B, L, d): each layer's mean over its tokens, weighted with a.
    """
    return torch.stack([(a[:, l, None] @ x)[:, 0] for l, x in enumerate(layers)], 1) / a.shape[-1]


def mix(layers: list[Tensor], a: Tensor) -> Tensor:
    """L x (B, N, d), a (B, L, N) -> (B, N, d): each place's sum over the layers, weighted with a.
    """
    total = a[:, 0, :, None] * layers[0]
    for l, x in enumerate(layers[1:], 1):
        total = torch.addcmul(total, a[:, l, :, None], x)
    return total


# --------------------------------------------------------------------------------------------------
# CCRA

class CCRA(nn.Module):
    """Consistent Cross-layer Regional Alignment, eq. 1-14.

    It rests on one fact: an attention whose `key` is zero is neutral. W = 0 leaves features as they
    are, w_l = 0 makes w_hat uniform. So an ablated part has key 0, and a row without any question
    has alpha = 0, hence three keys of 0.
    """
    name, asks = "ccra", True          # in a VLM's config.json; see baselines.py

    def __init__(self, config: CCRAConfig):
        super().__init__()
        self.config, self.width, self.n_blocks = config, 2 * config.vision_dim, config.n_layers
        self.scorer = TokenScorer(config.text_dim, config.d_hidden)
        self.lpwca, self.lwca, self.pwca = (CrossAttention(config) for _ in range(3))
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """requires_grad_(False) for what this configuration never uses: DDP would wait for its
        gradient."""
        used = USED[self.config.order]                        # Figure 5a has no LPWCA, for instance
        asked = [part for part in used if getattr(self.config, part)]
        for part in set(PARTS) - set(used):
            getattr(self, part).requires_grad_(False)
        for part in set(used) - set(asked):                   # no scores, but its norm stays
            getattr(self, part).q.requires_grad_(False)
            getattr(self, part).k.requires_grad_(False)
        if not asked:
            self.scorer.requires_grad_(False)

    def forward(self, F_stack: Tensor, F_t: Tensor, mask: Tensor,
                mode: str = "on") -> tuple[Tensor, dict[str, Tensor]]:
        """F_stack (B, L, N, d): blocks 1..L of the tower, no CLS; F_t (B, T, D): words; mask (B, T)
        bool: real ones.

        mode "on"; "neutral": as if nothing were asked; "off": the left half of F_fused is F_v^L,
        too (stage 1, which section 4.1 trains without CCRA). Returns F_fused (B, N, 2d) in
        F_stack's dtype, and maps, at least float32: alpha (B, T), W_lp (B, L, N), w_l (B, L) raw,
        w_hat (B, L) sums to 1, w_p (B, N), but (B, L, N) when shuffled. Maps of parts that `order`
        hasn't are neutral.
        """
        cfg = self.config
        if mode not in MODES:
            raise UserError(f"CCRA: mode = {mode!r} should be one of {', '.join(MODES)}")
        if F_stack.shape[1::2] != (cfg.n_layers, cfg.vision_dim) or F_t.shape[-1] != cfg.text_dim:
            raise UserError(
                f"CCRA: made for features (B, {cfg.n_layers}, N, {cfg.vision_dim}) and words "
                f"(B, T, {cfg.text_dim}), but given {tuple(F_stack.shape)} and {tuple(F_t.shape)}")
        # bfloat16 is too coarse for scores and statistics
        with torch.autocast(F_stack.device.type, enabled=False):
            wide = torch.promote_types(F_stack.dtype, torch.float32)
            layers = [x.to(wide) for x in F_stack.unbind(1)]  # L x (B, N, d), eq. 1
            F_t, anchor = F_t.to(wide), layers[cfg.anchor_layer]  # (B, T, D), (B, N, d)
            asked = mode == "on" and F_t.shape[1] > 0
            alpha = self.scorer(F_t, mask) if asked else F_t.new_zeros(
                F_t.shape[:2])  # (B, T), eq. 2
            text = (alpha[:, None] @ F_t)[:, 0]                                        # (B, D)
            left, maps = getattr(self, cfg.order)(layers, anchor, text)  # (B, N, d), eq. 3-13
            F_fused = torch.cat([anchor if mode == "off" else left, anchor],
                                dim=-1)  # (B, N, 2d), eq. 14
        B, L, N, _ = F_stack.shape
        neutral = {
            "W_lp": text.new_zeros(B, L, N), "w_l": text.new_zeros(B, L), "w_hat": text.new_full(
                (B, L), 1 / L), "w_p": text.new_zeros(B, N)}
        return F_fused.to(F_stack.dtype), {"alpha": alpha, **neutral, **maps}

    def key(self, part: str, text: Tensor) -> Tensor:
        """W_K^T Q(text) / sqrt(h), (B, d): its product with a feature is that feature's score (eq.
        3-4, 7-8, 11-12).

        text = alpha^T F_t, (B, D): the weighted mean of the words' queries is the query of their
        weighted mean.
        """
        if not getattr(self.config, part):
            return text.new_zeros(len(text), self.config.vision_dim)
        module = getattr(self, part)
        return linear(text, module.q) @ module.k.weight.to(text.dtype) / math.sqrt(
            self.config.d_hidden)

    def progressive(self, layers: list[Tensor], anchor: Tensor,
                    text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """PAI: layers and patches, then layers, then patches. Returns F_regional (B, N, d) and the
        maps."""
        # LPWCA. F_lp = affine(a F_stack + b) is never written out
        key = self.key("lpwca", text)                                                  # (B, d)
        W_lp = torch.stack([project(x, key) for x in layers], 1)  # (B, L, N), eq. 3-4
        mean, var = (torch.stack(m, 1) for m in zip(*map(moments, layers)))  # (B, L, N) both
        a, b = standardise(1 + W_lp, mean, var, self.config.norm)  # (B, L, N) both, eq. 5
        # LWCA. The affine comes after eq. 9's sum, as w_hat sums to 1
        F_layer = self.lpwca.norm.affine(pool(layers, a) +
                                         b.mean(-1, keepdim=True))  # (B, L, d), eq. 6
        w_l, w_hat = self.layer_weights(F_layer, text)  # (B, L) both, eq. 7-8
        share = w_hat[..., None]                                                       # (B, L, 1)
        F_hat = self.lpwca.norm.affine(mix(layers, share * a) +
                                       (share * b).sum(1)[..., None])  # (B, N, d), eq. 9
        F_semantic = self.semantic(F_hat)  # (B, N, d), eq. 10
        # PWCA
        w_p = project(F_semantic, self.key("pwca", text))  # (B, N), eq. 11-12
        F_regional = self.pwca.norm(F_semantic, 1 + w_p, self.config.norm)  # (B, N, d), eq. 13
        return F_regional, {"W_lp": W_lp, "w_l": w_l, "w_hat": w_hat, "w_p": w_p}

    def layer_weights(self, F_layer: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """F_layer (B, L, d) -> w_l (B, L), raw (eq. 7-8), and w_hat (B, L): smoothed, then a
        softmax.

        The paper smooths "the raw layer attention scores"; that a softmax follows is a reading of
        C.1 ("normalized").
        """
        w_l = project(F_layer, self.key("lwca", text))
        smoothed = smooth(w_l, self.config.kernel_size,
                          self.config.sigma) if self.config.smooth else w_l
        return w_l, smoothed.softmax(-1)

    def semantic(self, F_hat: Tensor) -> Tensor:
        """Eq. 10, (B, N, d) -> (B, N, d). Here LN is the usual one: there is no W that it could
        cancel."""
        norm, x = self.lwca.norm, F_hat + F_hat.mean(1, keepdim=True)
        return nn.functional.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype),
                                        norm.bias.to(x.dtype), EPS)

    # Figure 5's other two arrangements, for the integration study (Table 3): plainly written, not
    # for speed.

    def shuffled(self, layers: list[Tensor], anchor: Tensor,
                 text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Figure 5b: LPWCA, then PWCA in every layer, then LWCA over the results."""
        key, patch_key = self.key("lpwca", text), self.key("pwca", text)            # (B, d) both
        W_lp = torch.stack([project(x, key) for x in layers], 1)                    # (B, L, N)
        F_lp = self.lpwca.norm(torch.stack(layers, 1), 1 + W_lp, self.config.norm)  # (B, L, N, d)
        w_p = torch.stack([project(x, patch_key) for x in F_lp.unbind(1)], 1)       # (B, L, N)
        F_r = self.pwca.norm(F_lp, 1 + w_p, self.config.norm)                       # (B, L, N, d)
        w_l, w_hat = self.layer_weights(F_r.mean(2), text)                          # (B, L) both
        left = self.semantic((w_hat[..., None, None] * F_r).sum(1))                 # (B, N, d)
        return left, {"W_lp": W_lp, "w_l": w_l, "w_hat": w_hat, "w_p": w_p}

    def decoupled(self, layers: list[Tensor], anchor: Tensor,
                  text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Figure 5a: LWCA over the layers and PWCA on F_v^L side by side, averaged; no LPWCA."""
        (S, over_layers), (R, over_places) = (half(layers, anchor, text)
                                              for half in (self.lwca_only, self.pwca_only))
        return (S + R) / 2, {**over_layers, **over_places}

    # Its halves alone are the nearest to "LWCA" and "PWCA" before CCRA that equations can be given
    # for: attention to whole layers, or to places in the last one, each with a Q, a K and a scorer
    # of its own, into the same projector.

    def lwca_only(self, layers: list[Tensor], anchor: Tensor,
                  text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 6-10 on F_stack as the tower gives it."""
        w_l, w_hat = self.layer_weights(torch.stack([x.mean(1) for x in layers], 1),
                                        text)  # (B, L) both
        even = w_hat[..., None].expand(-1, -1, anchor.shape[1])                          # (B, L, N)
        return self.semantic(mix(layers, even)), {"w_l": w_l, "w_hat": w_hat}            # (B, N, d)

    def pwca_only(self, layers: list[Tensor], anchor: Tensor,
                  text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 11-13 on F_v^L."""
        w_p = project(anchor, self.key("pwca", text))                                    # (B, N)
        return self.pwca.norm(anchor, 1 + w_p, self.config.norm), {"w_p": w_p}           # (B, N, d)


# --------------------------------------------------------------------------------------------------
# The vision-language model

FUSERS = {
    fuser.name: (fuser, config)
    for fuser, config in ((CCRA, CCRAConfig), (LLaVA, LLaVAConfig), (DenseConnector,
                                                                     DenseConnectorConfig),
                          (MMFuser, MMFuserConfig), (IGVA, IGVAConfig), (MLVF, MLVFConfig))}

# What a user can ask for by one word: a configuration, and where it departs from its defaults
NAMED = {
    "ccra": (CCRAConfig, dict(order="progressive")), "llava": (LLaVAConfig, dict(copies=1)),
    "wide": (LLaVAConfig, dict(copies=2)),
    **{kind: (DenseConnectorConfig, dict(kind=kind)) for kind in DENSE}, "mmfuser":
        (MMFuserConfig, {}), "igva": (IGVAConfig, {}), "mlvf": (MLVFConfig, {}), "pwca":
            (CCRAConfig, dict(order="pwca_only")), "lwca": (CCRAConfig, dict(order="lwca_only"))}


class VLM(nn.Module):
    """Algorithm 1: vision tower -> fuser -> projector -> language model. Tensors only; prompts and
    text are elsewhere.

    fuser: CCRA, or one of baselines.py, with which this is plain LLaVA-1.5, for instance: what that
    file says a fuser is. `image`, `query`: how this model wants its inputs.
    """

    def __init__(self, vision: CLIPVision, llm: Llama, fuser: nn.Module, projector: nn.Module,
                 pad=True, query="all"):
        super().__init__()
        self.vision, self.fuser, self.projector, self.llm = vision, fuser, projector, llm
        self.image = {"size": vision.config.image_size, "pad": pad}
        self.query = query            # which of the user's turns are F_t

    @classmethod
    def build(cls, vision: CLIPVision, llm: Llama, config, pad=True, query="all") -> "VLM":
        """A new model from two towers; fuser and projector start at torch's defaults. UserError if
        sizes don't fit.

        config: of the fuser (one of FUSERS), and so its choice.
        """
        D, tower = llm.config.hidden_size, vision.config
        fuser = next(fuser for fuser, kind in FUSERS.values() if type(config) is kind)
        for name, size in dict(text_dim=D, vision_dim=tower.hidden_size,
                               n_layers=tower.num_hidden_layers).items():
            if getattr(config, name, size) != size:
                raise UserError(
                    f"{fuser.__name__}: {name} = {getattr(config, name)}, but these towers need {size}"
                )
        if query not in QUERIES or type(pad) is not bool:
            raise UserError(
                f"query = {query!r} should be one of {', '.join(QUERIES)}, and pad = {pad!r} true or false"
            )
        fuser = fuser(config)         # the projector is LLaVA's, but with CCRA it reads 2d channels
        return cls(vision, llm, fuser, nn.Sequential(Linear(fuser.width, D), nn.GELU(),
                                                     Linear(D, D)), pad, query)

    def look(self, pixels, query, query_mask, mode="on") -> tuple[Tensor, dict[str, Tensor]]:
        """Algorithm 1, steps 1 and 2, then the projector: the picture, seen by somebody who asks
        this question.

        pixels (B, 3, H, W); query (B, Q) long, query_mask (B, Q) bool: the user's words. Never the
        answer's: that would hand the labels to the visual features. mode: see CCRA.forward. Returns
        visual (B, N', D) and the fuser's maps.
        """
        if (((query < 0) | (query >= self.llm.config.vocab_size)) & query_mask).any():
            raise UserError(
                "the query holds an id outside of the vocabulary; it takes text only, without the "
                "picture's place")
        trained = any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            hidden = self.vision(pixels, self.fuser.n_blocks)                 # (L+1, B, 1+N, d)
        F_t = self.llm.embed(query.masked_fill(~query_mask, 0))               # (B, Q, D)
        features, maps = self.fuse(hidden, F_t, query_mask, mode)             # (B, N', width)
        return self.projector(features), maps

    def fuse(self, hidden, F_t, mask, mode="on") -> tuple[Tensor, dict[str, Tensor]]:
        """What the fuser makes of the tower's states (L+1, B, 1+N, d) and the words (B, T, D)."""
        if isinstance(self.fuser, CCRA):
            hidden = hidden[1:, :, 1:].transpose(0, 1)  # F_stack (B, L, N, d), no copy
        return self.fuser(hidden, F_t, mask, mode)

    @property
    def picture_rows(self) -> int:
        """N', the places that a picture takes in the language model's row."""
        N = self.vision.grid ** 2
        return self.fuser.rows(N) if hasattr(self.fuser, "rows") else N

    def merge(self, visual, ids, mask=None, labels=None, left=False, max_length=None):
        """The sequence that the language model reads: ids embedded, IMAGE_TOKEN replaced by the
        picture's N' rows.

        visual (B, N', D), or None: no pictures; ids, labels (B, T); mask (B, T) bool: real ids,
        padded on either side. left: pad on the left (to generate), not on the right (to train);
        max_length: cut there. Returns embeds (B, T', D), mask (B, T') and labels (B, T') or None,
        IGNORE on the picture and on padding. A row without IMAGE_TOKEN shows nothing of its visual
        features. They stay in the graph all the same, with gradient 0: in sharded training, a rank
        that leaves out the vision path would keep the others waiting.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        picture, T = (ids == IMAGE_TOKEN) & mask, ids.shape[1]                # (B, T)
        # How wide an id is in the merged row: padding 0, a picture N', a word 1. It reaches from
        # ends - width to ends.
        width = torch.where(picture, 0 if visual is None else visual.shape[1], mask.long())
        ends = width.cumsum(1)                                                # (B, T)
        length = ends[:, -1:]                                                 # (B, 1)
        longest = self._check_ids(ids, mask & ~picture, picture, visual, length)
        merged = longest if max_length is None else min(longest, max_length)  # T'
        slot = torch.arange(merged, device=ids.device).expand(len(ids), -1)   # (B, T')
        # counted from the row's first id; negative: padding
        slot = slot - (merged - length) if left else slot
        real = (slot >= 0) & (slot < length)
        # (B, T'), which id is here
        at = torch.searchsorted(ends, slot.clamp(min=0), right=True).clamp(max=T - 1)
        seen = picture.gather(1, at)  # (B, T'), is it the picture?
        # One table per row, the words and below them the picture; entry is the line of it that a
        # slot shows.
        table, entry = self.llm.embed(ids.masked_fill(picture | ~mask, 0)), at  # (B, T, D), (B, T')
        if visual is not None:
            table = torch.cat([table, visual.to(table.dtype)], dim=1)  # (B, T + N', D)
            entry = torch.where(seen, T + slot - (ends - width).gather(1, at), at)
        start = torch.arange(len(ids), device=ids.device)[:, None] * table.shape[1]    # (B, 1)
        line = (start + entry).masked_fill(~real, 0)
        embeds = table.flatten(0, 1).index_select(0, line.flatten()).view(*line.shape, -1)
        if labels is not None:
            labels = labels.gather(1, at).masked_fill(seen | ~real, IGNORE)
        return embeds.masked_fill(~real[..., None], 0), real, labels

    def _check_ids(self, ids, word, picture, visual, length) -> int:
        """UserError for ids that would crash a GPU without a message; else the longest row. One
        wait for the device."""
        foreign = ((ids < 0) | (ids >= self.llm.config.vocab_size)) & word
        foreign, pictures, longest = torch.stack([
            foreign.sum(), picture.sum(1).max(), length.max()]).tolist()
        if foreign:
            raise UserError(
                f"an id is outside of the vocabulary of {self.llm.config.vocab_size} (and not IMAGE_TOKEN)"
            )
        if pictures > 1:
            raise UserError("a row has more than one IMAGE_TOKEN; this model takes one picture")
        if pictures and visual is None:
            raise UserError("a row has an IMAGE_TOKEN, but there are no pixels")
        return longest

    def forward(self, pixels, ids, query, query_mask, mask=None, labels=None, mode="on",
                max_length=None) -> Tensor:
        """Logits (B, T', V) of the merged sequences, padded on the right; UserError if they exceed
        the context.

        With labels (B, T), not shifted: the SUM of cross-entropy over the supervised tokens,
        float32 (0 if there are none), sequences cut at max_length and at the context. A sum, since
        only the caller knows the whole batch.
        """
        visual = None if pixels is None else self.look(pixels, query, query_mask,
                                                       mode)[0]  # (B, N', D)
        context = self.llm.config.max_position_embeddings
        cut = None if labels is None else min(max_length or context, context)
        embeds, mask, labels = self.merge(visual, ids, mask, labels, max_length=cut)    # (B, T', D)
        if embeds.shape[1] > context:
            raise UserError(
                f"{embeds.shape[1]} positions with the picture, but the language model has {context}"
            )
        # Padding is on the right and everybody looks left, so no mask is needed; attention is
        # faster without one.
        hidden = self.llm.hidden(embeds=embeds)                                         # (B, T', D)
        if labels is None:
            return self.llm.lm_head(hidden)
        labels = labels[:, 1:]                                   # position t predicts label t + 1
        kept = labels != IGNORE                                  # S of them; few, and V is large
        states, target = hidden[:, :-1][kept], labels[kept]                           # (S, D), (S,)
        if len(target) <= LOSS_ROWS:
            return self.loss(states, target)
        # In pieces whose logits are computed again in the backward: 32,768 rows of 32,000 in
        # float32 are 4 GB
        pieces = zip(states.split(LOSS_ROWS), target.split(LOSS_ROWS))
        return sum(checkpoint(self.loss, *piece, use_reentrant=False) for piece in pieces)

    def loss(self, states: Tensor, target: Tensor) -> Tensor:
        """Sum of the cross-entropy, in float32, of final states (S, D) against the ids (S,) that
        come next."""
        logits = self.llm.lm_head(states)                                             # (S, V)
        return nn.functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), target, reduction="sum")

    @torch.no_grad()
    def generate(self, pixels, ids, query, query_mask, mask=None, max_new_tokens=128,
                 temperature=0.0, top_p=1.0, eos_ids=(), generator=None, mode="on"):
        """Yields the next ids, (B,) long, one position of the answers after the other: see
        Llama.generate.

        Arguments as in `forward`, and there; ids may be padded on either side. Picture and prompt
        are read once.
        """
        visual = None if pixels is None else self.look(pixels, query, query_mask,
                                                       mode)[0]  # (B, N', D)
        embeds, mask, _ = self.merge(visual, ids, mask, left=True)             # (B, T', D), (B, T')
        yield from self.llm.generate(embeds, mask, max_new_tokens, temperature, top_p, eos_ids,
                                     generator)

    def save_pretrained(self, dir: str | Path, tokenizer_file: str | Path | None = None,
                        max_shard_bytes=5e9, tensors=None) -> None:
        """Write config.json, the weights and a copy of tokenizer_file: a folder that sample.py and
        train.py take.

        tensors: {name: tensor} to write instead of the parameters, when those are sliced over
        processes.
        """
        if self.llm.packed:
            raise UserError(f"{dir}: a packed model can't be saved; load it again, and save that")
        config = {
            "model_type": "nanoccra", "vision": asdict(self.vision.config),
            "llm": self.llm.config.to_dict(),
            "fuser": {"name": self.fuser.name,
                      **asdict(self.fuser.config)}, "image": self.image, "query": self.query}
        tensors = tensors or dict(self.named_parameters())            # which lists a tied head once
        weights.save(dir, tensors, config, max_shard_bytes)
        copy_tokenizer(dir, tokenizer_file)

    def export_llava(self, dir: str | Path, tokenizer_file: str | Path | None = None,
                     max_shard_bytes=5e9) -> None:
        """Write a plain LLaVA model as a llava-hf folder: transformers'
        LlavaForConditionalGeneration, same logits.

        UserError for any other fuser: there is no place for it in that layout. transformers wants
        <image> and <pad> in the vocabulary, and the hub's models pad it to a multiple of 64. The
        new rows are the mean of the others (on the hub they scatter about it, closely): the logit
        of a mean row is the mean logit, so it is never the highest.
        """
        if not isinstance(self.fuser, LLaVA) or self.fuser.config.copies > 1:
            raise UserError(
                f"only plain LLaVA can be written as a llava-hf folder, not the fuser {self.fuser.name!r}"
            )
        V = self.llm.config.vocab_size
        extra = -(-(V + 2) // 64) * 64 - V
        tensors = {}
        for name, p in self.named_parameters():
            if name in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
                p = torch.cat([p, p.float().mean(0, keepdim=True).to(p.dtype).expand(extra, -1)
                               ])  # (V + extra, D)
            tensors[llava_hf_name(name)] = p
        config = {
            "architectures": ["LlavaForConditionalGeneration"
                              ], "model_type": "llava", "image_token_index": V,
            "pad_token_id": V + 1, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default", "image_seq_length": self.vision.grid**2,
            "tie_word_embeddings": self.llm.config.tie_word_embeddings,
            "torch_dtype": str(self.projector[0].weight.dtype).removeprefix("torch."),
            "text_config": {**self.llm.config.to_dict(), "vocab_size": V + extra
                            }, "vision_config": {
                                "model_type": "clip_vision_model", **asdict(self.vision.config),
                                **FIXED}}
        weights.save(dir, tensors, config, max_shard_bytes)
        copy_tokenizer(dir, tokenizer_file)

    @classmethod
    def from_pretrained(cls, dir: str | Path, dtype: torch.dtype | None = None, device=None,
                        vision: str | Path | None = None) -> "VLM":
        """Read what `save_pretrained` wrote, or plain LLaVA-1.5 in llava-hf's or liuhaotian's
        layout (formats.py).

        dtype None: as it is stored. vision: the folder of the CLIP tower, for liuhaotian's layout,
        which has none. UserError for whatever doesn't fit.
        """
        folder = Folder(dir)
        if folder.layout not in ("nanoccra", "llava", "llava_hf"):
            raise UserError(
                f"{folder.where}: model_type {folder.config.get('model_type')!r} is not a vision-language "
                "model (train.py --vision --llm makes one of its two halves)")
        if vision is not None and folder.layout != "llava":
            raise UserError(
                f"{folder.dir}: holds a vision tower of its own, so none is needed from {vision}")
        if vision is None and folder.layout == "llava":
            raise UserError(
                f"{folder.dir}: has no vision tower; download {folder.config.get('mm_vision_tower')} and "
                "give its folder, too: --vision DIR")
        tower = None if vision is None else Folder(vision)
        model = outline(folder, tower)
        eyes = model.vision.config
        if folder.parts.get("image", model.image) != model.image:
            raise UserError(
                f"{dir}: config.json says image {folder.part('image')}, its tower takes {model.image}"
            )
        width = folder.config.get("mm_hidden_size", eyes.hidden_size)
        if width != eyes.hidden_size:
            raise UserError(
                f"{vision}: a tower {eyes.hidden_size} wide, but {folder.where} says mm_hidden_size "
                f"{width}; it wants {folder.config.get('mm_vision_tower')}")
        # some fine-tunes hold the tower that they trained
        if tower is not None and not folder.holds("vision"):
            tower.fill(model.vision, "vision", dtype, device)
        return folder.fill(model, dtype=dtype, device=device)


def outline(folder: Folder, tower: Folder | None = None) -> VLM:
    """The model that a folder holds, without numbers (on meta). tower: the folder of its picture
    tower, if another."""
    with weights.skeleton():
        eyes = CLIPVision(CLIPVisionConfig.from_dict((tower or folder).part("vision")))
        llm = Llama(LlamaConfig.from_dict(folder.part("llm"), folder.where))
        if folder.layout == "nanoccra":
            return VLM.build(eyes, llm, read_fuser(folder),
                             folder.part("image").get("pad"), folder.config.get("query"))
        return VLM.build(eyes, llm,
                         LLaVAConfig(eyes.config.hidden_size, eyes.config.num_hidden_layers),
                         folder.pad)


def read_fuser(folder: Folder):
    """The fuser's configuration, which says what fuser it is, in one of our own folders."""
    fields = dict(folder.part("fuser"))
    if (name := fields.pop("name", None)) not in FUSERS:
        raise UserError(
            f"{folder.where}: has a fuser {name!r}, which is unknown (choose one of {', '.join(FUSERS)})"
        )
    config = FUSERS[name][1]
    if unknown := fields.keys() - config.__dataclass_fields__.keys():
        raise UserError(f"{folder.where}: gives the fuser {min(unknown)!r}, which is unknown")
    return config(**fields)


def copy_tokenizer(dir: str | Path, file: str | Path | None) -> None:
    target = Path(dir) / Path(file or "").name
    if file is not None and not (target.exists() and target.samefile(file)):
        common.write_beside(target, lambda tmp: shutil.copyfile(file, tmp))
