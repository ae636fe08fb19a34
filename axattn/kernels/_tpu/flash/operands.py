"""From an AttentionCall to the arrays of a flash kernel, and from its results back.

Queries, and results like them, stay as they are in HBM: ``[B, T, N, H]`` if they are arguments of
the program, where a step loads whole memory tiles of 8 heads; ``[B, N, T, H]`` if a product of the
program makes them, which XLA writes heads first on TPUs at no cost. Keys and values are small,
because a group shares them: they are copied once to ``[B, K, S', H]``, with S' in whole blocks and
unused slots set to zero. Vectors over query rows are stored like the rows of a tile,
``[B, K, tiles, 1, rows]``, vectors over keys as ``[B, N or 1, blocks, 1, block_kv]``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn._mask_parts import Segments
from axattn._masks import find_kv_lengths, find_q_lengths, zero_unused
from axattn._stored import UNUSED_POSITION
from axattn._typing import present
from axattn.kernels import _masks
from axattn.kernels._padding import pad_axis
from axattn.kernels._problem import LOG2E
from axattn.kernels._tpu.flash.grid import TpuFlashGrid
from axattn.kernels._tpu.layout import join_tiles, split_into_tiles


def make_inputs(call: AttentionCall, grid: TpuFlashGrid) -> dict[str, jax.Array]:
    """Return what every kernel reads of a call without key masks (`_masks.fold_key_masks`).

    query                  [B, T, N, H] or [B, N, T, H]
    key, value             [B, K, S', H], [B, K, S', h]
    low, high              int32 over rows: each attends to positions in [low, high)
    q_positions, kv_positions   int32 over rows and over keys where they are needed
    q_segments, kv_segments     int32 over rows and over keys
    row_bias, key_bias, slopes  float32
    dropout_rows           int32 over rows: the first counter of each
    bias, allowed          [B or 1, N or 1, T, S]; int8 if it is a mask
    """
    inputs = {"query": lay_out_queries(grid, call.query)}
    for name, array in (("key", present(call.key)), ("value", present(call.value))):
        inputs[name] = _lay_out_keys(call, grid, array)
    low, high = _masks.compute_row_bounds(call)
    inputs["high"] = lay_out_over_rows(grid, high[:, None], -UNUSED_POSITION)
    if low is not None:
        inputs["low"] = lay_out_over_rows(grid, low[:, None], 0)
    if call.kv_positions is not None:
        inputs["kv_positions"] = _lay_out_over_keys(
            grid, call.kv_positions[:, None], UNUSED_POSITION
        )
    for part in call.mask.parts:
        if isinstance(part, Segments):
            inputs["q_segments"] = lay_out_over_rows(grid, part.q_ids[:, None], 0)
            inputs["kv_segments"] = _lay_out_over_keys(grid, part.kv_ids[:, None], 0)
    if call.alibi_slopes is not None:
        positions = call.spans()[0].positions
        inputs["q_positions"] = lay_out_over_rows(grid, positions[:, None], 0)
        slopes = call.alibi_slopes.astype(jnp.float32)[:, :, None]
        inputs["slopes"] = lay_out_over_rows(grid, slopes)
    if call.dropout_key is not None:
        inputs["dropout_rows"] = lay_out_over_rows(grid, _count_dropout_rows(call))
    allowed = _masks.merge_dense_masks(call)
    if allowed is not None:
        shape = (*allowed.shape[:2], call.q_len, call.kv_len)
        inputs["allowed"] = jnp.broadcast_to(allowed, shape).astype(jnp.int8)
    bias = call.bias
    if bias is None:
        return inputs
    if bias.shape[2] == 1:
        inputs["key_bias"] = _lay_out_over_keys(grid, bias[:, :, 0].astype(jnp.float32))
    elif bias.shape[3] == 1:
        inputs["row_bias"] = lay_out_over_rows(grid, bias[..., 0].astype(jnp.float32))
    else:
        inputs["bias"] = bias
    return inputs


def _count_dropout_rows(call: AttentionCall) -> jax.Array:
    """Return the row that each score's counter begins with, int32 ``[B or 1, N or 1, T]``."""
    slots = jnp.arange(call.q_len, dtype=jnp.int32)[None, None]
    if call.broadcast_dropout:
        return slots
    batch = jnp.arange(call.batch, dtype=jnp.int32) + jnp.asarray(call.first_row, jnp.int32)
    rows = batch[:, None] * call.num_heads + jnp.arange(call.num_heads, dtype=jnp.int32)[None]
    return rows[..., None] * call.q_len + slots


def lay_out_queries(grid: TpuFlashGrid, array: jax.Array) -> jax.Array:
    """Return ``[B, T, N, size]``, or ``[B, N, T, size]`` if heads are first in HBM."""
    return array.swapaxes(1, 2) if grid.heads_first else array


def restore_queries(grid: TpuFlashGrid, result: jax.Array) -> jax.Array:
    """Return a result that is laid out like queries as ``[B, T, N, size]``."""
    return result.swapaxes(1, 2) if grid.heads_first else result


def zero_unused_queries(call: AttentionCall, array: jax.Array) -> jax.Array:
    """Return ``[B, T, N, size]`` with zeros after the queries' lengths."""
    return zero_unused(array, jnp.arange(call.q_len, dtype=jnp.int32), find_q_lengths(call.mask))


def _lay_out_keys(call: AttentionCall, grid: TpuFlashGrid, array: jax.Array) -> jax.Array:
    """Copy ``[B, S, K, size]`` heads first, in whole blocks, with zeros in unused slots."""
    clean = zero_unused(array, jnp.arange(call.kv_len, dtype=jnp.int32), find_kv_lengths(call.mask))
    if clean.shape[2] == 1:
        by_head = clean.reshape(clean.shape[0], 1, clean.shape[1], clean.shape[3])
    else:
        by_head = clean.swapaxes(1, 2)
    return pad_axis(by_head, grid.num_kv * grid.block_kv, axis=2)


def restore_keys(call: AttentionCall, by_head: jax.Array) -> jax.Array:
    """Return ``[B, K, S', size]`` as ``[B, S, K, size]``."""
    return by_head[:, :, : call.kv_len].swapaxes(1, 2)


def lay_out_over_rows(grid: TpuFlashGrid, vector: jax.Array, fill: float = 0) -> jax.Array:
    """Return ``[B or 1, N or 1, T or 1]`` as ``[B or 1, K or 1, tiles, 1, rows]``."""
    vector = jnp.broadcast_to(vector, (*vector.shape[:2], grid.problem.q_len))
    return split_into_tiles(vector, grid, fill)[:, :, :, None]


def lay_out_sinks(grid: TpuFlashGrid, sinks: jax.Array) -> jax.Array:
    """Return sinks ``[N]`` as a vector over rows, in units of log2."""
    return lay_out_over_rows(grid, sinks.astype(jnp.float32)[None, :, None] * LOG2E)


def restore_rows(grid: TpuFlashGrid, array: jax.Array) -> jax.Array:
    """Return ``[B, K, tiles, 1, rows]`` as ``[B, T, N]``."""
    return join_tiles(array[:, :, :, 0], grid)


def _lay_out_over_keys(grid: TpuFlashGrid, vector: jax.Array, fill: float = 0) -> jax.Array:
    """Return ``[B or 1, N or 1, S or 1]`` as ``[B or 1, N or 1, blocks, 1, block_kv]``."""
    vector = jnp.broadcast_to(vector, (*vector.shape[:2], grid.problem.kv_len))
    array = pad_axis(vector, grid.num_kv * grid.block_kv, fill, axis=2)
    return array.reshape(*array.shape[:2], grid.num_kv, 1, grid.block_kv)
