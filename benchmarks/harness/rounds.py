"""Timing several functions in turn, on the device's clock where it has one.

A drift of the machine (clocks, heat, neighbours) hits the samples of one round alike and cancels in
their ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness import device_time, noise

Timer = Callable[[], float]


def timer(step: Callable[[], Any], platform: str, *, kernels: str = "") -> tuple[Timer, str | None]:
    """Seconds of one ``step``, which blocks: of its kernels on a GPU (cold L2), else of the wall.

    The note says why it is the wall's where one would expect otherwise.
    """
    cold, note = device_time.cold_timer(step, platform, kernels=kernels)
    if cold is not None:
        return cold, None

    def wall() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return wall, note


def samples(
    timers: Mapping[str, Timer], *, seconds: float, least: int = 3, most: int = 30
) -> Iterator[tuple[str, float]]:
    """(name, seconds) of one call after the other: each name once per round.

    Goes on for about ``seconds`` per name, but for ``least`` rounds at least. Every other round is
    backwards, so that nobody always follows the same neighbour.
    """
    names, start = list(timers), time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > seconds * len(names):
            return
        for name in names if done % 2 == 0 else names[::-1]:
            yield name, timers[name]()


def ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float | None, bool]:
    """Median over rounds of one's time / the other's, and whether it is noise.

    None where they share no round.
    """
    ratios = [a / b for a, b in zip(slow, fast, strict=False)]
    return (statistics.median(ratios) if ratios else None), noise.of_ratios(ratios)
