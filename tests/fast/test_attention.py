"""fast/attention.py against clip.attention, and both against a loop that is too simple to be wrong.
"""
import numpy as np
import pytest
import torch

import clip
from fast import attention as module
from fast import linear
from fast.attention import attention, written_out


def masks():
    torch.manual_seed(0)
    some = torch.rand(2, 1, 5, 5) < 0.5
    some[0, 0, 2] = False                                   # a row that may look nowhere
    # a sequence that is all padding
    keys = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()[:, None, None]
    return [(None, False), (None, True), (some, False), (some, True), (keys, False), (keys, True),
            (some[1, 0], False)]


def row_by_row(q, k, v, mask, causal):
    """The equation, for one query at a time. q, k, v (2, 3, 5, 4)."""
    out = torch.zeros_like(q)
    allowed = torch.ones(2, 3, 5, 5, dtype=torch.bool) if mask is None else mask.expand(2, 3, 5, 5)
    for b, h, t in np.ndindex(2, 3, 5):
        look = [s for s in range(5) if allowed[b, h, t, s] and (s <= t or not causal)]
        if look:
            out[b, h, t] = (k[b, h, look] @ q[b, h, t] / 2).softmax(0) @ v[b, h, look]
    return out


@pytest.mark.parametrize("mask, causal", masks())
def test_plain_equals_written_out(mask, causal, monkeypatch):
    torch.manual_seed(2)
    qkv = [torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    cotangent, results = torch.randn(2, 3, 5, 4, dtype=torch.float64), []
    monkeypatch.setattr(module, "WRITE_OUT", {torch.float64})    # makes it take that way
    for attend in (clip.attention, attention):
        out = attend(*qkv, mask, causal)
        results.append([out, *torch.autograd.grad(out, qkv, cotangent)])
    assert all(r.isfinite().all() for r in results[0] + results[1])
    for plain, written in zip(*results):
        torch.testing.assert_close(plain, written, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(module, "QUERIES", 2)    # at inference, in pieces, the last one short
    with torch.no_grad():
        pieces = attention(*qkv, mask, causal)
        right = row_by_row(*qkv, mask, causal)
    torch.testing.assert_close(pieces, results[0][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[0][0], right, rtol=1e-12, atol=1e-12)


def test_it_picks_by_hardware_and_use(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "written_out", lambda *a: calls.append("written out"))
    monkeypatch.setattr(clip, "attention", lambda *a: calls.append("plain"))
    monkeypatch.setattr(torch, "cat", lambda parts, dim: parts)
    monkeypatch.setattr(module, "QUERIES", 19)
    leaf, plain = torch.randn(1, 1, 20, 2, requires_grad=True), torch.randn(1, 1, 20, 2)
    for write_out in ({torch.float32}, set()):
        monkeypatch.setattr(module, "WRITE_OUT", write_out)
        attention(plain, plain, leaf)                   # training
        attention(plain, plain, plain, causal=True)     # a long prompt, in two pieces
        attention(*3 * [plain[:, :, 1:]], causal=True)  # a short one
        attention(plain[:, :, :1], plain, plain)        # a new token
        with torch.no_grad():
            attention(leaf, leaf, leaf)                 # a picture
    assert calls == 3 * ["written out"] + 8 * ["plain"]


def test_a_key_mask_and_fewer_queries_in_half_precision():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, t, 8, dtype=torch.bfloat16) for t in (1, 6, 6))
    mask = torch.tensor([[1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()[:, None, None]
    plain, written = clip.attention(q, k, v, mask), written_out(q, k, v, mask, False)
    assert plain.dtype == written.dtype == torch.bfloat16
    assert (plain[1] == 0).all() and (written[1] == 0).all()
    torch.testing.assert_close(plain, written, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_query_where_the_cpu_is_slow_at_half_precision(dtype, monkeypatch):
    """By way of float32: rounded once."""
    monkeypatch.setattr(linear, "SLOW", {dtype})
    monkeypatch.setattr(module, "WRITE_OUT", set())
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, t, 8).to(dtype) for t in (1, 70, 70))
    out = attention(q, k, v)
    exact = written_out(q.double(), k.double(), v.double(), None, False)        # (2, 2, 1, 8)
    allowed = torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert out.dtype == dtype and ((out.double() - exact).abs() <= allowed).all()
