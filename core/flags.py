"""The command line: every number has its range where it is parsed, and what is wrong with a flag is
one line.

    p = Parser(description=__doc__)
    p.add_argument("--n", type=whole(1, 9))        # --n 0: should be a whole number from 1 to 9
"""
import argparse
import math
import sys
from collections.abc import Callable

from core.common import UserError

MANY = 10 ** 9                 # more steps, records or tokens than anybody waits for


class Parser(argparse.ArgumentParser):
    """argparse's, but what it complains of is a UserError: one line, no usage before it. A
    description of several lines keeps them."""

    def __init__(self, description: str | None = None, **more):
        raw = "\n" in (description or "")
        kind = argparse.RawDescriptionHelpFormatter if raw else argparse.HelpFormatter
        super().__init__(description=description, formatter_class=kind, **more)

    def parse_known_args(self, args: list[str] | None = None, namespace=None):
        """argparse takes "--n=--" for --n with an empty list as its value."""
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"{shown(word[:-3])}: expected one argument")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        """message: "argument --n: VALUE: should be ..." by the types below, or argparse's own."""
        message = " ".join(message.split()).removeprefix("argument ")
        flag, _, rest = message.partition(": ")
        if ": should be " in rest:
            raise UserError(f"{flag} {rest}")
        raise UserError(f"{message} ({self.prog} -h lists the flags)")


def shown(text: str, most: int = 60) -> str:
    """Foreign text for a message: on one line, not too long, and fit for any terminal."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= most else text[:most] + "..."


def number(text: str, read: Callable[[str], float], good: Callable[[float], bool], should: str):
    """What argparse's types are made of: the number that a text is. should: be what."""
    try:
        value = read(text)
    except ValueError:                               # also more digits than Python converts
        value = math.nan
    if not good(value):                              # nothing compares with nan
        raise argparse.ArgumentTypeError(f"{shown(text)}: should be {should}")
    return value


def whole(low: int, high: int) -> Callable[[str], int]:
    """The argparse type of the whole numbers from low to high."""
    def read(text: str) -> int:
        return number(text, int, good, f"a whole number from {low} to {high}")

    def good(value: int) -> bool:
        return low <= value <= high

    return read


def real(low: float, high: float) -> Callable[[str], float]:
    """The argparse type of the numbers from low to high."""
    def read(text: str) -> float:
        return number(text, float, good, f"a number from {low:g} to {high:g}")

    def good(value: float) -> bool:
        return low <= value <= high

    return read


def temperature(text: str) -> float:
    """0, or enough that logits can be divided by it in float32."""
    def good(value: float) -> bool:
        return value == 0 or 1e-6 <= value <= 100

    return number(text, float, good, "a number from 0 to 100, and 1e-06 or more if it isn't 0")


share = real(0, 1)
top_p = real(1e-6, 1)
seed = whole(0, 2 ** 63 - 1)                         # what torch takes
threads = whole(0, 1024)
workers = whole(0, 512)
batch = whole(1, 65_536)
