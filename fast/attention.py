"""Attention on a CPU, where the fused kernel isn't always the fastest way.

A CPU that multiplies bfloat16 in hardware is so fast at it that attention written out takes half of
the time in training, and a third for a long prompt, of the fused kernel, which hardly profits.
Elsewhere the fused kernel wins (50 ms against 74), as on any GPU. A CPU that doesn't multiply a
dtype in hardware goes by way of float32. (A new token, one query for all that came before, is
cache.py's affair.)
"""
import torch
from torch import Tensor

import clip
from clip import lower_triangle
from fast import linear

WRITE_OUT = {torch.bfloat16} - linear.SLOW
QUERIES = 256    # of a long prompt at a time, with what comes before the last of them


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
              causal: bool = False) -> Tensor:
    """clip.attention, by the way that is the fastest here; arguments and result are the same."""
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    on_cpu = q.device.type == "cpu"
    if on_cpu and q.dtype in linear.SLOW and not trains:
        return clip.attention(q.float(), k.float(), v.float(), mask, causal).to(q.dtype)
    long = causal and mask is None and q.shape[-2] > QUERIES
    if not on_cpu or q.dtype not in WRITE_OUT or not (trains or long):
        return clip.attention(q, k, v, mask, causal)
    if trains:
        return written_out(q, k, v, mask, causal)
    return in_pieces(q, k, v)


def in_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, QUERIES at a time: none of them computes with what none of them sees."""
    parts = []
    for at in range(0, q.shape[-2], QUERIES):
        end = min(at + QUERIES, q.shape[-2])
        parts.append(written_out(q[:, :, at:end], k[:, :, :end], v[:, :, :end], None, True))
    return torch.cat(parts, dim=2)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The equation as it stands; arguments and result are those of clip.attention."""
    if causal:
        before = lower_triangle(q, k)
        mask = before if mask is None else mask & before
    q = q * q.shape[-1] ** -0.5
    scores = q @ k.mT                                                       # (B, H, Tq, Tk)
    if mask is not None:
        # The lowest finite number, not -inf: an empty row stays finite. It is added, since that
        # needs no backward: half the time
        hidden = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
        scores = scores + hidden.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    # In float32, for the sake of the backward; without one that is where the kernel computes anyway
    wide = torch.promote_types(scores.dtype, torch.float32) if scores.requires_grad else None
    shares = scores.softmax(-1, dtype=wide)
    y = shares.to(v.dtype) @ v                                              # (B, H, Tq, hd)
    return y if mask is None else y.masked_fill(~mask.any(-1, keepdim=True), 0)
