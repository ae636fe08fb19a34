"""A few rows of a product that have every two values of it together at least once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any


def choose(
    factors: Sequence[Sequence[Hashable]], cost: Callable[[tuple[Any, ...]], float]
) -> list[tuple[Any, ...]]:
    """Chooses rows (a value of each factor) in which all pairs of values of two factors occur.

    Greedy: the next row is the one with the most pairs that no row has yet for its ``cost``. The
    same rows every time.
    """

    def pairs(row: tuple[Any, ...]) -> set[Any]:
        # Of a single factor, which has no pairs, the values themselves.
        return set(itertools.combinations(enumerate(row), min(2, len(row))))

    costs = {row: cost(row) for row in itertools.product(*factors)}
    new = {row: pairs(row) for row in costs}  # what each would add
    chosen = []
    while new:
        best = max(new, key=lambda row: len(new[row]) / costs[row])
        chosen.append(best)
        covered = new[best]
        new = {row: left for row, rest in new.items() if (left := rest - covered)}
    return chosen
