"""A pipeline through shared memory: one producer warpgroup, several stages, consumer warpgroups."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from axattn.kernels._hopper.primitives import rem


class Pipeline(NamedTuple):
    """``stages`` sets of buffers; step n of the loop uses set n % stages.

    For each step the producer calls `acquire` and starts copies that arrive at `full` (or calls
    `copy`, which does both); the consumers call `wait`, read, and call `release`. At the end the
    producer calls `drain`: a kernel that ends before a barrier completes has undefined behavior.
    """

    buffers: Any  # refs [stages, ...]
    full: Any
    empty: Any

    @staticmethod
    def declare(stages: int, buffers: Any, *, copies: int = 1, consumers: int) -> Pipeline:
        """Return what to allocate: ``copies`` fill a set, ``consumers`` warpgroups release it."""
        return Pipeline(
            buffers,
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        )

    @property
    def stages(self) -> int:
        return self.full.shape[0]

    def select(self, slot: jax.Array) -> Any:
        """Return the buffers of one set."""
        return jax.tree.map(lambda ref: ref.at[slot], self.buffers)

    # ---- producer -----------------------------------------------------------------------------

    def acquire(self, n: jax.Array) -> jax.Array:
        """Return the set to fill for step n, once its last readers have released it."""
        slot = rem(n, self.stages)

        @pl.when(n >= self.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        return slot

    def commit(self, n: jax.Array) -> None:
        """Say that step n is filled, where a warpgroup wrote it and no copy did."""
        plgpu.barrier_arrive(self.full.at[rem(n, self.stages)])

    def copy(self, n: jax.Array, sources: Any, rows: Any = None) -> None:
        """Start the copies from HBM that fill step n, once its set is free.

        ``sources`` has the structure of the buffers. With ``rows``, only those rows of the buffers
        are filled.
        """
        slot = self.acquire(n)
        full = self.full.at[slot]

        def start(buffer, source):
            buffer = buffer if rows is None else buffer.at[rows]
            plgpu.copy_gmem_to_smem(source, buffer, full)

        jax.tree.map(start, self.select(slot), sources)

    def drain(self, steps: jax.Array) -> None:
        """Wait until all of ``steps`` steps have been released."""

        def wait(n, _):
            plgpu.barrier_wait(self.empty.at[rem(n, self.stages)])

        lax.fori_loop(jnp.maximum(steps - self.stages, 0), steps, wait, None)

    # ---- consumer -----------------------------------------------------------------------------

    def wait(self, n: jax.Array) -> Any:
        """Return the buffers of step n, once they are filled."""
        slot = rem(n, self.stages)
        plgpu.barrier_wait(self.full.at[slot])
        return self.select(slot)

    def release(self, n: jax.Array) -> None:
        plgpu.barrier_arrive(self.empty.at[rem(n, self.stages)])
