"""fast/linear.py and fast/norm.py: each fast layer against its literal twin."""
import pytest
import torch
from torch import nn

from fast import linear
from fast.linear import HalfLinear, blocks
from fast.norm import RowNorm
from llama import RMSNorm
from tests.fast.helpers import HALF, close, draw

pytestmark = pytest.mark.usefixtures("slow_half")


@pytest.mark.parametrize("rows, D, O", [(1, 64, 192), (2, 100, 320), (7, 33, 448), (3, 5000, 128)])
@pytest.mark.parametrize("dtype", HALF)
def test_blocks(rows, D, O, dtype, monkeypatch):
    monkeypatch.setattr(linear, "BLOCK", 2 ** 13)    # several pieces, the last one short
    x, weight = draw(1, rows, D, dtype=dtype) / D ** 0.5, draw(O, D, dtype=dtype, seed=1)
    close(blocks(x, weight), x.double() @ weight.double().t(), dtype)           # (1, rows, O)


def test_half_linear_is_nn_linear_but_for_many_rows_at_inference(monkeypatch):
    used = []
    monkeypatch.setattr(linear, "blocks", lambda x, w: used.append(1) or blocks(x, w))
    half, wide = HalfLinear(32, 48).bfloat16(), HalfLinear(32, 48)
    x = draw(5, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = nn.functional.linear(x, half.weight, half.bias)
        torch.testing.assert_close(half(x), exact, atol=2e-2, rtol=2e-2)
        assert used == [1]
        half(x[:1])
        wide(x.float())
    half(x).sum().backward()                         # training: exactly nn.Linear
    assert used == [1] and half.weight.grad is not None
    monkeypatch.setattr(linear, "SLOW", set())
    with torch.no_grad():
        half(x)
    assert used == [1]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_one_row_is_normed_as_many_are(dtype):
    norms = [kind(256, 1e-5).to(dtype).requires_grad_(False) for kind in (RMSNorm, RowNorm)]
    for norm in norms:
        norm.weight.copy_(draw(256, seed=1))
    x = draw(7, 1, 256, dtype=dtype) * 30
    with torch.no_grad():
        slow = norms[0](x)
        assert torch.equal(norms[1](x), slow)
        quick = torch.stack([norms[1](row[None])[0] for row in x])
    apart = (quick.double() - slow.double()).abs()
    assert (apart <= 3 * torch.finfo(dtype).eps * slow.double().abs()).all()
    assert torch.equal(norms[1](x[:1]), norms[0](x[:1]))         # where gradients may be asked for
