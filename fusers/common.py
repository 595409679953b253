"""What several fusers share: checks of their settings, and layers by their share of the depth."""
from torch import Tensor

from core.common import UserError


def title(config) -> str:
    """The fuser's name in messages: "LLaVA" of a LLaVAConfig."""
    return type(config).__name__.removesuffix("Config")


def whole(config, **least: int) -> None:
    """UserError for a setting that isn't a whole number, or is less than it may be."""
    for name, low in least.items():
        value = getattr(config, name)
        if type(value) is not int or value < low:
            raise UserError(f"{title(config)}: {name} = {value!r} should be a whole number, "
                            f"{low} or more")


def one_of(config, name: str, values: tuple) -> None:
    """UserError for a setting that is none of these values."""
    value = getattr(config, name)
    if value not in values:
        raise UserError(f"{title(config)}: {name} = {value!r} should be one of "
                        + ", ".join(values))


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
