"""LoRA (Hu et al. 2021): a frozen matrix W learns by two thin ones beside it, W + (alpha / r) B A.

Of a Llama's block all seven matrices get them, as in LLaVA's finetune_lora.sh and QLoRA. B starts
at zero, so the model starts as it was. Arithmetic and first values are PEFT's, without dropout.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.common import UserError
from core.weights import skeleton
from fast.narrow import product
from llama import Llama

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """y = x W^T + scale (x A^T) B^T.

    weight (out, in): W, frozen, in any number format; lora_A (r, in) and lora_B (out, r): trained,
    float32; scale = alpha / r.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        """base: whose weight this takes over, the very parameter."""
        nn.Module.__init__(self)                     # nn.Linear's own would draw another weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        how = dict(dtype=torch.float32, device=base.weight.device)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **how))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **how))
        self.alpha, self.scale = alpha, alpha / r
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def r(self) -> int:
        """The rank, which is A's height."""
        return self.lora_A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the number format of a product of x (or of autocast)."""
        y = product(x, self.weight, self.bias)                              # (..., out)
        wide = torch.promote_types(x.dtype, self.lora_A.dtype)
        thin = F.linear(x.to(wide), self.lora_A.to(wide)) * self.scale      # (..., r)
        return y + F.linear(thin, self.lora_B.to(wide)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scale={self.scale:g}"


def layers(llm: Llama) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The seven matrices of every block: (the module that holds it, its name there, the layer)."""
    return [(part, name, getattr(part, name)) for block in llm.layers
            for part in (block.self_attn, block.mlp) for name in MATRICES if hasattr(part, name)]


def add(llm: Llama, r: int, alpha: float) -> None:
    """Put LoRA beside the seven matrices of every block, in place. A is drawn by torch's generator.

    UserError for an r below 1 or larger than one of the matrices.
    """
    most = min(min(layer.weight.shape) for _, _, layer in layers(llm))
    if not 1 <= r <= most:
        raise UserError(f"LoRA of rank {r}: should be from 1 to {most}, the shorter side of the "
                        "language model's smallest matrix")
    for part, name, layer in layers(llm):
        setattr(part, name, LoRALinear(layer, r, alpha))


@torch.no_grad()
def fold(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """weight (out, in) += scale B A, in place: summed in float32 at least, then rounded to the
    weight's number format. A (r, in), B (out, r)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = (thin.to(weight.device, wide) for thin in (A, B))
    weight.copy_(torch.addmm(weight.to(wide), B, A, alpha=scale))           # (out, in)


def merge(llm: Llama) -> None:
    """Fold LoRA into the weights of all blocks, in place, and put nn.Linear back."""
    for part, name, layer in layers(llm):
        if isinstance(layer, LoRALinear):
            fold(layer.weight, layer.lora_A, layer.lora_B, layer.scale)
            with skeleton():
                whole = nn.Linear(layer.in_features, layer.out_features, bias=False)
            whole.weight = layer.weight.requires_grad_(True)
            setattr(part, name, whole)


def folded(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by name, LoRA's folded into the weights they lie beside (`fold`)."""
    tensors = dict(tensors)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            A, B = tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B")
            weight = tensors[f"{name}.weight"].clone()
            fold(weight, A, B, layer.scale)
            tensors[f"{name}.weight"] = weight
    return tensors
