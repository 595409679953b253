"""Numbers of many answers: a percentage, how far it may be off, and its parts."""
import math
from collections import defaultdict
from collections.abc import Iterable


def percent(right: Iterable[float]) -> float:
    """Of truth values or scores in 0..1; multiplied last, as the official scorers do."""
    right = list(right)
    return sum(right) / len(right) * 100 if right else 0.0


def margin(*parts: list[float]) -> float:
    """Half the width of the 95% interval of a percentage, or of a sum of some: 1.96 standard
    errors.

    parts: of each mean in the sum, its values in 0..1, one for everything that was drawn
    independently: a question, in MME a picture with its two, in MMBench a question with its
    rotations. (Questions about one picture are not quite independent, and of a few dozen nothing
    should be concluded.)
    """
    def variance(values):
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)

    return 1.96 * 100 * math.sqrt(sum(variance(values) / len(values) for values in parts))


def by(groups: Iterable[str], right: Iterable[float]) -> dict[str, float]:
    """Percent right of each group, in the order of the names."""
    parts = defaultdict(list)
    for group, ok in zip(groups, right, strict=True):
        parts[group].append(ok)
    return {group: percent(parts[group]) for group in sorted(parts)}
