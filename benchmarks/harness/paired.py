"""Comparing functions, here and in other processes: interleaved runs, ratios of neighbours."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

LONG_SAMPLE = 20e-3  # seconds

# Takes a number of calls and of samples, and returns seconds per call of the fastest sample. Runs
# one call before, which does not count: what another function freed (gigabytes, for full logits)
# goes back to the system during the call after it, which took twice as long for that.
Timer = Callable[[int, int], float]


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
    elsewhere: Mapping[str, Timer] | None = None,
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
      elsewhere: more of them, by what times them in a process of their own.
      seconds: stop after about this long, but not before ``min_rounds``.
      min_sample: calls shorter than this many seconds are repeated within a round.
      least_of: a round's time is the least of so many samples; of one where a call takes
        `LONG_SAMPLE` or longer, which averages by itself.
      is_settled: asked after each round; True ends it, whatever ``min_rounds`` is.
    """
    timers = {name: functools.partial(time_calls, fn) for name, fn in functions.items()}
    timers |= elsewhere or {}
    calls, samples = {}, {}
    for name, timer in timers.items():
        once = timer(1, 1)
        calls[name] = max(1, int(min_sample / max(once, 1e-9)))
        samples[name] = least_of if once < LONG_SAMPLE else 1
    found: dict[str, list[float]] = {name: [] for name in timers}
    names = list(timers)
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - start > seconds:
            break
        # Every other round backwards: whoever goes first finds the caches warm from itself.
        for name in names if done % 2 == 0 else names[::-1]:
            found[name].append(timers[name](calls[name], samples[name]))
        measured = Paired({name: tuple(times) for name, times in found.items()})
        if is_settled(measured):
            break
    return measured


def time_calls(fn: Callable[[], Any], calls: int, samples: int) -> float:
    """The `Timer` of a function of this process, given the function."""
    jax.block_until_ready(fn())
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(fn())
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def wait_until_idle(interval: float = 2e-3) -> None:
    """Returns when no thread of this process computes: those of pools spin on after their work."""
    busy = True
    while busy:
        before = time.process_time()
        time.sleep(interval)
        busy = time.process_time() - before > interval / 10
