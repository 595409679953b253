"""CCRA against the paper's equations written out."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import ccra
from ccra import CCRA, CCRAConfig, moments, smooth, standardise
from core.common import UserError
from tests.ccra.helpers import (
    ABLATIONS,
    TINY,
    inputs,
    literal,
    make,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def probe(features, maps):
    """A scalar that depends on everything, differently everywhere."""
    outputs = [features, *(maps[name] for name in sorted(maps))]
    return sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape).cos()).sum()
               for x in outputs)


def check_against_literal(cfg, anchor=-1):
    model = make(replace(cfg, anchor_layer=anchor))
    F_stack, F_t, mask = inputs(cfg)
    F_stack.requires_grad_(), F_t.requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    features, maps = model(F_stack, F_t, mask)
    rows = [literal(model, F_stack[b], F_t[b, mask[b]]) for b in range(len(F_stack))]
    expected = torch.stack([fused for fused, _ in rows])
    for _, row in rows:
        row["alpha"] = nn.functional.pad(row["alpha"], (0, F_t.shape[1] - len(row["alpha"])))
    expected_maps = {name: torch.stack([row[name] for _, row in rows]) for name in rows[0][1]}
    assert features.shape == (3, 5, 20) and set(maps) == set(expected_maps)
    assert (features - expected).abs().max() < 1e-9
    for name in maps:
        assert maps[name].shape == expected_maps[name].shape, name
        assert (maps[name] - expected_maps[name]).abs().max() < 1e-9, name
    leaves = {"F_stack": F_stack, "F_t": F_t, **trained}
    # raises if a trained part is unused
    ours = torch.autograd.grad(probe(features, maps), list(leaves.values()))
    theirs = torch.autograd.grad(probe(expected, expected_maps), list(leaves.values()))
    for name, a, b in zip(leaves, ours, theirs):
        assert (a - b).abs().max() < 1e-9, name
        assert b.abs().max() > 1e-9, f"{name} has no gradient: nothing was tested"
    return model, ours


@pytest.mark.parametrize("off", ABLATIONS, ids=lambda off: next(iter(off), "full"))
@pytest.mark.parametrize("order", ccra.ORDERS + ccra.ALONE)
@pytest.mark.parametrize("norm", ccra.NORMS)
def test_equals_the_equations_written_out(norm, order, off):
    if order == "decoupled" and "lpwca" in off:
        pytest.skip("there is no LPWCA to leave out")
    check_against_literal(replace(TINY, norm=norm, order=order, **off))


def test_equals_the_equations_with_other_settings():
    check_against_literal(replace(TINY, kernel_size=4, sigma=0.7), anchor=-2)
    check_against_literal(replace(TINY, kernel_size=9))               # wider than the tower is deep
    check_against_literal(replace(TINY, kernel_size=1), anchor=-4)


def test_a_strided_view_of_the_tower_gives_the_same():
    model, (F_stack, F_t, mask) = make(TINY), inputs(TINY)
    hidden = torch.randn(5, 3, 6, 10, dtype=torch.float64)
    hidden[1:, :, 1:] = F_stack.transpose(0, 1)
    view = hidden[1:, :, 1:].transpose(0, 1)
    assert not view.is_contiguous()
    assert torch.allclose(model(view, F_t, mask)[0], model(F_stack, F_t, mask)[0], atol=1e-12)


# --------------------------------------------------------------------------------------------------
# Parameters

def count(cfg):
    with torch.device("meta"):
        return sum(p.numel() for p in CCRA(cfg).parameters() if p.requires_grad)


def test_parameter_counts():
    assert count(CCRAConfig()) == 3_545_216
    with torch.device("meta"):
        names = [name for name, _ in CCRA(TINY).named_parameters()]
    assert names == [f"scorer.{x}.weight" for x in ("q", "k", "v", "out")] + [
        f"{part}.{x}" for part in ccra.PARTS
        for x in ("q.weight", "k.weight", "norm.weight", "norm.bias")]
    pair, norm = (4096 + 1024) * 128, 2 * 1024
    for part in ccra.PARTS:
        assert count(CCRAConfig(**{part: False})) == 3_545_216 - pair
    assert count(CCRAConfig(smooth=False)) == count(CCRAConfig(order="shuffled")) == 3_545_216
    assert count(CCRAConfig(order="decoupled")) == 3_545_216 - pair - norm
    assert count(CCRAConfig(lpwca=False, lwca=False, pwca=False)) == 3 * norm  # not even the scorer
    assert count(CCRAConfig(order="decoupled", lwca=False, pwca=False)) == 2 * norm
    for order in ccra.ALONE:
        assert count(CCRAConfig(order=order)) == 3_545_216 - 2 * (pair + norm)


def test_what_is_frozen_can_be_frozen_again():
    model = CCRA(replace(TINY, lwca=False)).requires_grad_(True)
    model.freeze_unused()
    assert [name for name, p in model.named_parameters()
            if not p.requires_grad] == ["lwca.q.weight", "lwca.k.weight"]


def test_norms_start_neutral():
    norm = CCRA(TINY).lpwca.norm
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all()


@pytest.mark.parametrize("bad", [
    dict(norm="layer"), dict(order="parallel"), dict(d_hidden=0), dict(kernel_size=2.0),
    dict(sigma=0), dict(sigma=math.nan), dict(anchor_layer=0), dict(anchor_layer=-25),
    dict(lwca=1), dict(n_layers=True)])
def test_bad_settings(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        CCRAConfig(**bad)


def test_wrong_sizes_and_modes():
    model, (F_stack, F_t, mask) = make(TINY), inputs(TINY)
    for bad in ((F_stack[:, 1:], F_t), (F_stack[..., 1:], F_t), (F_stack, F_t[..., 1:])):
        with pytest.raises(UserError, match="made for"):
            model(*bad, mask)
    with pytest.raises(UserError, match="mode"):
        model(F_stack, F_t, mask, mode="of")


# --------------------------------------------------------------------------------------------------
# Smoothing

def test_smoothing_by_hand():
    impulse = torch.tensor([[0, 0, 0, 1, 0, 0, 0]], dtype=torch.float64)
    e2, e1 = math.exp(-2), math.exp(-0.5)  # two layers and one layer from the centre, sigma 1
    total = 1 + 2 * e1 + 2 * e2
    expected = torch.tensor([[0, e2, e1, 1, e1, e2, 0]], dtype=torch.float64) / total
    assert torch.allclose(smooth(impulse, 5, 1.0), expected)
    assert expected[0, 3].item() == pytest.approx(0.4026, abs=1e-4)
    # at the end the first layer is repeated: w[-2] = w[-1] = w[0]
    end = torch.tensor([[1, 0, 0, 0, 0, 0]], dtype=torch.float64)
    expected = torch.tensor([[e2 + e1 + 1, e2 + e1, e2, 0, 0, 0]], dtype=torch.float64) / total
    assert torch.allclose(smooth(end, 5, 1.0), expected)


def test_even_smoothing_looks_half_a_layer_up():
    impulse = torch.tensor([[0, 0, 0, 1, 0, 0, 0]], dtype=torch.float64)
    outer, inner = math.exp(-1.5 ** 2 / (2 * 0.95 ** 2)), math.exp(-0.5 ** 2 / (2 * 0.95 ** 2))
    got = smooth(impulse, 4, 0.95)                # w'[l] reads w[l-1], w[l], w[l+1], w[l+2]
    expected = torch.tensor([[0, outer, inner, inner, outer, 0, 0]],
                            dtype=torch.float64) / (2 * (outer + inner))
    assert torch.allclose(got, expected)
    assert got[0, 1:3].tolist() == pytest.approx([0.1241, 0.3759], abs=1e-4)


def test_smoothing_leaves_constants():
    assert torch.allclose(smooth(torch.full((2, 3), 0.7), 6, 2.0), torch.full((2, 3), 0.7))


# --------------------------------------------------------------------------------------------------
# Padding, empty questions, modes

@pytest.mark.parametrize("order", ccra.ORDERS)
def test_a_batch_is_its_samples_alone(order):
    model, (F_stack, F_t, mask) = make(replace(TINY, order=order)), inputs(TINY)
    F_t = F_t.masked_fill(~mask[..., None], 1e3)  # whatever stands in the padding
    features, maps = model(F_stack, F_t, mask)
    for b in range(3):
        alone, maps_alone = model(F_stack[b:b + 1], F_t[b:b + 1, mask[b]], mask[b:b + 1, mask[b]])
        assert torch.allclose(features[b:b + 1], alone, atol=1e-12)
        for name in set(maps) - {"alpha"}:
            assert torch.allclose(maps[name][b:b + 1], maps_alone[name], atol=1e-12)
        assert torch.allclose(maps["alpha"][b:b + 1, mask[b]], maps_alone["alpha"], atol=1e-12)
        assert maps["alpha"][b, ~mask[b]].eq(
            0).all() and maps["alpha"][b].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("order", ccra.ORDERS)
def test_a_sample_without_question_is_neutral(order):
    model, (F_stack, F_t, mask) = make(replace(TINY, order=order)), inputs(TINY, lengths=(4, 0, 3))
    F_t.requires_grad_()
    features, maps = model(F_stack, F_t, mask)
    for name in ("alpha", "W_lp", "w_l", "w_p"):
        assert maps[name][1].eq(0).all(), name
        assert maps[name][0].ne(0).any() or (order, name) == ("decoupled", "W_lp")
    assert torch.allclose(maps["w_hat"][1], torch.full((4,), 0.25, dtype=torch.float64))
    probe(features, maps).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert F_t.grad[1].eq(0).all() and torch.isfinite(F_t.grad).all() and F_t.grad[0].ne(0).any()
    # all samples without: gradients of 0, not None, or DDP would wait for them
    model.zero_grad()
    features, maps = model(F_stack, F_t, torch.zeros_like(mask))
    probe(features, maps).backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or "norm" in name or p.grad.eq(0).all(), name
    # no column at all, and the mode, give the same
    assert torch.equal(model(F_stack, F_t[:, :0], mask[:, :0])[0], features)
    assert torch.equal(model(F_stack, F_t, mask, mode="neutral")[0], features)


def test_off_repeats_the_anchor():
    model, (F_stack, F_t, mask) = make(replace(TINY, anchor_layer=-2)), inputs(TINY)
    features, maps = model(F_stack, F_t, mask, mode="off")
    assert torch.equal(features, torch.cat([F_stack[:, 2]] * 2, -1))
    on = model(F_stack, F_t, mask)[1]
    assert {name: m.shape for name, m in maps.items()} == {name: m.shape for name, m in on.items()}
    assert maps["w_hat"].eq(0.25).all() and not any(maps[name].any()
                                                    for name in ("alpha", "W_lp", "w_l", "w_p"))


def test_all_parts_off_is_neutral():
    cfg = replace(TINY, lpwca=False, lwca=False, pwca=False)
    model, (F_stack, F_t, mask) = make(cfg), inputs(cfg)
    assert torch.allclose(
        model(F_stack, F_t, mask)[0],
        model(F_stack, F_t, mask, mode="neutral")[0], atol=1e-12)


# --------------------------------------------------------------------------------------------------
# The finding: with LayerNorm as everybody codes it, LPWCA and PWCA do nothing

def test_under_the_token_norm_attention_cannot_be_felt():
    F_stack, F_t, mask = inputs(TINY)
    F_stack, reached, moved = 4 * F_stack, {}, {}  # far above EPS, as a real tower's features are
    for norm in ccra.NORMS:
        torch.manual_seed(0)
        model = CCRA(replace(TINY, norm=norm)).double()
        model.lpwca.q.weight.data /= 4
        model.pwca.q.weight.data /= 4
        features, maps = model(F_stack, F_t, mask)
        assert maps["W_lp"].abs().max() > 0.05 and (1 + maps["W_lp"]).min() > 0 and (
            1 + maps["w_p"]).min() > 0
        probe(features, {}).backward()
        reached[norm] = [model.lpwca.q.weight.grad.norm(), model.pwca.q.weight.grad.norm()]
        model.lwca.q.weight.data.zero_()  # LWCA apart, whose weights follow F_lp in any case
        before = model(F_stack, F_t, mask)[0]
        model.lpwca.q.weight.data *= -0.5          # another W_lp, and another w_p
        model.pwca.q.weight.data *= -0.5
        moved[norm] = (model(F_stack, F_t, mask)[0] - before).abs().max()
    for norm in ("joint", "stack"):
        assert all(token < 1e-3 * other for token, other in zip(reached["token"], reached[norm]))
        assert moved["token"] < 1e-5 and moved[norm] > 1e-2


def test_joint_is_group_norm():
    model, (F_stack, _, _) = make(TINY), inputs(TINY)
    W = torch.rand(3, 4, 5, dtype=torch.float64)
    got = model.lpwca.norm(F_stack, 1 + W, "joint")
    group = nn.GroupNorm(1, 10, eps=ccra.EPS, dtype=torch.float64)
    group.weight, group.bias = model.lpwca.norm.weight, model.lpwca.norm.bias
    expected = group(
        (F_stack * (1 + W)[..., None]).flatten(0,
                                               1).transpose(1,
                                                            2)).transpose(1,
                                                                          2).unflatten(0, (3, 4))
    assert torch.allclose(got, expected, atol=1e-12)


def test_only_stack_lets_a_layer_as_a_whole_weigh_more():
    F_stack, c = inputs(TINY)[0] * 10, torch.rand(3, 4, 5, dtype=torch.float64) + 0.5
    louder = c * torch.tensor([1, 3, 1, 1])[:, None]
    for norm, changes in (("joint", False), ("token", False), ("stack", True)):
        (a, b), (a2, b2) = (standardise(x, *moments(F_stack), norm) for x in (c, louder))
        assert torch.allclose(a, a2, rtol=1e-5) != changes and torch.allclose(b, b2,
                                                                              rtol=1e-5) != changes


# --------------------------------------------------------------------------------------------------
# Numerics

def test_float32_survives_features_far_from_zero():
    cfg = replace(TINY, vision_dim=64)
    model, (F_stack, F_t, mask) = make(cfg), inputs(cfg, N=20)
    for part in (model.lpwca, model.lwca, model.pwca):     # the scores themselves stay moderate
        part.k.weight.data -= part.k.weight.data.mean(1, keepdim=True)
    F_stack = (F_stack + 300).float()                      # rounded here, the same numbers for both
    exact = model(F_stack.double(), F_t, mask)[0]
    error = (model.float()(F_stack, F_t.float(), mask)[0] - exact).abs().max()
    assert error < 2e-3
    # what the textbook formula would have made of it
    mean, var = moments(F_stack)
    true = F_stack.double().var(-1, correction=0)
    assert ((var - true) / true).abs().max() < 1e-5
    assert ((F_stack.square().mean(-1) - mean.square() - true) / true).abs().max() > 1e-2


def test_autocast_and_bfloat16():
    model, (F_stack, F_t, mask) = make(TINY).float(), inputs(TINY, dtype=torch.float32)
    features, maps = model(F_stack, F_t, mask)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_maps = model(F_stack, F_t, mask)
    assert torch.equal(features, cast) and all(
        torch.equal(maps[name], cast_maps[name]) for name in maps)
    probe(cast, cast_maps).backward()
    half, half_maps = model.bfloat16()(F_stack.bfloat16(), F_t.bfloat16(), mask)
    assert half.dtype == torch.bfloat16 and half_maps["W_lp"].dtype == torch.float32
    assert (half.float() - features).abs().max() < 0.3 and half.isfinite().all()


def test_a_frozen_tower_costs_no_copy_of_the_features():
    """What autograd keeps must be F_stack itself (by reference), the maps and a few (B, N, d): F_lp
    must not exist."""
    cfg = replace(TINY, n_layers=12, vision_dim=64)
    model, (F_stack, F_t, mask) = make(cfg), inputs(cfg, N=40)
    base, kept = F_stack.untyped_storage().data_ptr(), {}

    def keep(x):
        if x.untyped_storage().data_ptr() != base:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(F_stack, F_t, mask)[0]
    assert out.requires_grad and sum(kept.values()) < 2 * F_stack.nbytes
