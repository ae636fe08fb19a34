"""Whether two times differ by more than they spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

MARK = "~"
LEGEND = f"{MARK} the times spread by more than they differ."


def of_times(
    time: float | None, deviation: float | None, other: float | None, others: float | None
) -> bool:
    """Whether two medians are closer than the standard deviation of their difference.

    Args:
      time, other: the medians; False where one is not known.
      deviation, others: standard deviations of what they are medians of.
    """
    if time is None or other is None:
        return False
    return math.hypot(deviation or 0.0, others or 0.0) > abs(time - other)


def of_ratios(ratios: Sequence[float], other: float = 1.0) -> bool:
    """Whether the median of ratios, of a round each, is closer to ``other`` than they spread.

    The spread is that from the first quartile to the third: a round that something else fell into
    is no reason to doubt all.
    """
    if len(ratios) < 2:
        return False
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return high - low > abs(median - other)


def is_above(ratios: Sequence[float], bound: float, *, risk: float = 0.05) -> bool:
    """Whether the median of ratios, of a round each, is above ``bound`` beyond noise: a sign test.

    Were the true median the bound, so many rounds above it would come with a probability of
    ``risk`` at most. Takes five rounds at least.
    """
    above = sum(ratio > bound for ratio in ratios)
    ways = sum(math.comb(len(ratios), count) for count in range(above, len(ratios) + 1))
    return ways <= risk * 2 ** len(ratios)
