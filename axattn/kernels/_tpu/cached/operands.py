"""From an AttentionCall over a cache to the arrays of its kernel.

The cache's arrays stay as they are in HBM. The few queries are stored like the rows of tiles, and
vectors over rows in lanes, ``[B or 1, K or 1, tiles, 1, row_lanes]``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from axattn._call import AttentionCall
from axattn._mask_parts import Segments
from axattn._stored import UNUSED_POSITION, KVView
from axattn._typing import present
from axattn.kernels import _masks
from axattn.kernels._padding import pad_axis
from axattn.kernels._problem import LOG2E
from axattn.kernels._tpu.cached import copies
from axattn.kernels._tpu.cached.blocks import choose_mask_dtype, classify_bias
from axattn.kernels._tpu.cached.grid import CachedGrid
from axattn.kernels._tpu.layout import LANES, join_tiles, split_into_tiles


def lay_out_queries(call: AttentionCall, grid: CachedGrid) -> jax.Array:
    """Return the query as ``[B, K, tiles, rows, H]``, in the dtype of the products."""
    query = jnp.moveaxis(call.query.astype(call.product_dtype), 2, 1)
    return _split_into_rows(query, grid)


def make_row_vectors(
    call: AttentionCall, grid: CachedGrid, bounds: _masks.RowBounds
) -> dict[str, jax.Array]:
    """Return vectors over rows, ``[B or 1, K or 1, tiles, 1, row_lanes]`` each.

    low, high              int32: each row attends to positions in [low, high)
    q_positions, q_segments   int32
    row_bias, row_shift, slopes, sinks   float32
    """
    low, high = bounds
    vectors = {"high": _lay_out_over_rows(high[:, None], grid, -UNUSED_POSITION)}
    if low is not None:
        vectors["low"] = _lay_out_over_rows(low[:, None], grid)
    for part in call.mask.parts:
        if isinstance(part, Segments):
            vectors["q_segments"] = _lay_out_over_rows(part.q_ids[:, None], grid)
    if call.alibi_slopes is not None:
        positions = call.spans()[0].positions
        vectors["q_positions"] = _lay_out_over_rows(positions[:, None], grid)
        slopes = call.alibi_slopes.astype(jnp.float32)[:, :, None]
        vectors["slopes"] = _lay_out_over_rows(slopes, grid)
    if call.sinks is not None:
        sinks = call.sinks.astype(jnp.float32)[None, :, None] * LOG2E
        vectors["sinks"] = _lay_out_over_rows(sinks, grid)
    if classify_bias(call) == "rows":
        bias = present(call.bias)[..., 0].astype(jnp.float32)
        vectors["row_bias"] = _lay_out_over_rows(bias, grid)
    shift = present(call.stored).multiply_center(call.query, jnp.float32)
    if shift is not None:
        shift = shift.reshape(call.batch, call.num_heads, call.q_len)
        vectors["row_shift"] = _lay_out_over_rows(shift, grid)
    return vectors


def make_sources(call: AttentionCall, grid: CachedGrid) -> dict[str, jax.Array]:
    """Return the arrays that the kernel copies block by block.

    keys, values           the cache's arrays, [R, K, C, size] or [R, K, size, C]
    key_scales, value_scales   float32 [R, K, C], or [B, K, S'] if they are no whole lanes
    kv_positions, kv_segments, key_bias   [B or 1, 1, S']
    bias, allowed          [B or 1, K or 1, tiles, rows, S']
    """
    stored = present(call.stored)
    arrays = {k: v for k, v in stored.arrays._asdict().items() if v is not None}
    for name in sorted(grid.slots_last):
        arrays[name] = jnp.swapaxes(arrays[name], 2, 3)  # as they are in HBM: no copy
    if not copies.reads_scales_in_place(grid):
        for name in copies.SCALES:
            if name in arrays:
                arrays[name] = _pad_keys(_gather_scales(stored, arrays[name]), grid)
    if call.kv_positions is not None:
        arrays["kv_positions"] = _pad_keys(call.kv_positions[:, None], grid, UNUSED_POSITION)
    for part in call.mask.parts:
        if isinstance(part, Segments):
            arrays["kv_segments"] = _lay_out_over_keys(part.kv_ids[:, None], grid)
    kind = classify_bias(call)
    if kind == "keys":
        bias = present(call.bias)[:, :, 0].astype(jnp.float32)
        arrays["key_bias"] = _lay_out_over_keys(bias, grid)
    elif kind == "both":
        arrays["bias"] = _lay_out_tiles(present(call.bias).astype(jnp.float32), grid)
    allowed = _masks.merge_dense_masks(call)
    if allowed is not None:
        arrays["allowed"] = _lay_out_tiles(allowed.astype(choose_mask_dtype(grid)), grid)
    return arrays


def restore_queries(grid: CachedGrid, rows: jax.Array) -> jax.Array:
    """Return ``[results, K, tiles, rows, ...]`` as ``[results, T, N, ...]``."""
    return join_tiles(rows[:, :, :, : grid.problem.group * grid.block_q], grid)


def _gather_scales(stored: KVView, scales: jax.Array) -> jax.Array:
    """Copy the scales of a cache to ``[B, K, S]``."""
    if stored.block_table is None:
        return lax.dynamic_slice_in_dim(scales, stored.first_row, stored.batch, 0)
    pages, heads, size = scales.shape
    if size < LANES // 2:
        # As one axis, the heads and slots of a page fill the lanes better.
        scales = scales.reshape(pages, heads * size)
    found = scales.at[stored.block_table].get(mode="clip")
    found = found.reshape(stored.batch, -1, heads, size)
    return jnp.moveaxis(found, 2, 1).reshape(stored.batch, heads, stored.kv_len)


def _split_into_rows(array: jax.Array, grid: CachedGrid, fill: float = 0) -> jax.Array:
    """Return ``[B, N or 1, T, size]`` as ``[B, K or 1, tiles, rows, size]``, with padding."""
    return pad_axis(split_into_tiles(array, grid, fill), grid.rows, fill, axis=3)


def _lay_out_over_rows(vector: jax.Array, grid: CachedGrid, fill: int = 0) -> jax.Array:
    """Return ``[B or 1, N or 1, T or 1]`` as ``[B or 1, K or 1, tiles, 1, row_lanes]``."""
    vector = jnp.broadcast_to(vector, (*vector.shape[:2], grid.problem.q_len))
    rows = _split_into_rows(vector[..., None], grid, fill).swapaxes(3, 4)
    return pad_axis(rows, grid.row_lanes, fill, axis=4)


def _pad_keys(vector: jax.Array, grid: CachedGrid, fill: int = 0) -> jax.Array:
    return pad_axis(vector, grid.num_kv * grid.block_kv, fill, axis=vector.ndim - 1)


def _lay_out_over_keys(vector: jax.Array, grid: CachedGrid) -> jax.Array:
    """Return ``[B or 1, heads, S or 1]`` as ``[B or 1, heads, S']``."""
    return _pad_keys(jnp.broadcast_to(vector, (*vector.shape[:2], grid.problem.kv_len)), grid)


def _lay_out_tiles(array: jax.Array, grid: CachedGrid) -> jax.Array:
    """Return ``[B or 1, N or 1, T or 1, S or 1]`` as ``[B or 1, K or 1, tiles, rows, S']``."""
    shape = (*array.shape[:2], grid.problem.q_len, grid.problem.kv_len)
    return _pad_keys(_split_into_rows(jnp.broadcast_to(array, shape), grid), grid)
