"""Products with a frozen weight that is kept narrower than what it is multiplied with.

A language model that is only read while something before it, or LoRA beside it, is trained may stay
as it is stored: 2 bytes a number. Where products are wider (float32, on a CPU that has no fast
bfloat16) it is widened matrix by matrix, and autograd would keep each wide copy until the backward:
all of the model in 4 bytes again. Here the backward widens anew.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Converted(torch.autograd.Function):
    """F.linear with a frozen weight in another number format than x's; what is kept is the weight
    as it is."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., D), weight (O, D), bias (O) -> (..., O), in x's format."""
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        """grad (..., O) -> x's (..., D)."""
        weight, = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D) times a frozen weight (O, D), plus its bias (O) -> (..., O), in x's number format,
    or in autocast's where that is on."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if weight.dtype == dtype:
        return F.linear(x, weight, bias)
    return Converted.apply(x.to(dtype), weight, bias)


class NarrowLinear(nn.Linear):
    """nn.Linear whose weight and bias are frozen, in any number format. Only x gets a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)"""
        return product(x, self.weight, self.bias)


def keep(module: nn.Module, dtype: torch.dtype) -> list[nn.Linear]:
    """The layers of a module whose frozen weight may stay narrower than products of dtype, such as
    a language model's. Plain ones become NarrowLinear, in place; a tied weight is no such."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    tables = {id(table.weight) for table in module.modules() if isinstance(table, nn.Embedding)}
    found = [layer for layer in layers if not layer.weight.requires_grad and layer.bias is None
             and layer.weight.dtype.itemsize < dtype.itemsize and id(layer.weight) not in tables]
    for layer in found:
        if type(layer) is nn.Linear:
            layer.__class__ = NarrowLinear
    return found
