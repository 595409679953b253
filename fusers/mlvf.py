"""TODO fusers/mlvf.py"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusers.common import at, average, one_of, whole

MLVF_LAYERS = ("18", "3-18-23", "former", "latter", "all")


@dataclass
class MLVFConfig:
    """layers: which ones stand beside LLaVA's; the default is one of each stage, as the paper
    recommends."""
    vision_dim: int = 1024
    n_layers: int = 24
    layers: str = "3-18-23"

    def __post_init__(self):
        whole(self, vision_dim=1, n_layers=2)
        one_of(self, "layers", MLVF_LAYERS)


class MLVF(nn.Module):
    """Multi-layer visual feature fusion (Lin et al., 2025), its external direct fusion (E_D):
    channels side by side.

    Of 24 blocks: layer 18, layers 3 and 18, the mean of 1..12 ("former"), of 13..24 ("latter"), or
    both ("all"); then LLaVA's layer 23. The paper's other three fusions add weights elsewhere or
    reach into the language model.
    """
    name, asks = "mlvf", False

    def __init__(self, config: MLVFConfig):
        super().__init__()
        L, self.config = config.n_layers, config
        low, high, former, latter = at(3, L), at(18, L), (1, L // 2 + 1), (L // 2 + 1, L + 1)
        low, high = (low, low + 1), (high, high + 1)
        self.groups = [
            *{
                "18": [high], "3-18-23": [low, high], "former": [former], "latter": [latter],
                "all": [former, latter]}[config.layers], (L - 1, L)]
        self.width, self.n_blocks = config.vision_dim * len(self.groups), max(
            stop for _, stop in self.groups) - 1

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor,
                mode="on") -> tuple[Tensor, dict[str, Tensor]]:
        """-> (B, N, 2d or 3d) and no maps."""
        return torch.cat([average(hidden, *group) for group in self.groups], dim=-1), {}
