"""Fields of configs: what each may be, and the one check of them all.

A config.json is foreign text. The table that it is held against is a dataclass's annotations, or a
dict of such: a name, its type with its range, and beside it what it means.

    hidden_size: Width                      # Annotated[int, Range(1, 2 ** 17)]
    order: Annotated[str, ORDERS]           # one of these
    eos_token_id: Id | list[Id] | None      # any of several

Sizes have bounds far beyond those of any model, so that a wrong one is named before anything is
built. A bool is no number, and neither is NaN or an infinity.
"""
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from reprlib import Repr
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from core.common import UserError

short = Repr()
short.maxstring = short.maxother = short.maxlong = 60


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both of them in it."""
    low: float
    high: float


Count = Annotated[int, Range(1, 2 ** 27)]          # of positions, for instance
Width = Annotated[int, Range(1, 2 ** 17)]          # of features
Depth = Annotated[int, Range(1, 1000)]
Heads = Annotated[int, Range(1, 4096)]
MOST_TOKENS = 2 ** 22
Vocabulary = Annotated[int, Range(1, MOST_TOKENS)]
Id = Annotated[int, Range(0, MOST_TOKENS - 1)]     # of a token
Epsilon = Annotated[float, Range(1e-30, 1)]        # of a norm
Scale = Annotated[float, Range(1e-6, 1e15)]        # a positive number

KINDS = {bool: "true or false", str: "a text", dict: "an object", list: "a list", NoneType: "null",
         int: "a whole number", float: "a number"}


def shown(value: Any) -> str:
    """A foreign value for a message: on one line, and not too long."""
    return short.repr(value)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of this type and in its range."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, limit = inner
        if not fits(value, kind):
            return False
        return limit.low <= value <= limit.high if isinstance(limit, Range) else value in limit
    if origin in (Union, UnionType):
        return any(fits(value, kind) for kind in inner)
    if origin is list:
        return type(value) is list and all(fits(item, inner[0]) for item in value)
    if origin is dict:                               # of JSON, so its keys are texts
        return type(value) is dict and all(fits(item, inner[1]) for item in value.values())
    if hint is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) is hint


def wanted(hint: Any) -> str:
    """A type and its range in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, limit = inner
        if isinstance(limit, Range):
            return f"{KINDS[kind]} from {limit.low:.15g} to {limit.high:.15g}"
        return "one of " + ", ".join(limit)
    if origin in (Union, UnionType):
        return " or ".join(map(wanted, inner))
    if origin is list:
        return f"a list of {wanted(inner[0])}"
    if origin is dict:
        return f"an object of {wanted(inner[1])}"
    return KINDS[hint]


def check(values: Mapping[str, Any], table: Mapping[str, Any], what: str) -> None:
    """UserError for the first value that isn't what the table says; one that is absent counts as
    null."""
    for name, hint in table.items():
        value = values.get(name)
        if not fits(value, hint):
            raise UserError(f"{what}: {name} = {shown(value)} should be {wanted(hint)}")


def title(config: Any) -> str:
    """What a config is of, in messages: "LLaVA" of a LLaVAConfig."""
    return type(config).__name__.removesuffix("Config")


@cache
def table_of(cls: type) -> dict[str, Any]:
    """The table that a dataclass's annotations are."""
    return get_type_hints(cls, include_extras=True)


def check_config(config: Any) -> None:
    """`check` of a dataclass against its own annotations: for its __post_init__."""
    check(vars(config), table_of(type(config)), title(config))


def read(cls: type, given: Any, where: str, defaults: Mapping[str, Any] | None = None) -> Any:
    """A config of this dataclass from a JSON object. Keys that it doesn't know don't concern it.

    defaults: for keys that are left out, in place of the dataclass's own. UserError naming `where`.
    """
    if type(given) is not dict:
        raise UserError(f"{where}: {shown(given)} should be a JSON object, the settings of a "
                        f"{cls.__name__.removesuffix('Config')}")
    values = {}
    for name, field in cls.__dataclass_fields__.items():
        default = None if field.default is MISSING else field.default
        values[name] = given.get(name, (defaults or {}).get(name, default))
    try:
        return cls(**values)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
