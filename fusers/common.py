"""TODO fusers/common.py"""
from torch import Tensor

from core.common import UserError


def whole(config, **least) -> None:
    """UserError for a setting that isn't a whole number, or is less than it may be."""
    for name, low in least.items():
        if type(value := getattr(config, name)) is not int or value < low:
            raise UserError(
                f"{type(config).__name__.removesuffix('Config')}: {name} = {value!r} should be a whole "
                f"number, {low} or more")


def one_of(config, name: str, values: tuple) -> None:
    if (value := getattr(config, name)) not in values:
        raise UserError(
            f"{type(config).__name__.removesuffix('Config')}: {name} = {value!r} should be one of "
            + ", ".join(values))


def at(layer: int, n_layers: int) -> int:
    """What layer `layer` of 24 is in a tower of n_layers: the one at the same share of its depth,
    halves up."""
    return (layer * n_layers + 12) // 24


def average(hidden: Tensor, start: int, stop: int) -> Tensor:
    """The mean of layers start..stop-1, patches only, (B, N, d)."""
    return hidden[start:stop, :, 1:].mean(0)
