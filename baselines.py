"""The other ways to turn the vision tower's layers into features for the language model, in CCRA's place.

A fuser takes hidden (L+1, B, 1+N, d), all states of the tower, and the question F_t (B, T, D) with its mask (B, T), and
gives features (B, N, width) and maps. .name says in a config.json which it is; .n_blocks, how many blocks of the tower
it reads, so that the others need not run.
"""
from dataclasses import dataclass

from torch import Tensor, nn

from weights import UserError


@dataclass
class LLaVAConfig:
    """Sizes of the vision tower."""
    vision_dim: int = 1024             # d
    n_layers: int = 24                 # L

    def __post_init__(self):
        for name, least in (("vision_dim", 1), ("n_layers", 2)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise UserError(f"LLaVA: {name} = {getattr(self, name)!r} should be a whole number, {least} or more")


class LLaVA(nn.Module):
    """LLaVA-1.5: the patches of the last layer but one, whatever is asked. No parameters."""
    name = "llava"

    def __init__(self, config: LLaVAConfig):
        super().__init__()
        self.config, self.width = config, config.vision_dim
        self.n_blocks = config.n_layers - 1        # hidden[-2] of L+1 states is what comes out of block L-1

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden (n_blocks+1 or more, B, 1+N, d), CLS first -> (B, N, d) and no maps."""
        return hidden[self.n_blocks][:, 1:], {}
