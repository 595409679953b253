"""Matrix products with many rows, in half precision on a CPU that can't multiply it.

A model spends its time in y = x W^T. With one row of x (a new token) W is read once from memory and
hardly used: packed.py. With many rows (a prompt, a picture) every number of W is used again and
again. Where the CPU can't multiply a dtype in hardware (`SLOW`: float16 on most, bfloat16 on many),
torch 2.13 takes several times as long as for a float32 product. `blocks` turns some rows of W at a
time into float32, in one buffer that stays in the cache, and multiplies there: as exact or exacter.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.device import autocast_dtype

HALF = (torch.bfloat16, torch.float16)
FAST = {
    torch.bfloat16: autocast_dtype(torch.device("cpu")) == torch.bfloat16,
    torch.float16: torch.backends.mkldnn.is_available()
                   and torch.ops.mkldnn._is_mkldnn_fp16_supported()}
SLOW = {dtype for dtype in HALF if not FAST[dtype]}     # multiplied by way of float32 only
FEW = 3          # rows up to which PyTorch's kernels, which take the rows one by one, beat `blocks`
BLOCK = 2 ** 21  # numbers of W turned into float32 at a time: 8 MB
_scratch = torch.empty(0)


def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory to compute in, always the same: fresh memory costs more than the conversion into it.
    """
    global _scratch
    n = torch.Size(shape).numel()
    if len(_scratch) < n:
        with torch.inference_mode(False):
            _scratch = torch.empty(n)
    return _scratch[:n].view(dtype)[:n].view(shape)


def blocks(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x (..., D) times weight (O, D), half precision or int8, by way of float32 -> (..., O), like
    x.

    scale (O): what each row of the weight is to be multiplied with. Where x's own dtype is
    multiplied in hardware, an int8 weight goes by way of that: its numbers fit into it exactly.
    """
    through = torch.float32 if x.dtype in SLOW else x.dtype
    rows = x.reshape(-1, x.shape[-1]).to(through)                           # (R, D)
    y = x.new_empty(len(rows), len(weight))                                 # (R, O)
    step = max(1, BLOCK // weight.shape[1])
    for at in range(0, len(weight), step):
        part = weight[at:at + step]                                         # (step, D)
        product = rows @ scratch(*part.shape, dtype=through).copy_(part).t()    # (R, step)
        if scale is not None:
            product = product.float() * scale[at:at + step].float()
        y[:, at:at + step] = product
    return y.view(*x.shape[:-1], -1)


class HalfLinear(nn.Linear):
    """nn.Linear; at inference on a CPU that is slow at its weight's half precision, many rows go by
    `blocks`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)"""
        weight = self.weight
        if weight.dtype in SLOW and x.numel() > FEW * x.shape[-1] and x.device.type == "cpu":
            trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
            if x.dtype == weight.dtype and not trains:
                y = blocks(x, weight)
                return y if self.bias is None else y + self.bias
        return F.linear(x, weight, self.bias)
