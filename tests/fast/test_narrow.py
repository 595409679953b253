"""fast/narrow.py: a frozen weight that is kept narrow gives, to the bit, what the widened one
gives, and only the narrow one is kept for the backward."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fast.linear import HALF
from fast.narrow import NarrowLinear, product

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {"one row": (33, ), "rows": (7, 33), "batch": (3, 50, 33)}


def narrow(dtype, bias=False):
    torch.manual_seed(0)
    return NarrowLinear(33, 20, bias=bias).to(dtype).requires_grad_(False)


def wide_twin(layer, x):
    """What F.linear with the widened weight gives for x and a gradient: y, x's gradient."""
    x = x.clone().requires_grad_()
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    y = F.linear(x, layer.weight.to(x.dtype), bias)
    y.backward(torch.ones_like(y) * 0.3)
    return y, x.grad


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
def test_is_the_widened_product_to_the_bit(dtype, shape, bias):
    layer, x = narrow(dtype, bias), torch.randn(shape)
    want, gradient = wide_twin(layer, x)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y) * 0.3)
    assert y.dtype == torch.float32
    assert torch.equal(y, want) and torch.equal(x.grad, gradient)
    assert layer.weight.grad is None and layer.weight.dtype == dtype


def kept(run):
    """What autograd keeps of run(): [(dtype, shape)]."""
    found = []

    def pack(t):
        found.append((t.dtype, tuple(t.shape)))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return found


def test_no_wide_copy_is_kept():
    layer, x = narrow(torch.bfloat16), torch.randn(5, 33, requires_grad=True)
    assert kept(lambda: layer(x)) == [(torch.bfloat16, (20, 33))]
    plain = kept(lambda: F.linear(x, layer.weight.float()))       # what it is for
    assert any(dtype == torch.float32 for dtype, _ in plain)


@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_under_autocast_it_is_autocasts_product(stored):
    layer, x = narrow(stored), torch.randn(3, 9, 33)
    gradients, answers = [], []
    for run in (layer, lambda x: F.linear(x, layer.weight)):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        y.backward(torch.ones_like(y))
        answers.append(y)
        gradients.append(x.grad)
    assert answers[0].dtype == torch.bfloat16
    assert torch.equal(*answers) and torch.equal(*gradients)
    with torch.autocast("cpu", torch.bfloat16):
        [(dtype, _)] = kept(lambda: layer(x))
    assert dtype == stored                           # not a copy in autocast's format


def test_an_equal_format_is_nn_linear():
    layer = narrow(torch.float64)
    x = torch.randn(4, 33, dtype=torch.float64)
    assert torch.equal(layer(x), nn.Linear.forward(layer, x))
    assert torch.equal(product(x, layer.weight), F.linear(x, layer.weight))


def test_recomputed_in_the_backward():
    layer, x = narrow(torch.bfloat16), torch.randn(5, 33)
    want, gradient = wide_twin(layer, x)
    x = x.requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False)
    y.backward(torch.ones_like(y) * 0.3)
    assert torch.equal(y, want) and torch.equal(x.grad, gradient)
