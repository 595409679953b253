"""What the equations promise for any sizes, any numbers, all arrangements and all norms."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccra import ALONE, CCRA, NORMS, ORDERS, CCRAConfig

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS_OFF = st.sets(st.sampled_from(("lpwca", "lwca", "pwca", "smooth")), max_size=2)


@st.composite
def cases(draw):
    """A CCRA in float64 with weights far from its start, and inputs of some sizes."""
    off = dict.fromkeys(draw(PARTS_OFF), False)
    L = draw(st.integers(1, 5))
    config = CCRAConfig(
        text_dim=draw(st.integers(1, 6)), vision_dim=draw(st.integers(2, 6)), n_layers=L,
        d_hidden=draw(st.integers(1, 4)), kernel_size=draw(st.integers(1, 6)),
        norm=draw(st.sampled_from(NORMS)), order=draw(st.sampled_from(ORDERS + ALONE)),
        anchor_layer=-draw(st.integers(1, L)), **off)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 32)))
    model = CCRA(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.5)
    B, N, T = (draw(st.integers(1, high)) for high in (3, 6, 5))
    F_stack = torch.randn(B, L, N, config.vision_dim, generator=g, dtype=torch.float64)
    F_t = torch.randn(B, T, config.text_dim, generator=g, dtype=torch.float64)
    mask = torch.rand(B, T, generator=g) < 0.8                       # some rows have no word at all
    return model, F_stack, F_t, mask, g


def run(model, F_stack, F_t, mask):
    with torch.no_grad():
        return model(F_stack, F_t, mask)


def same(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def quickly(f):
    return settings(max_examples=25, deadline=None, derandomize=True, database=None)(f)


@quickly
@given(cases())
def test_permuted_patches_are_permuted_in_everything(case):
    model, F_stack, F_t, mask, g = case
    order = torch.randperm(F_stack.shape[2], generator=g)
    F_fused, maps = run(model, F_stack, F_t, mask)
    F_moved, moved = run(model, F_stack[:, :, order], F_t, mask)
    assert same(F_moved, F_fused[:, order])
    assert same(moved["W_lp"], maps["W_lp"][..., order])
    assert same(moved["w_p"], maps["w_p"][..., order])
    assert same(moved["w_hat"], maps["w_hat"]) and same(moved["alpha"], maps["alpha"])


@quickly
@given(cases())
def test_a_masked_word_is_a_word_that_is_not_there(case):
    model, F_stack, F_t, mask, g = case
    F_fused, maps = run(model, F_stack, F_t, mask)
    wild = torch.where(mask[..., None], F_t, torch.full_like(F_t, 1e3))
    assert same(run(model, F_stack, wild, mask)[0], F_fused)
    for i, real in enumerate(mask):
        words = F_t[i:i + 1, real]
        alone, found = run(model, F_stack[i:i + 1], words, mask[i:i + 1, real])
        assert same(alone[0], F_fused[i]) and same(found["alpha"][0], maps["alpha"][i, real])


@quickly
@given(cases())
def test_the_order_of_words_does_not_matter(case):
    model, F_stack, F_t, mask, g = case
    order = torch.randperm(F_t.shape[1], generator=g)
    F_fused, maps = run(model, F_stack, F_t, mask)
    F_moved, moved = run(model, F_stack, F_t[:, order], mask[:, order])
    assert same(F_moved, F_fused) and same(moved["alpha"], maps["alpha"][:, order])


@quickly
@given(cases(), st.integers(1, 4))
def test_a_batch_is_its_rows_and_padding_is_nothing(case, more):
    model, F_stack, F_t, mask, g = case
    F_fused, maps = run(model, F_stack, F_t, mask)
    padded = torch.cat([F_t, torch.full_like(F_t[:, :1], 7.0).expand(-1, more, -1)], 1)
    longer = torch.cat([mask, mask.new_zeros(len(mask), more)], 1)
    assert same(run(model, F_stack, padded, longer)[0], F_fused)
    for i in range(len(F_t)):
        row = slice(i, i + 1)
        alone, found = run(model, F_stack[row], F_t[row], mask[row])
        assert same(alone[0], F_fused[i])
        assert all(same(found[name][0], maps[name][i]) for name in maps)


@quickly
@given(cases())
def test_a_kernel_of_one_layer_does_not_smooth(case):
    model, F_stack, F_t, mask, g = case
    found = []
    for change in (dict(kernel_size=1, smooth=True), dict(kernel_size=5, smooth=False)):
        other = CCRA(replace(model.config, **change)).double()
        other.load_state_dict(model.state_dict())
        found.append(run(other, F_stack, F_t, mask))
    assert same(found[0][0], found[1][0]) and same(found[0][1]["w_hat"], found[1][1]["w_hat"])


@quickly
@given(cases())
def test_without_smoothing_the_order_of_layers_does_not_matter(case):
    """All but the anchor, which stands in F_fused by its place."""
    model, F_stack, F_t, mask, g = case
    model.config = replace(model.config, smooth=False)
    anchor = F_stack.shape[1] + model.config.anchor_layer
    others = [l for l in range(F_stack.shape[1]) if l != anchor]
    order = torch.arange(F_stack.shape[1])
    order[others] = torch.tensor(others, dtype=torch.long)[torch.randperm(len(others), generator=g)]
    F_fused, maps = run(model, F_stack, F_t, mask)
    F_moved, moved = run(model, F_stack[:, order], F_t, mask)
    assert same(F_moved, F_fused)
    assert same(moved["W_lp"], maps["W_lp"][:, order])
    assert same(moved["w_hat"], maps["w_hat"][:, order])
