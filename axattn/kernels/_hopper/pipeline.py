"""A ring of shared-memory buffers between one producer warpgroup and the ones that compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from axattn.kernels._hopper.primitives import rem


class Ring(NamedTuple):
    """``stages`` sets of buffers; step n of the loop uses set n % stages.

    The producer fills (`acquire`, then copies that arrive at `full`), the consumers read between
    `wait` and `release`. Who fills also waits for the last release (`drain`): a barrier that
    completes unseen would end the kernel in an undefined state.
    """

    buffers: Any  # refs [stages, ...]
    full: Any
    free: Any

    @staticmethod
    def scratch(stages: int, buffers: Any, *, copies: int = 1, consumers: int) -> Ring:
        """What to allocate: ``copies`` arrivals fill a set, ``consumers`` warpgroups free it."""
        return Ring(
            buffers,
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        )

    @property
    def stages(self) -> int:
        return self.full.shape[0]

    def at(self, slot: jax.Array) -> Any:
        return jax.tree.map(lambda ref: ref.at[slot], self.buffers)

    def acquire(self, n: jax.Array) -> jax.Array:
        """The set to fill for step n, once its last readers are done."""
        slot = rem(n, self.stages)

        @pl.when(n >= self.stages)
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        return slot

    def fill(self, n: jax.Array) -> None:
        """Says that step n is filled, where a warpgroup did that and no copy."""
        plgpu.barrier_arrive(self.full.at[rem(n, self.stages)])

    def copy(self, n: jax.Array, sources: Any, part: Any = None) -> None:
        """Has step n filled from HBM; ``sources`` has the structure of the buffers.

        With ``part``, only those rows of the buffers are filled.
        """
        slot = self.acquire(n)
        full = self.full.at[slot]

        def copy(buffer, source):
            buffer = buffer if part is None else buffer.at[part]
            plgpu.copy_gmem_to_smem(source, buffer, full)

        jax.tree.map(copy, self.at(slot), sources)

    def drain(self, steps: jax.Array) -> None:
        def step(n, _):
            plgpu.barrier_wait(self.free.at[rem(n, self.stages)])

        lax.fori_loop(jnp.maximum(steps - self.stages, 0), steps, step, None)

    def wait(self, n: jax.Array) -> Any:
        """The buffers of step n, filled."""
        slot = rem(n, self.stages)
        plgpu.barrier_wait(self.full.at[slot])
        return self.at(slot)

    def release(self, n: jax.Array) -> None:
        plgpu.barrier_arrive(self.free.at[rem(n, self.stages)])


def produce(
    rings: Mapping[str, Ring | None],
    steps: jax.Array,
    sources: Callable[[jax.Array], Callable[[str], Any]],
) -> None:
    """Fills the rings step by step, in their order, with ``sources(n)(name)`` in HBM."""
    own = {name: ring for name, ring in rings.items() if ring is not None}

    def step(n, _):
        source = sources(n)
        for name, ring in own.items():
            ring.copy(n, source(name))

    lax.fori_loop(0, steps, step, None)
    for ring in own.values():
        ring.drain(steps)
