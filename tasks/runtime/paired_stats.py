"""Paired statistics of two models on the same dataset, in which each answer is correct or not.

Answers that are the same cancel out: only answers in which the models differ matter, so the standard error of a
difference is far smaller than that of either accuracy.
"""

import math
from collections.abc import Iterable

Pairs = dict[str, int]


def count_pairs(outcomes: Iterable[tuple[bool, bool]]) -> Pairs:
    """Return the number of answers that are correct in {"both", "first", "second", "neither"}."""
    pairs = {"both": 0, "first": 0, "second": 0, "neither": 0}
    for first, second in outcomes:
        pairs[("both" if second else "first") if first else ("second" if second else "neither")] += 1
    return pairs


def share_difference(pairs: Pairs) -> tuple[float, float]:
    """Return (accuracy of first minus accuracy of second, its standard error), as fractions.

    For the standard error, half an answer is added to each of the four counts, so that models that never differ on a
    small dataset are not considered equal: A. Agresti and Y. Min, Simple improved confidence intervals for comparing
    matched proportions, Statistics in Medicine 24 (2005), 729-740.
    """
    _, first, second, total = _adjust_counts(pairs)
    variance = (first + second - (first - second) ** 2 / total) / total**2
    return (pairs["first"] - pairs["second"]) / sum(pairs.values()), math.sqrt(variance)


def share_ratio(pairs: Pairs) -> tuple[float, float]:
    """Return (accuracy of second over accuracy of first, its standard error); the ratio is 1 if the first is zero.

    The standard error is the delta method's, on the adjusted counts above.
    """
    both, first, second, _ = _adjust_counts(pairs)
    ratio = (both + second) / (both + first)
    # The sum of the squares of second - ratio * first, whose mean is zero.
    square = both * (1 - ratio) ** 2 + first * ratio**2 + second
    correct = pairs["both"] + pairs["first"]
    return (pairs["both"] + pairs["second"]) / correct if correct else 1.0, math.sqrt(square) / (both + first)


def confidence(margin: float, stderr: float) -> float:
    """Return the probability that the true value is within a limit whose margin is estimated (normal distribution)."""
    return 0.5 * math.erfc(-margin / (stderr * math.sqrt(2)))


def _adjust_counts(pairs: Pairs) -> tuple[float, float, float, float]:
    return pairs["both"] + 0.5, pairs["first"] + 0.5, pairs["second"] + 0.5, sum(pairs.values()) + 2
