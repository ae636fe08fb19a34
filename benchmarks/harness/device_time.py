"""Time on a GPU, by CUPTI, with a cold L2 cache. Not yet run on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# More than any L2 (H100 50 MB, B200 126 MB), read and written.
_FLUSH_BYTES = 256 << 20


class _Flushed:
    """A step behind a sweep through more memory than L2 holds.

    Mosaic's profiler calls a jitted function as it is and would trace any other; `trace` and
    `lower` are what it knows one by (`jax.stages.Wrapped`).
    """

    def __init__(self, flush: Callable[[], Any], step: Callable[[], Any]):
        self.flush, self.step = flush, step

    def __call__(self):
        # Nothing of the flush may run beside the step.
        jax.block_until_ready(self.flush())
        return self.step()

    def trace(self, *args, **kwargs):
        raise NotImplementedError

    def lower(self, *args, **kwargs):
        raise NotImplementedError


@functools.cache
def _sweep(size: int) -> Callable[[], Any]:
    """Reads and writes ``size`` bytes each; one buffer for all timers."""
    buffer = jax.random.normal(jax.random.key(0), (size // 4,), jnp.float32)
    return functools.partial(jax.jit(lambda x: x * 1.0001), buffer)


def cold_timer(
    step: Callable[[], Any], platform: str, *, kernels: str = ""
) -> tuple[Callable[[], float] | None, str | None]:
    """How to time ``step`` on the device.

    Args:
      step: runs compiled programs; blocks until the device is done.
      platform: JAX's name of the backend.
      kernels: count those with this in their names alone.

    Returns:
      A function that runs ``step`` (twice: once to warm up) and returns the seconds that its
      kernels took, without launches and gaps, and None; or None, and a note saying why only the
      wall clock is left (no note where no one would expect otherwise).
    """
    if platform != "gpu":
        return None, None
    try:
        from jax.experimental.mosaic.gpu import profiler

        flush = _sweep(_FLUSH_BYTES)
        _, flushing = profiler.measure(_Flushed(flush, lambda: None), aggregate=False)()
        names = [name for name, _ in flushing or ()]
        if not names:
            return None, "wall time: CUPTI saw no kernels"
        timed = profiler.measure(_Flushed(flush, step), aggregate=False)

        def seconds() -> float:
            _, launched = timed()
            # Kernels come in the order of their launches: the sweep first.
            if [name for name, _ in launched[: len(names)]] != names:
                raise RuntimeError("the L2 flush is not what ran first")
            times = [time for name, time in launched[len(names) :] if kernels in name]
            if kernels and not times:
                raise RuntimeError(f"no kernel is called {kernels}")
            return 1e-3 * sum(times)

        seconds()
    except Exception as error:  # whatever a profiler may lack: drivers, rights, symbols
        return None, f"wall time: CUPTI is not available ({type(error).__name__}: {error})"
    return seconds, None
