"""Dense Connector (Yao et al., 2024): fixed layers beside LLaVA's, as tokens or as channels. No
parameters."""
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from core.fields import Width, check_config
from fusers.common import Blocks, at, average

DENSE = ("sti", "sci", "dci")


@dataclass
class DenseConnectorConfig:
    """kind: sti adds tokens, sci channels of two layers, dci channels of two means (its authors'
    default)."""
    vision_dim: Width = 1024
    n_layers: Blocks = 24
    kind: Annotated[str, DENSE] = "dci"

    def __post_init__(self):
        check_config(self)


class DenseConnector(nn.Module):
    """Beside LLaVA's layer L-1, of 24 blocks:

        sti   layers 7 and 15 as tokens of their own, each the mean of 8 neighbours in a row
        sci   layers 7 and 15 as channels
        dci   the means of layers 0..11 and 12..23 as channels. The embeddings (0) are in, the last
              layer (24) isn't
    """
    name, asks = "denseconnector", False

    def __init__(self, config: DenseConnectorConfig):
        super().__init__()
        self.config = config
        L, low, high = config.n_layers, at(7, config.n_layers), at(15, config.n_layers)
        two = [(low, low + 1), (high, high + 1)]
        if config.kind == "dci":
            two = [(0, L // 2), (L // 2, L)]
        self.groups = [(L - 1, L), *two]
        self.n_blocks = L - 1
        self.width = config.vision_dim * (1 if config.kind == "sti" else 3)

    def rows(self, N: int) -> int:
        return N + 2 * (N // 8) if self.config.kind == "sti" else N

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor,
                mode: str = "on") -> tuple[Tensor, dict[str, Tensor]]:
        """-> (B, N, 3d), but (B, N + 2 (N // 8), d) for sti; no maps."""
        last, *two = [average(hidden, *group) for group in self.groups]            # (B, N, d) each
        if self.config.kind != "sti":
            return torch.cat([last, *two], dim=-1), {}
        two = [nn.functional.avg_pool1d(x.mT, 8).mT for x in two]                  # (B, N // 8, d)
        return torch.cat([last, *two], dim=1), {}
