"""Multi-layer visual feature fusion (Lin et al., 2025), its external direct fusion (E_D): layers of
each stage, channels side by side. No parameters."""
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from core.fields import Width, check_config
from fusers.common import Blocks, at, average

MLVF_LAYERS = ("18", "3-18-23", "former", "latter", "all")


@dataclass
class MLVFConfig:
    """layers: which ones stand beside LLaVA's; the default is one of each stage, as recommended."""
    vision_dim: Width = 1024
    n_layers: Blocks = 24
    layers: Annotated[str, MLVF_LAYERS] = "3-18-23"

    def __post_init__(self):
        check_config(self)


class MLVF(nn.Module):
    """Of 24 blocks: layer 18, layers 3 and 18, the mean of 1..12 ("former"), of 13..24 ("latter"),
    or both ("all"); then LLaVA's layer 23. The paper's other three fusions add weights elsewhere or
    reach into the language model.
    """
    name, asks = "mlvf", False

    def __init__(self, config: MLVFConfig):
        super().__init__()
        self.config = config
        L, low, high = config.n_layers, at(3, config.n_layers), at(18, config.n_layers)
        low, high = (low, low + 1), (high, high + 1)
        former, latter = (1, L // 2 + 1), (L // 2 + 1, L + 1)
        chosen = {"18": [high], "3-18-23": [low, high], "former": [former], "latter": [latter],
                  "all": [former, latter]}
        self.groups = [*chosen[config.layers], (L - 1, L)]
        self.width = config.vision_dim * len(self.groups)
        self.n_blocks = max(stop for _, stop in self.groups) - 1

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor,
                mode: str = "on") -> tuple[Tensor, dict[str, Tensor]]:
        """-> (B, N, 2d or 3d) and no maps."""
        return torch.cat([average(hidden, *group) for group in self.groups], dim=-1), {}
