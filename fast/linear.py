"""Linear layers at inference on a CPU, where PyTorch's own kernels leave much of the machine
unused.

A model spends its time in y = x W^T. With one row of x (a new token) W is read once from memory and
hardly used; with many rows (a prompt, a picture) every number of W is used again and again. In half
precision torch 2.13 does neither well:

    many rows   where the CPU can't multiply a dtype in hardware (`SLOW`: float16 on most, bfloat16 on many), a product
                is several times slower than a float32 one. `blocks` turns some rows of W at a time into float32, in
                one buffer that stays in the cache, and multiplies there: as exact or exacter
    one row     turning the numbers into float32, not reading them, is what takes the time: a core reads half of what
                it could. `sums` uses a kernel that FBGEMM compiles for this very CPU. `Columns` lays W out anew for
                it; keys and values of old positions lie as it wants them from the start
    int8        `Int8` keeps a byte a number: half the memory, and half as much to read for every token

`Linear` is what models are built of: nn.Linear in every respect, but for many rows at inference.
The other two replace layers of a loaded model in place (`Llama.pack`), for good: such a model can't
be trained or saved.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.device import autocast_dtype

HALF = (torch.bfloat16, torch.float16)
FAST = {
    torch.bfloat16: autocast_dtype(torch.device("cpu")) == torch.bfloat16,
    torch.float16: torch.backends.mkldnn.is_available() and
                   torch.ops.mkldnn._is_mkldnn_fp16_supported()}
# what this CPU multiplies by way of float32 only
SLOW = {dtype for dtype in HALF if not FAST[dtype]}
FEW = 3          # rows up to which PyTorch's kernels, which take the rows one by one, beat `blocks`
BLOCK = 2 ** 21  # numbers of W turned into float32 at a time: 8 MB
_scratch = torch.empty(0)


def scratch(*shape: int, dtype=torch.float32) -> Tensor:
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
    rows = x.reshape(-1, x.shape[-1]).to(through)                                    # (R, D)
    y = x.new_empty(len(rows), len(weight))                                          # (R, O)
    step = max(1, BLOCK // weight.shape[1])
    for at in range(0, len(weight), step):
        part = weight[at:at + step]
        product = rows @ scratch(*part.shape, dtype=through).copy_(part).t()         # (R, step)
        y[:, at:at +
          step] = product if scale is None else product.float() * scale[at:at + step].float()
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """nn.Linear; at inference on a CPU that is slow at its weight's half precision, that goes by
    `blocks`."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype in SLOW and x.numel() > FEW * x.shape[-1] and x.device.type == "cpu":
            if x.dtype == weight.dtype and not (torch.is_grad_enabled() and
                                                (x.requires_grad or weight.requires_grad)):
                y = blocks(x, weight)
                return y if self.bias is None else y + self.bias
        return F.linear(x, weight, self.bias)
