"""The tile of one key/value head in VMEM, and the order of a step's work.

Scores are ``[keys, rows]``. The maximum and the sum of a row are then taken down the sublanes,
element by element, and vectors over rows (bounds, LSE, the state of the softmax) fill the lanes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from axattn.kernels._tpu.flash.grid import BlockIndices, GridScalars, TpuFlashGrid
from axattn.kernels._tpu.layout import transpose_to_column


@dataclasses.dataclass(frozen=True)
class FlashTile:
    """A `_scores.ScoreBlock` of one key/value head of a step, read from the refs."""

    grid: TpuFlashGrid
    refs: Mapping[str, Any]
    at: BlockIndices
    head: jax.Array | int
    words: Any  # of dropout's key, in scalar memory

    def has(self, name: str) -> bool:
        return name in self.refs

    def load_rows(self, name: str) -> jax.Array:
        """Load a vector over rows, ``[1, rows]``."""
        ref = self.refs[name]
        return ref[0, self.head if ref.shape[1] > 1 else 0, 0]

    def load_keys(self, name: str) -> jax.Array:
        """Load a vector over keys, ``[keys, 1]``, or ``[keys, rows]`` if query heads differ."""
        ref, grid = self.refs[name], self.grid
        if ref.shape[1] == 1:
            return transpose_to_column(ref[0, 0, 0])
        first = self.head * grid.problem.group
        each = (transpose_to_column(ref[0, first + g, 0]) for g in range(grid.problem.group))
        shape = (grid.block_kv, grid.block_q)
        return jnp.concatenate([jnp.broadcast_to(vector, shape) for vector in each], axis=1)

    def load_tile(self, name: str) -> jax.Array:
        """Load an array over queries and keys, ``[keys, rows]``."""
        ref, group = self.refs[name], self.grid.problem.group
        dtype = jnp.float32 if jnp.issubdtype(ref.dtype, jnp.floating) else jnp.int32

        def load_head(n):
            return ref[0, n].astype(dtype).T

        if ref.shape[1] == 1:
            return jnp.concatenate([load_head(0)] * group, axis=1)
        first = self.head * group
        return jnp.concatenate([load_head(first + g) for g in range(group)], axis=1)

    def make_slots(self) -> jax.Array:
        """Return the key slots, ``[keys, rows]``."""
        shape = (self.grid.block_kv, self.grid.rows)
        return self.at.kv * self.grid.block_kv + lax.broadcasted_iota(jnp.int32, shape, 0)

    def load_dropout_words(self) -> tuple[jax.Array, jax.Array]:
        return self.words[0], self.words[1]


# A block of queries is [block_q, heads, size], or [heads, block_q, size] if heads are first in HBM.


def pack_queries(grid: TpuFlashGrid, block: jax.Array) -> jax.Array:
    """Return a block of queries as rows, ``[kv_heads, rows, size]``."""
    by_head = block if grid.heads_first else jnp.swapaxes(block, 0, 1)
    return by_head.reshape(grid.kv_heads, grid.rows, block.shape[-1])


def unpack_queries(grid: TpuFlashGrid, rows: jax.Array) -> jax.Array:
    """Return ``[kv_heads, size, rows]`` as a block of queries."""
    size = rows.shape[1]
    by_head = jnp.swapaxes(rows, 1, 2).reshape(grid.heads, grid.block_q, size)
    return by_head if grid.heads_first else jnp.swapaxes(by_head, 0, 1)


def zero_missing_queries(grid: TpuFlashGrid, block: jax.Array, q: jax.Array) -> jax.Array:
    """Return block ``q`` of queries with zeros after the last query."""
    if grid.problem.q_len % grid.block_q == 0:
        return block
    tokens = lax.broadcasted_iota(jnp.int32, block.shape, 1 if grid.heads_first else 0)
    exists = q * grid.block_q + tokens < grid.problem.q_len
    return jnp.where(exists, block, jnp.zeros((), block.dtype))


def locate_step(grid: TpuFlashGrid, scalars: GridScalars) -> BlockIndices:
    """Return the blocks of this step of the grid."""
    b, h, tile, step = (pl.program_id(axis) for axis in range(4))
    return grid.locate_blocks(b, h, tile, step, scalars)


def run_on_block(grid: TpuFlashGrid, scalars: GridScalars) -> Callable:
    """Decorate ``compute(at, *, partial)`` to run it now, unless the step is idle."""

    def run(compute: Callable) -> None:
        step, at = pl.program_id(3), locate_step(grid, scalars)
        blocks = grid.load_blocks(pl.program_id(0), pl.program_id(2), scalars)
        pl.when(step < blocks.full)(lambda: compute(at, partial=False))
        is_partial = (step >= blocks.full) & (step < blocks.total)
        pl.when(is_partial)(lambda: compute(at, partial=True))

    return run


def run_on_heads(grid: TpuFlashGrid) -> Callable:
    """Decorate ``compute(head)`` to run it now, for each key/value head of the step."""

    def run(compute: Callable) -> None:
        if grid.kv_heads == 1:
            compute(0)
            return

        def run_on_head(head, carry):
            compute(head)
            return carry

        lax.fori_loop(0, grid.kv_heads, run_on_head, 0)

    return run
