"""How fast this machine's memory is: the floor under a decoding step."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from benchmarks.harness import inputs


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
