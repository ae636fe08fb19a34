"""How fast this machine's memory is: the floor under a decoding step."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks.harness import environment, inputs, rounds


def bytes_per_second(size: int = 512 << 20, repetitions: int = 5) -> float:
    """Best rate at which an array of ``size`` bytes is scaled in place: read plus written.

    In place, because fresh pages cost a CPU more than the copy. The best, because it is a bound.
    """
    some = inputs.random_like(jax.ShapeDtypeStruct((1 << 20,), jnp.float32))
    array = jnp.resize(some, size // 4)
    scale = jax.jit(lambda x: x * 1.0001, donate_argnums=0)
    best = float("inf")
    for _ in range(repetitions + 1):  # the first compiles, and is never the best
        start = time.perf_counter()
        array = jax.block_until_ready(scale(array))
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


@dataclasses.dataclass(frozen=True)
class Copy:
    """Bytes per second of a kernel that reads ``size`` bytes and writes as many; both count.

    A job for a worker; timed as kernels are (`rounds.timer`). It scales what it copies: a bare copy
    is no kernel, and none in the eyes of a profiler of kernels.
    """

    size: int

    def __call__(self) -> Iterator[float]:
        environment.choose_backend()
        struct = jax.ShapeDtypeStruct((self.size // 4,), jnp.float32)
        arrays = itertools.cycle([inputs.normal_on_device(struct, seed) for seed in range(3)])
        scale = jax.jit(lambda x: x * 1.0001)
        timer, _ = rounds.timer(
            lambda: jax.block_until_ready(scale(next(arrays))), jax.default_backend()
        )
        times = [seconds for _, seconds in rounds.samples({"": timer}, seconds=0.5)]
        yield 2 * self.size / statistics.median(times)
