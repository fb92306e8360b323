"""Statistics of two columns that answered the same questions, each rightly or wrongly.

What both have in common cancels out: only questions on which they differ tell them apart, and the standard error of a
difference is far smaller than that of either column.
"""

import math
from collections.abc import Iterable

Pairs = dict[str, int]


def count_pairs(outcomes: Iterable[tuple[bool, bool]]) -> Pairs:
    """Returns how many questions there are of which it is true of {"both", "first", "second", "neither"}."""
    pairs = {"both": 0, "first": 0, "second": 0, "neither": 0}
    for first, second in outcomes:
        pairs[("both" if second else "first") if first else ("second" if second else "neither")] += 1
    return pairs


def share_difference(pairs: Pairs) -> tuple[float, float]:
    """Returns (first's share minus second's, its standard error), as fractions.

    Half a question is added to each of the four counts for the standard error, so that columns that never differ on
    few questions do not pass for equal: A. Agresti and Y. Min, Simple improved confidence intervals for comparing
    matched proportions, Statistics in Medicine 24 (2005), 729-740.
    """
    _, first, second, total = _adjusted(pairs)
    variance = (first + second - (first - second) ** 2 / total) / total**2
    return (pairs["first"] - pairs["second"]) / sum(pairs.values()), math.sqrt(variance)


def share_ratio(pairs: Pairs) -> tuple[float, float]:
    """Returns (second's share over first's, its standard error), as fractions; (1, …) if first's is zero.

    The standard error is the delta method's, on the adjusted counts above.
    """
    both, first, second, _ = _adjusted(pairs)
    ratio = (both + second) / (both + first)
    # Of each question second - ratio * first, whose mean is zero.
    square = both * (1 - ratio) ** 2 + first * ratio**2 + second
    of_first = pairs["both"] + pairs["first"]
    return (pairs["both"] + pairs["second"]) / of_first if of_first else 1.0, math.sqrt(square) / (both + first)


def confidence(margin: float, stderr: float) -> float:
    """Returns the probability that a value is within a limit that its estimate keeps by `margin`, by the normal law."""
    return 0.5 * math.erfc(-margin / (stderr * math.sqrt(2)))


def _adjusted(pairs: Pairs) -> tuple[float, float, float, float]:
    return pairs["both"] + 0.5, pairs["first"] + 0.5, pairs["second"] + 0.5, sum(pairs.values()) + 2
