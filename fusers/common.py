"""What several fusers share: checks of their sizes, and layers by their share of the depth."""
from typing import Annotated

from torch import Tensor

from core.common import UserError
from core.fields import Range, title

Blocks = Annotated[int, Range(2, 1000)]         # blocks of a tower that has a last one but one


def fits(config, **sizes: int) -> None:
    """UserError for a setting that isn't the size that the towers need."""
    for name, size in sizes.items():
        if getattr(config, name, size) != size:
            raise UserError(f"{title(config)}: {name} = {getattr(config, name)}, but these towers "
                            f"need {size}")


def at(layer: int, n_layers: int) -> int:
    """What layer `layer` of 24 is in a tower of n_layers: the one at the same share of its depth,
    halves up."""
    return (layer * n_layers + 12) // 24


def average(hidden: Tensor, start: int, stop: int) -> Tensor:
    """The mean of layers start..stop-1, patches only, (B, N, d)."""
    return hidden[start:stop, :, 1:].mean(0)
