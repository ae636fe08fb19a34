"""Copies of blocks of a cache from HBM to VMEM, double-buffered.

All key/value heads of a block are copied together. Keys and values are copied from the pages that
the block table names, or from a row of the cache; slots that are not in use are not copied.
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
from axattn.kernels._tpu.cached.grid import CachedGrid, CachedScalars
from axattn.kernels._tpu.layout import LANES

# The cache's own arrays.
STORED = ("keys", "values")
SCALES = ("key_scales", "value_scales")


class CachedBlock(NamedTuple):
    """Which block of keys, and for which tile of queries: scalars."""

    batch: jax.Array
    tile: jax.Array
    block: jax.Array


@dataclasses.dataclass(frozen=True)
class BlockCopies:
    """The arrays in HBM, two buffers of each in VMEM, and a semaphore per buffer."""

    grid: CachedGrid
    scalars: CachedScalars
    sources: Mapping[str, Any]
    buffers: Mapping[str, Any]
    semaphores: Any  # [2, arrays]

    def start(self, at: CachedBlock, slot: Any) -> None:
        """Start to copy a block of all arrays into buffer ``slot``."""
        self._for_each_copy(at, slot, lambda copy: copy.start())

    def wait(self, at: CachedBlock, slot: Any) -> None:
        """Wait for what `start` with the same arguments has started."""
        self._for_each_copy(at, slot, lambda copy: copy.wait())

    def _for_each_copy(self, at: CachedBlock, slot: Any, act: Callable[[Any], None]) -> None:
        grid = self.grid

        def copy(name, source, target):
            semaphore = self.semaphores.at[slot, list(self.sources).index(name)]
            act(pltpu.make_async_copy(source, target, semaphore))

        paged = [name for name in self.sources if self._has_pages(name)]
        for name in self.sources:
            if name not in paged:
                copy(name, self._select_block(name, at), self.buffers[name].at[slot])

        start = at.block * grid.block_kv
        used = self.scalars.ends[at.batch] - start
        count = jnp.clip(cdiv(used, grid.copy_size), 0, grid.copies_per_block)

        def copy_page(i, carry):
            row, first = self._locate_page(at.batch, start + i * grid.copy_size)

            def copy_slots(size):
                for name in paged:
                    copy(name, *self._select_slots(name, slot, i, row, first, size))

            tail = grid.page_size % grid.copy_size
            if tail:
                is_whole = first + grid.copy_size <= grid.page_size
                pl.when(is_whole)(lambda: copy_slots(grid.copy_size))
                pl.when(jnp.logical_not(is_whole))(lambda: copy_slots(tail))
            else:
                copy_slots(grid.copy_size)
            return carry

        if grid.copies_per_block == 1:
            pl.when(count > 0)(lambda: copy_page(0, None))
        else:
            lax.fori_loop(0, count, copy_page, None)

    def _has_pages(self, name: str) -> bool:
        return name in STORED or (name in SCALES and reads_scales_in_place(self.grid))

    def _select_block(self, name: str, at: CachedBlock) -> Any:
        """Return a block of ``[B or 1, heads, S']`` or ``[B or 1, heads, tiles, rows, S']``."""
        source = self.sources[name]
        row = at.batch if source.shape[0] > 1 else 0
        slots = pl.ds(pl.multiple_of(at.block * self.grid.block_kv, LANES), self.grid.block_kv)
        if len(source.shape) == 3:
            return source.at[row, :, slots]
        return source.at[row, :, at.tile, :, slots]

    def _locate_page(self, batch, start) -> tuple[Any, Any]:
        """Return the row of the cache's arrays, and the slot in it, where a copy begins."""
        grid = self.grid
        if not grid.is_paged:
            return self.scalars.first_row[0] + batch, start
        page_size = jnp.int32(grid.page_size)
        page = jnp.minimum(lax.div(start, page_size), grid.pages_per_row - 1)
        first = 0 if grid.page_size == grid.copy_size else lax.rem(start, page_size)
        return self.scalars.block_table[batch * grid.pages_per_row + page], first

    def _select_slots(self, name, slot, i, row, first, size) -> tuple[Any, Any]:
        """Return ``size`` slots from ``first`` of a row, and the target of copy ``i``."""
        grid, source, buffer = self.grid, self.sources[name], self.buffers[name]
        if not isinstance(first, int):
            first = pl.multiple_of(first, grid.copy_size)
        slots = pl.ds(first, size)
        if name in SCALES or name in grid.slots_last:
            target_slots = pl.ds(0, size)
            if grid.copies_per_block > 1:
                target_slots = pl.ds(pl.multiple_of(i * grid.copy_size, LANES), size)
            if name in SCALES:
                return source.at[row, :, slots], buffer.at[slot, :, target_slots]
            return source.at[row, :, :, slots], buffer.at[slot, :, :, target_slots]
        target = buffer.at[slot, :, i]
        if size != grid.copy_size:
            target = buffer.at[slot, :, i, pl.ds(0, size)]
        return source.at[row, :, slots], target


def reads_scales_in_place(grid: CachedGrid) -> bool:
    """Say whether scales are copied from where they are: in whole lanes."""
    return grid.copy_size % LANES == 0 and grid.page_size % LANES == 0
