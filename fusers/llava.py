"""Plain LLaVA-1.5 (Liu et al., 2023): one layer, whatever is asked. No parameters."""
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from core.fields import Range, Width, check_config
from fusers.common import Blocks


@dataclass
class LLaVAConfig:
    """Sizes of the vision tower. copies: 2 is the wide control, whose projector has as many
    parameters as CCRA's."""
    vision_dim: Width = 1024           # d
    n_layers: Blocks = 24              # L
    copies: Annotated[int, Range(1, 16)] = 1

    def __post_init__(self):
        check_config(self)


class LLaVA(nn.Module):
    """The patches of the last layer but one."""
    name, asks = "llava", False

    def __init__(self, config: LLaVAConfig):
        super().__init__()
        self.config, self.width = config, config.vision_dim * config.copies
        self.n_blocks = config.n_layers - 1        # hidden[-2] of L+1 states: out of block L-1

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor,
                mode: str = "on") -> tuple[Tensor, dict[str, Tensor]]:
        """hidden (n_blocks+1 or more, B, 1+N, d), CLS first -> (B, N, width) and no maps."""
        patches = hidden[self.n_blocks][:, 1:]                                     # (B, N, d)
        return torch.cat([patches] * self.config.copies, dim=-1), {}
