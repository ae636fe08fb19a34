"""Comparing functions in one process: interleaved runs, ratios of neighbours."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

LONG_SAMPLE = 20e-3  # seconds


@dataclasses.dataclass(frozen=True)
class Paired:
    """What :func:`compare` measured; times are seconds per call."""

    seconds: Mapping[str, tuple[float, ...]]  # one per round, rounds in the same order for all

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """Median over rounds of ``slow``'s time / ``fast``'s: above 1, ``fast`` is faster."""
        return statistics.median(self.ratios(slow, fast))

    def ratios(self, slow: str, fast: str) -> list[float]:
        """``slow``'s time / ``fast``'s, of each round."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return [a / b for a, b in pairs]


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 1.0,
    min_rounds: int = 3,
    max_rounds: int = 50,
    min_sample: float = 2e-3,
    least_of: int = 1,
    is_settled: Callable[[Paired], bool] = lambda measured: False,
) -> Paired:
    """Times compiled functions in turn, round after round.

    A drift of the machine (frequency, neighbours) hits neighbouring runs alike and cancels in
    their ratio, which is why google-benchmark's one-after-the-other is not used here.

    Args:
      functions: name -> function without arguments that returns arrays; called once before, so
        that compilation stays outside.
      seconds: stop after about this long, but not before ``min_rounds``.
      min_sample: calls shorter than this many seconds are repeated within a round.
      least_of: a round's time is the least of so many samples; of one where a call takes
        `LONG_SAMPLE` or longer, which averages by itself.
      is_settled: asked after each round; True ends it, whatever ``min_rounds`` is.
    """
    calls, samples = {}, {}
    for name, fn in functions.items():
        _seconds(fn, 1)  # compilation, first touch of memory
        once = _seconds(fn, 1)
        calls[name] = max(1, int(min_sample / max(once, 1e-9)))
        samples[name] = least_of if once < LONG_SAMPLE else 1
    found: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - start > seconds:
            break
        # Every other round backwards: whoever goes first finds the caches warm from itself.
        for name in names if done % 2 == 0 else names[::-1]:
            # Untimed: what another function freed (gigabytes, for full logits) goes back to the
            # system during the call after it, which took twice as long for that.
            _seconds(functions[name], 1)
            times = [_seconds(functions[name], calls[name]) for _ in range(samples[name])]
            found[name].append(min(times))
        measured = Paired({name: tuple(times) for name, times in found.items()})
        if is_settled(measured):
            break
    return measured


def _seconds(fn: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(fn())
    return (time.perf_counter() - start) / calls
