"""TODO fusers/dense_connector.py"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusers.common import at, average, one_of, whole

DENSE = ("sti", "sci", "dci")


@dataclass
class DenseConnectorConfig:
    """kind: sti adds tokens, sci channels of two layers, dci channels of two means (its authors'
    default)."""
    vision_dim: int = 1024
    n_layers: int = 24
    kind: str = "dci"

    def __post_init__(self):
        whole(self, vision_dim=1, n_layers=2)
        one_of(self, "kind", DENSE)


class DenseConnector(nn.Module):
    """Dense Connector (Yao et al., 2024), beside LLaVA's layer L-1, of 24 blocks:

        sti   layers 7 and 15 as tokens of their own, each the mean of 8 patches that follow each other in a row
        sci   layers 7 and 15 as channels
        dci   the means of layers 0..11 and 12..23 as channels. The embeddings (0) are in, the last layer (24) isn't
    """
    name, asks = "denseconnector", False

    def __init__(self, config: DenseConnectorConfig):
        super().__init__()
        L, self.config, self.n_blocks = config.n_layers, config, config.n_layers - 1
        self.width = config.vision_dim * (1 if config.kind == "sti" else 3)
        low, high = at(7, L), at(15, L)
        two = [(0, L // 2), (L // 2, L)] if config.kind == "dci" else [(low, low + 1),
                                                                       (high, high + 1)]
        self.groups = [(L - 1, L), *two]

    def rows(self, N: int) -> int:
        return N + 2 * (N // 8) if self.config.kind == "sti" else N

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor,
                mode="on") -> tuple[Tensor, dict[str, Tensor]]:
        """-> (B, N, 3d), but (B, N + 2 (N // 8), d) for sti; no maps."""
        last, *two = [average(hidden, *group) for group in self.groups]             # each (B, N, d)
        if self.config.kind != "sti":
            return torch.cat([last, *two], dim=-1), {}
        two = [nn.functional.avg_pool1d(x.transpose(1, 2), 8).transpose(1, 2)
               for x in two]  # (B, N // 8, d)
        return torch.cat([last, *two], dim=1), {}
