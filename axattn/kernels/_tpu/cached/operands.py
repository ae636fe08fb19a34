"""From an AttentionCall over a cache to what its kernel reads.

The cache's arrays are left where and as they are. Queries, which are few, are laid out as the
rows of tiles. Vectors over rows are lanes, ``[B or 1, K or 1, tiles, 1, rows]``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from axattn._call import AttentionCall
from axattn._mask_parts import Segments
from axattn._stored import NEVER, Stored
from axattn._typing import present
from axattn.kernels import _masks
from axattn.kernels._padding import padded
from axattn.kernels._problem import LOG2E
from axattn.kernels._tpu.cached import copies
from axattn.kernels._tpu.cached.grid import Cut
from axattn.kernels._tpu.layout import LANES, join_tiles, split_into_tiles


def queries(call: AttentionCall, cut: Cut) -> jax.Array:
    """``[B, K, tiles, rows, H]`` in the dtype of the products."""
    query = jnp.moveaxis(call.query.astype(call.product_dtype), 2, 1)
    return _rows_of(query, cut)


def row_vectors(call: AttentionCall, cut: Cut, limits: _masks.Bounds) -> dict[str, jax.Array]:
    """``[B or 1, K or 1, tiles, 1, row_lanes]`` each.

    low, high              int32: each row attends to positions in [low, high)
    q_positions, q_segments   int32
    row_bias, row_shift, slopes, sinks   float32
    """
    low, high = limits
    found = {"high": _vector(high[:, None], cut, -NEVER)}
    if low is not None:
        found["low"] = _vector(low[:, None], cut)
    for part in call.mask.parts:
        if isinstance(part, Segments):
            found["q_segments"] = _vector(part.q_ids[:, None], cut)
    if call.alibi_slopes is not None:
        positions = call.spans()[0].positions
        found["q_positions"] = _vector(positions[:, None], cut)
        found["slopes"] = _vector(call.alibi_slopes.astype(jnp.float32)[:, :, None], cut)
    if call.sinks is not None:
        sinks = call.sinks.astype(jnp.float32)[None, :, None] * LOG2E
        found["sinks"] = _vector(sinks, cut)
    if _bias_kind(call) == "rows":
        found["row_bias"] = _vector(present(call.bias)[..., 0].astype(jnp.float32), cut)
    shift = present(call.stored).center_dots(call.query, jnp.float32)
    if shift is not None:
        found["row_shift"] = _vector(shift.reshape(call.batch, call.num_heads, call.q_len), cut)
    return found


def sources(call: AttentionCall, cut: Cut) -> dict[str, jax.Array]:
    """What is copied block by block.

    keys, values           the cache's arrays, [R, K, C, size] or [R, K, size, C]
    key_scales, value_scales   float32 [R, K, C], or [B, K, S'] where no pieces can be copied
    kv_positions, kv_segments, key_bias   [B or 1, 1, S']
    bias, allowed          [B or 1, K or 1, tiles, rows, S']
    """
    stored = present(call.stored)
    arrays = {k: v for k, v in stored.arrays._asdict().items() if v is not None}
    for name in cut.turned & set(arrays):
        arrays[name] = jnp.swapaxes(arrays[name], 2, 3)  # as it lies: no copy
    if not copies.scales_in_place(cut):
        for name in copies.SCALES:
            if name in arrays:
                arrays[name] = _padded_keys(_row_by_row(stored, arrays[name]), cut)
    if call.kv_positions is not None:
        arrays["kv_positions"] = _padded_keys(call.kv_positions[:, None], cut, NEVER)
    for part in call.mask.parts:
        if isinstance(part, Segments):
            arrays["kv_segments"] = _keys(part.kv_ids[:, None], cut)
    kind = _bias_kind(call)
    if kind == "keys":
        arrays["key_bias"] = _keys(present(call.bias)[:, :, 0].astype(jnp.float32), cut)
    elif kind == "both":
        arrays["bias"] = _tiles(present(call.bias).astype(jnp.float32), cut)
    allowed = _masks.dense_mask(call)
    if allowed is not None:
        # Bytes in whole tiles, or words.
        dtype = jnp.int8 if cut.rows % 32 == 0 else jnp.int32
        arrays["allowed"] = _tiles(allowed.astype(dtype), cut)
    return arrays


def unpacked(cut: Cut, rows: jax.Array) -> jax.Array:
    """``[results, K, tiles, rows, ...]`` as ``[results, T, N, ...]``."""
    return join_tiles(rows[:, :, :, : cut.problem.group * cut.block_q], cut)


def _row_by_row(stored: Stored, scales: jax.Array) -> jax.Array:
    """Scales of a cache as ``[B, K, S]``: of pages and rows that are no whole lanes, a copy."""
    if stored.block_table is None:
        return lax.dynamic_slice_in_dim(scales, stored.first_row, stored.batch, 0)
    pages, heads, size = scales.shape
    if size < LANES // 2:
        # All heads of a page together fill the lanes better.
        scales = scales.reshape(pages, heads * size)
    found = scales.at[stored.block_table].get(mode="clip")
    found = found.reshape(stored.batch, -1, heads, size)
    return jnp.moveaxis(found, 2, 1).reshape(stored.batch, heads, stored.kv_len)


def _bias_kind(call: AttentionCall) -> str | None:
    """What a bias is over: "rows", "keys" (the same for all heads) or "both"."""
    if call.bias is None:
        return None
    if call.bias.shape[3] == 1:
        return "rows"
    return "keys" if call.bias.shape[1:3] == (1, 1) else "both"


def _rows_of(array: jax.Array, cut: Cut, fill: float = 0) -> jax.Array:
    """``[B, N or 1, T, size]`` as ``[B, K or 1, tiles, rows, size]``; ``fill`` in the padding."""
    return padded(split_into_tiles(array, cut, fill), cut.rows, fill, axis=3)


def _vector(vector: jax.Array, cut: Cut, fill: int = 0) -> jax.Array:
    """A vector ``[B or 1, N or 1, T or 1]`` over rows."""
    vector = jnp.broadcast_to(vector, (*vector.shape[:2], cut.problem.q_len))
    rows = _rows_of(vector[..., None], cut, fill).swapaxes(3, 4)
    return padded(rows, cut.row_lanes, fill, axis=4)


def _padded_keys(vector: jax.Array, cut: Cut, fill: int = 0) -> jax.Array:
    return padded(vector, cut.num_kv * cut.block_kv, fill, axis=vector.ndim - 1)


def _keys(vector: jax.Array, cut: Cut) -> jax.Array:
    """A vector ``[B or 1, heads, S or 1]`` over keys, ``[B or 1, heads, S']``."""
    return _padded_keys(jnp.broadcast_to(vector, (*vector.shape[:2], cut.problem.kv_len)), cut)


def _tiles(array: jax.Array, cut: Cut) -> jax.Array:
    """``[B or 1, N or 1, T or 1, S or 1]`` as ``[B or 1, K or 1, tiles, rows, S']``."""
    shape = (*array.shape[:2], cut.problem.q_len, cut.problem.kv_len)
    return _padded_keys(_rows_of(jnp.broadcast_to(array, shape), cut), cut)
