"""The grid of the kernel over a cache, and the scalars that it looks up.

A step has one tile of queries of one batch row, all heads of it, and loops over the blocks of keys
that the tile needs: the work ends with the length of the row, not with the cache. With fewer rows
than cores, the keys of a row are split among steps, whose results are combined afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn import _quantization
from axattn._call import AttentionCall
from axattn._stored import UNUSED_POSITION
from axattn._typing import present
from axattn.kernels import _block_map, _masks
from axattn.kernels._problem import Problem, cdiv, round_up
from axattn.kernels._tpu.layout import LANES

# Bytes of the scores of one matrix product.
SCORE_BYTES = 2**19

# Slots of one copy, at most, if the cache has no pages.
MAX_COPY = 512


@dataclasses.dataclass(frozen=True)
class CachedBlockSizes:
    """Query tokens of a tile and key slots of a block, and the bytes of VMEM that it may take."""

    block_q: int
    block_kv: int  # a multiple of 128
    vmem_limit: int | None = None


class CachedScalars(NamedTuple):
    """Arrays that are prefetched to scalar memory; flat, as it pads the last axis."""

    spans: jax.Array  # int32 [steps, 4]: first block, full from block, full to block, blocks
    # int32 [steps + cores]: the step with work after each; then the first one of each core.
    next_steps: jax.Array
    ends: jax.Array  # int32 [B]: slots up to the last one in use
    block_table: jax.Array  # int32 [B, pages]; [1], unused, without pages
    first_row: jax.Array  # int32 [1]: of the cache's arrays


@dataclasses.dataclass(frozen=True)
class CachedGrid:
    """Static sizes; hashable."""

    problem: Problem
    stored_dtype: str  # of the numbers in the cache
    is_paged: bool
    page_size: int  # slots of a row of the cache's arrays
    block_q: int
    block_kv: int
    copy_size: int  # slots of one copy: a page, a part of one, or several
    heads_per_product: int  # key/value heads of one matrix product
    slots_last: frozenset[str]  # which of "keys" and "values" are [K, size, slots] in HBM
    cores: int
    num_splits: int  # of the keys of a batch row

    @property
    def kv_heads(self) -> int:
        return self.problem.num_kv_heads

    @property
    def rows(self) -> int:
        """Rows of a tile: g * block_q + t is token t of the group's head g; then padding."""
        return count_padded_rows(self.problem, self.block_q)

    @property
    def row_lanes(self) -> int:
        return round_up(self.rows, LANES)

    @property
    def num_tiles(self) -> int:
        """Tiles of queries of one batch row."""
        return cdiv(self.problem.q_len, self.block_q)

    @property
    def num_kv(self) -> int:
        return cdiv(self.problem.kv_len, self.block_kv)

    @property
    def copies_per_block(self) -> int:
        return self.block_kv // self.copy_size

    @property
    def pages_per_row(self) -> int:
        return self.problem.kv_len // self.page_size

    @property
    def num_results(self) -> int:
        """Rows of the batch, each as often as it has splits."""
        return self.problem.batch * self.num_splits

    @property
    def results_per_core(self) -> int:
        return cdiv(self.num_results, self.cores)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.cores, self.results_per_core, self.num_tiles

    def locate_tile(self, core, i, tile) -> tuple[Any, Any]:
        """Return the result and the tile of a step; surplus steps point at the last one."""
        result = core * self.results_per_core + i
        is_surplus = result >= self.num_results
        last = jnp.int32(self.num_results - 1), jnp.int32(self.num_tiles - 1)
        return jnp.where(is_surplus, last[0], result), jnp.where(is_surplus, last[1], tile)


def make_cached_grid(call: AttentionCall, sizes: CachedBlockSizes, cores: int) -> CachedGrid:
    """Return the grid of a call over a cache for so many ``cores``."""
    problem, stored = Problem.from_call(call), present(call.stored)
    is_paged = stored.block_table is not None
    if sizes.block_kv % LANES:
        raise ValueError(f"block_kv takes a multiple of {LANES}, got {sizes.block_kv}")
    # Asked for splits of a fixed size, a row has the same bits in every batch.
    is_whole = problem.batch >= cores or call.kv_split_size is not None
    num_splits = 1 if is_whole else cdiv(cores, problem.batch)
    return CachedGrid(
        problem,
        stored.dtype,
        is_paged,
        stored.page_size,
        sizes.block_q,
        sizes.block_kv,
        math.gcd(sizes.block_kv, stored.page_size if is_paged else MAX_COPY),
        _choose_heads_per_product(problem, sizes, _quantization.is_quantized(stored.dtype)),
        find_slots_last(call),
        min(cores, problem.batch * num_splits),
        num_splits,
    )


def _choose_heads_per_product(problem: Problem, sizes: CachedBlockSizes, has_scales: bool) -> int:
    """Return the key/value heads of one product: if rows are few, several fill a vector tile."""
    rows, heads = count_padded_rows(problem, sizes.block_q), problem.num_kv_heads
    for count in range(heads, 1, -1):
        # Scales have heads on the sublanes, where a slice begins with a whole tile or is one row.
        is_aligned = count == heads or count % 8 == 0 or not has_scales
        bytes_of_scores = count * rows * sizes.block_kv * 4
        if heads % count == 0 and is_aligned and bytes_of_scores <= SCORE_BYTES:
            return count
    return 1


def count_padded_rows(problem: Problem, block_q: int) -> int:
    """Return the rows of a tile in whole tiles of sublanes."""
    sublanes = 8 if problem.dtype == "float32" else 16
    return round_up(problem.group * block_q, sublanes)


def find_slots_last(call: AttentionCall) -> frozenset[str]:
    """Return which of "keys" and "values" a TPU lays out with the slots last, to save space.

    With a head size of 64, say, rows of 128 lanes would be half empty. Asked for the other order,
    XLA would copy the cache.
    """
    arrays = present(call.stored).arrays
    pairs = ("keys", arrays.keys), ("values", arrays.values)
    return frozenset(name for name, x in pairs if x is not None and x.shape[-1] % LANES)


def make_scalars(call: AttentionCall, grid: CachedGrid, bounds: _masks.RowBounds) -> CachedScalars:
    """Return the scalars of a call without key masks (`_masks.fold_key_masks`)."""
    if grid.num_tiles == 1:
        spans = _block_map.span_few_rows(call, bounds, grid.block_kv)
    else:
        plan = _block_map.map_key_blocks(call, grid.block_q, grid.block_kv, longest_list=0)
        spans = plan.spans
    batch = grid.problem.batch
    spans = jnp.broadcast_to(spans, (batch, grid.num_tiles, 4))
    if call.kv_positions is None:
        ends = jnp.clip(bounds[1].max(1), 0, call.kv_len)
    else:
        slots = jnp.arange(1, call.kv_len + 1, dtype=jnp.int32)[None]
        ends = jnp.where(call.kv_positions < UNUSED_POSITION, slots, 0).max(1)
    spans = _split_spans(spans, grid.num_splits)
    stored, table = present(call.stored), jnp.zeros(1, jnp.int32)
    if grid.is_paged:
        # Entries that no slot in use needs may be garbage, and their pages may be copied.
        pages = stored.arrays.keys.shape[0]
        table = present(stored.block_table).astype(jnp.int32)
        table = jnp.clip(table, 0, pages - 1).reshape(-1)
    return CachedScalars(
        spans.reshape(-1),
        _find_next_steps(spans[..., 3].reshape(-1), grid),
        jnp.broadcast_to(ends, (batch,)).astype(jnp.int32),
        table,
        jnp.asarray(stored.first_row, jnp.int32).reshape(1),
    )


def _split_spans(spans: jax.Array, num_splits: int) -> jax.Array:
    """Turn ``[B, tiles, 4]`` of `_block_map.BlockMap` into that of the scalars, with B * splits."""
    first, before, full, total = (spans[:, None, :, i] for i in range(4))
    split = jnp.arange(num_splits, dtype=jnp.int32)[None, :, None]
    start, stop = total * split // num_splits, total * (split + 1) // num_splits
    count = stop - start
    full_from = jnp.clip(before - start, 0, count)
    full_to = jnp.clip(before + full - start, 0, count)
    parts = jnp.stack(jnp.broadcast_arrays(first + start, full_from, full_to, count), -1)
    return parts.reshape(-1, *spans.shape[1:])


def _find_next_steps(totals: jax.Array, grid: CachedGrid) -> jax.Array:
    """Return for each step, then for each core, the core's next step with work, or -1."""
    steps = totals.size
    index = jnp.arange(steps, dtype=jnp.int32)
    # The step itself or the first one after it that has work.
    with_work = lax.cummin(jnp.where(totals > 0, index, steps), reverse=True)
    with_work = jnp.append(with_work, steps)
    per_core = grid.results_per_core * grid.num_tiles
    firsts = jnp.arange(grid.cores, dtype=jnp.int32) * per_core
    starts = jnp.concatenate([index + 1, firsts])
    ends = jnp.concatenate([(index // per_core + 1) * per_core, firsts + per_core])
    found = with_work[jnp.minimum(starts, steps)]
    return jnp.where((found < ends) & (found < steps), found, -1).astype(jnp.int32)
