"""The tile of some key/value heads of a block of keys in VMEM.

Scores are ``[heads, rows, keys]``: the few rows on the sublanes, the keys on the lanes, like their
scales. Vectors over rows are ``[heads, rows, 1]``, vectors over keys ``[heads, 1, keys]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from axattn._stored import UNUSED_POSITION
from axattn.kernels._tpu.cached.grid import CachedGrid
from axattn.kernels._tpu.layout import LANES, transpose_to_column


@dataclasses.dataclass(frozen=True)
class CachedTile:
    """A `_scores.ScoreBlock` of some key/value heads of a step."""

    grid: CachedGrid
    rows: Mapping[str, Any]  # vectors over rows, [1, K or 1, 1, 1, lanes]
    buffers: Mapping[str, Any]  # [2, heads, ...]
    slot: Any  # the buffer that is full
    start: Any  # the first key slot
    head: Any  # the first of the heads

    def has(self, name: str) -> bool:
        return name in self.rows or name in self.buffers

    def load_rows(self, name: str) -> jax.Array:
        """Load a vector over rows, ``[heads or 1, rows, 1]``."""
        ref = self.rows[name]
        return transpose_to_rows(ref[0, self._select_heads(ref.shape[1]), 0], self.grid.rows)

    def load_keys(self, name: str) -> jax.Array:
        """Load a vector over keys, ``[heads or 1, 1, keys]``."""
        ref = self.buffers[name]
        return ref[self.slot, self._select_heads(ref.shape[1])][:, None, :]

    def load_tile(self, name: str) -> jax.Array:
        """Load an array over queries and keys, ``[heads or 1, rows, keys]``."""
        ref = self.buffers[name]
        tile = ref[self.slot, self._select_heads(ref.shape[1])]
        return tile if tile.dtype.itemsize == 4 else tile.astype(jnp.int32)

    def make_slots(self) -> jax.Array:
        """Return the key slots, ``[1, 1, keys]``."""
        shape = (1, 1, self.grid.block_kv)
        return self.start + lax.broadcasted_iota(jnp.int32, shape, 2)

    def load_dropout_words(self):
        raise NotImplementedError("dropout over a cache")

    def find_used_slots(self, end: Any, axis: int) -> jax.Array:
        """Return which slots hold a token, along ``axis``: ``[1, keys, 1]`` or ``[1, 1, keys]``.

        No slot from ``end`` on does.
        """
        shape = tuple(self.grid.block_kv if i == axis else 1 for i in range(3))
        used = self.start + lax.broadcasted_iota(jnp.int32, shape, axis) < end
        if self.has("kv_positions"):
            positions = self.load_keys("kv_positions")
            used &= (
                transpose_to_rows(positions, shape[1]) if axis == 1 else positions
            ) < UNUSED_POSITION
        return used

    def _select_heads(self, count: int):
        return pl.ds(self.head, self.grid.heads_per_product) if count > 1 else pl.ds(0, 1)


def transpose_to_rows(lanes: jax.Array, count: int) -> jax.Array:
    """Return the first ``count`` of ``[heads, 1, n]`` as ``[heads, count, 1]``."""
    return transpose_to_column(lanes)[:, :count]


def transpose_to_lanes(column: jax.Array) -> jax.Array:
    """Return ``[heads, n, 1]`` as ``[heads, 1, n]``."""
    heads, size, _ = column.shape
    return jnp.swapaxes(jnp.broadcast_to(column, (heads, size, LANES)), 1, 2)[:, :1]
