"""What the kernel over a cache has in VMEM for some key/value heads of a block of keys.

Scores lie as ``[heads, rows, keys]``: few rows on the sublanes, keys on the lanes, as scales have
them. Vectors over rows are ``[heads, rows, 1]``, vectors over keys ``[heads, 1, keys]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from axattn._stored import NEVER
from axattn.kernels._tpu.cached.grid import Cut
from axattn.kernels._tpu.layout import LANES, transpose_to_column


@dataclasses.dataclass(frozen=True)
class Tile:
    """A `scores.Block`."""

    cut: Cut
    rows: Mapping[str, Any]  # vectors over rows, [1, K or 1, 1, 1, lanes]
    buffers: Mapping[str, Any]  # [2, heads, ...]
    slot: Any  # the buffer that is full
    start: Any  # the first key slot
    head: Any  # the first of the heads

    def has(self, name: str) -> bool:
        return name in self.rows or name in self.buffers

    def of_rows(self, name: str) -> jax.Array:
        """``[heads or 1, rows, 1]``."""
        ref = self.rows[name]
        return columns(ref[0, self._heads(ref.shape[1]), 0], self.cut.rows)

    def of_keys(self, name: str) -> jax.Array:
        """``[heads or 1, 1, keys]``."""
        ref = self.buffers[name]
        return ref[self.slot, self._heads(ref.shape[1])][:, None, :]

    def tile(self, name: str) -> jax.Array:
        """``[heads or 1, rows, keys]``."""
        ref = self.buffers[name]
        tile = ref[self.slot, self._heads(ref.shape[1])]
        return tile if tile.dtype.itemsize == 4 else tile.astype(jnp.int32)

    def slots(self) -> jax.Array:
        shape = (1, 1, self.cut.block_kv)
        return self.start + lax.broadcasted_iota(jnp.int32, shape, 2)

    def dropout_words(self):
        raise NotImplementedError("dropout over a cache")

    def used(self, end: Any, axis: int) -> jax.Array:
        """Which slots hold a token, along ``axis``: bool ``[1, keys, 1]`` or ``[1, 1, keys]``.

        ``end`` is behind the last of them.
        """
        shape = tuple(self.cut.block_kv if i == axis else 1 for i in range(3))
        used = self.start + lax.broadcasted_iota(jnp.int32, shape, axis) < end
        if self.has("kv_positions"):
            positions = self.of_keys("kv_positions")
            used &= (columns(positions, shape[1]) if axis == 1 else positions) < NEVER
        return used

    def _heads(self, count: int):
        return pl.ds(self.head, self.cut.together) if count > 1 else pl.ds(0, 1)


def columns(lanes: jax.Array, count: int) -> jax.Array:
    """``[heads, 1, n]`` as ``[heads, count, 1]``: the first ``count`` of each."""
    return transpose_to_column(lanes)[:, :count]


def lanes(column: jax.Array) -> jax.Array:
    """``[heads, n, 1]`` as ``[heads, 1, n]``."""
    heads, size, _ = column.shape
    return jnp.swapaxes(jnp.broadcast_to(column, (heads, size, LANES)), 1, 2)[:, :1]
