"""Blocks of a cache on their way from HBM to VMEM: two buffers, one of them being filled.

All key/value heads of a block come together. Keys and values are copied in pieces, from pages that
the block table names or from a row; only pieces with slots in use are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from axattn.kernels._problem import cdiv
from axattn.kernels._tpu.cached.grid import Cut, Scalars
from axattn.kernels._tpu.layout import LANES

# What comes in pieces, out of the cache's own arrays.
STORED = ("keys", "values")
SCALES = ("key_scales", "value_scales")


class Fetch(NamedTuple):
    """Which block is meant: scalars."""

    batch: jax.Array
    tile: jax.Array
    block: jax.Array


@dataclasses.dataclass(frozen=True)
class Copies:
    """The arrays in HBM, their buffers, and a semaphore per buffer."""

    cut: Cut
    scalars: Scalars
    sources: Mapping[str, Any]
    buffers: Mapping[str, Any]
    semaphores: Any  # [2, arrays]

    def start(self, at: Fetch, slot: Any) -> None:
        self._each(at, slot, lambda copy: copy.start())

    def wait(self, at: Fetch, slot: Any) -> None:
        self._each(at, slot, lambda copy: copy.wait())

    def _each(self, at: Fetch, slot: Any, act: Callable[[Any], None]) -> None:
        def copy(name, source, target):
            semaphore = self.semaphores.at[slot, list(self.sources).index(name)]
            act(pltpu.make_async_copy(source, target, semaphore))

        for name in self.sources:
            if not self.pieced(name):
                copy(name, self._whole(name, at), self.buffers[name].at[slot])
        self._each_piece(at, slot, copy)

    def pieced(self, name: str) -> bool:
        """Whether an array is copied piece by piece, out of the cache."""
        return name in STORED or (name in SCALES and scales_in_place(self.cut))

    def _whole(self, name: str, at: Fetch) -> Any:
        """A block of ``[B or 1, heads, S']`` or ``[B or 1, heads, tiles, rows, S']``."""
        source = self.sources[name]
        row = at.batch if source.shape[0] > 1 else 0
        lanes = pl.ds(pl.multiple_of(at.block * self.cut.block_kv, LANES), self.cut.block_kv)
        if len(source.shape) == 3:
            return source.at[row, :, lanes]
        return source.at[row, :, at.tile, :, lanes]

    def _each_piece(self, at: Fetch, slot: Any, copy) -> None:
        cut = self.cut
        block_start = at.block * cut.block_kv
        used = self.scalars.ends[at.batch] - block_start
        count = jnp.clip(cdiv(used, cut.piece), 0, cut.pieces)
        tail = cut.page % cut.piece

        def of_piece(i, _):
            row, first = self._locate(at.batch, block_start + i * cut.piece)

            def of_size(size):
                for name in self.sources:
                    if self.pieced(name):
                        copy(name, *self._piece(name, slot, i, row, first, size))

            if tail:
                whole = first + cut.piece <= cut.page
                pl.when(whole)(lambda: of_size(cut.piece))
                pl.when(jnp.logical_not(whole))(lambda: of_size(tail))
            else:
                of_size(cut.piece)
            return _

        if cut.pieces == 1:
            pl.when(count > 0)(lambda: of_piece(0, None))
        else:
            lax.fori_loop(0, count, of_piece, None)

    def _locate(self, batch, start) -> tuple[Any, Any]:
        """Row of the arrays and slot in it where a piece begins."""
        cut = self.cut
        if not cut.paged:
            return self.scalars.first_row[0] + batch, start
        page = jnp.minimum(lax.div(start, jnp.int32(cut.page)), cut.pages - 1)
        within = 0 if cut.page == cut.piece else lax.rem(start, jnp.int32(cut.page))
        return self.scalars.table[batch * cut.pages + page], within

    def _piece(self, name, slot, i, row, first, size) -> tuple[Any, Any]:
        """``size`` slots from ``first`` of a row of the arrays, and where they go."""
        cut, source, buffer = self.cut, self.sources[name], self.buffers[name]
        if not isinstance(first, int):
            first = pl.multiple_of(first, cut.piece)
        slots = pl.ds(first, size)
        here = pl.ds(0, size)
        if name in SCALES or name in cut.turned:
            if cut.pieces > 1:
                here = pl.ds(pl.multiple_of(i * cut.piece, LANES), size)
            if name in SCALES:
                return source.at[row, :, slots], buffer.at[slot, :, here]
            return source.at[row, :, :, slots], buffer.at[slot, :, :, here]
        target = buffer.at[slot, :, i]
        if size != cut.piece:
            target = buffer.at[slot, :, i, here]
        return source.at[row, :, slots], target


def scales_in_place(cut: Cut) -> bool:
    """Whether the kernel reads the scales where they are: in pieces of whole lanes."""
    return cut.piece % LANES == 0 and cut.page % LANES == 0


def buffer_shape(cut: Cut, name: str, array: jax.Array) -> tuple[int, ...]:
    """Of both buffers of an array."""
    if name in cut.turned:
        return (2, cut.kv_heads, array.shape[2], cut.block_kv)
    if name in STORED:
        return (2, cut.kv_heads, cut.pieces, cut.piece, array.shape[-1])
    if array.ndim == 3:
        return (2, array.shape[1], cut.block_kv)
    return (2, array.shape[1], cut.rows, cut.block_kv)
