"""From an AttentionCall to the arrays of a flash kernel and the blocks that its steps load.

Queries, and results like them, stay as they are in HBM: ``[B, T, N, H]`` if they are arguments of
the program, where a step loads whole memory tiles of 8 heads; ``[B, N, T, H]`` if a product of the
program makes them, which XLA writes heads first on TPUs at no cost. Keys and values are small,
because a group shares them: they are copied once to ``[B, K, S', H]``, with S' in whole blocks and
unused slots set to zero. Vectors over query rows are stored like the rows of a tile,
``[B, K, tiles, 1, rows]``, vectors over keys as ``[B, N or 1, blocks, 1, block_kv]``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from axattn._call import AttentionCall
from axattn._mask_parts import Segments
from axattn._masks import zero_unused
from axattn._stored import NEVER
from axattn._typing import present
from axattn.kernels import _masks
from axattn.kernels._padding import padded
from axattn.kernels._problem import LOG2E
from axattn.kernels._tpu.flash.grid import GridScalars, TpuFlashGrid, TpuFlashTiling
from axattn.kernels._tpu.layout import join_tiles, split_into_tiles


@dataclasses.dataclass(frozen=True)
class VmemBlock:
    """The block of an array that a step has in VMEM.

    ``axes`` names for each axis the field of `BlockIndices` that selects the block, or None where
    there is only one.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]

    def make_spec(self, grid: TpuFlashGrid) -> pl.BlockSpec:
        def index_map(b, h, tile, step, *scalars):
            at = grid.locate_blocks(b, h, tile, step, GridScalars(*scalars))
            return tuple(0 if axis is None else getattr(at, axis) for axis in self.axes)

        return pl.BlockSpec(self.shape, index_map)


@dataclasses.dataclass(frozen=True)
class BlockOperand:
    """An input array, or the shape of an output, and its block; None: it stays in HBM."""

    array: jax.Array | jax.ShapeDtypeStruct
    block: VmemBlock | None


# ---- blocks -----------------------------------------------------------------------------------


def make_query_block(tiling: TpuFlashTiling, size: int, dtype: Any) -> VmemBlock:
    if tiling.heads_first:
        shape = (1, tiling.heads, tiling.block_q, size)
        return VmemBlock(shape, dtype, ("batch", "heads", "q", None))
    shape = (1, tiling.block_q, tiling.heads, size)
    return VmemBlock(shape, dtype, ("batch", "q", "heads", None))


def make_kv_block(tiling: TpuFlashTiling, size: int, dtype: Any) -> VmemBlock:
    shape = (1, tiling.kv_heads, tiling.block_kv, size)
    return VmemBlock(shape, dtype, ("batch", "heads", "kv", None))


def make_row_block(tiling: TpuFlashTiling, dtype: Any, batch: int, heads: int) -> VmemBlock:
    """Return the block of a vector over rows, for ``batch`` rows and ``heads`` heads or for all."""
    has_heads = heads > 1 or tiling.problem.num_kv_heads == 1
    shape = (1, tiling.kv_heads if has_heads else 1, 1, 1, tiling.rows)
    return VmemBlock(shape, dtype, (*_select(batch > 1, has_heads), "q", None, None))


def make_key_block(tiling: TpuFlashTiling, dtype: Any, batch: int, heads: int) -> VmemBlock:
    """Return the block of a vector over keys."""
    shape = (1, tiling.heads if heads > 1 else 1, 1, 1, tiling.block_kv)
    return VmemBlock(shape, dtype, (*_select(batch > 1, heads > 1), "kv", None, None))


def make_tile_block(tiling: TpuFlashTiling, dtype: Any, batch: int, heads: int) -> VmemBlock:
    """Return the block of an array over queries and keys."""
    shape = (1, tiling.heads if heads > 1 else 1, tiling.block_q, tiling.block_kv)
    return VmemBlock(shape, dtype, (*_select(batch > 1, heads > 1), "q", "kv"))


def _select(has_batch: bool, has_heads: bool) -> tuple[str | None, str | None]:
    return "batch" if has_batch else None, "heads" if has_heads else None


# ---- arrays -----------------------------------------------------------------------------------


def make_inputs(call: AttentionCall, grid: TpuFlashGrid) -> dict[str, BlockOperand]:
    """Return what every kernel reads of a call without key masks (`_masks.fold_key_masks`).

    query                  [B, T, N, H]
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
    low, high = _masks.bounds(call)
    inputs["high"] = lay_out_over_rows(grid, high[:, None], -NEVER)
    if low is not None:
        inputs["low"] = lay_out_over_rows(grid, low[:, None], 0)
    if call.kv_positions is not None:
        inputs["kv_positions"] = _lay_out_over_keys(grid, call.kv_positions[:, None], NEVER)
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
    allowed = _masks.dense_mask(call)
    if allowed is not None:
        shape = (*allowed.shape[:2], call.q_len, call.kv_len)
        inputs["allowed"] = _lay_out_tiles(grid, jnp.broadcast_to(allowed, shape).astype(jnp.int8))
    bias = call.bias
    if bias is None:
        return inputs
    if bias.shape[2] == 1:
        inputs["key_bias"] = _lay_out_over_keys(grid, bias[:, :, 0].astype(jnp.float32))
    elif bias.shape[3] == 1:
        inputs["row_bias"] = lay_out_over_rows(grid, bias[..., 0].astype(jnp.float32))
    else:
        inputs["bias"] = _lay_out_tiles(grid, bias)
    return inputs


def _count_dropout_rows(call: AttentionCall) -> jax.Array:
    """Return the row that each score's counter begins with, int32 ``[B or 1, N or 1, T]``."""
    slots = jnp.arange(call.q_len, dtype=jnp.int32)[None, None]
    if call.broadcast_dropout:
        return slots
    batch = jnp.arange(call.batch, dtype=jnp.int32) + jnp.asarray(call.first_row, jnp.int32)
    rows = batch[:, None] * call.num_heads + jnp.arange(call.num_heads, dtype=jnp.int32)[None]
    return rows[..., None] * call.q_len + slots


def lay_out_queries(grid: TpuFlashGrid, array: jax.Array) -> BlockOperand:
    """Make an operand of ``[B, T, N, size]``."""
    block = make_query_block(grid, array.shape[-1], array.dtype)
    return BlockOperand(array.swapaxes(1, 2) if grid.heads_first else array, block)


def declare_query_result(grid: TpuFlashGrid, size: int, dtype: Any) -> BlockOperand:
    """Declare an output that `restore_queries` returns as ``[B, T, N, size]``."""
    tokens, heads = grid.problem.q_len, grid.problem.num_heads
    middle = (heads, tokens) if grid.heads_first else (tokens, heads)
    shape = jax.ShapeDtypeStruct((grid.problem.batch, *middle, size), dtype)
    return BlockOperand(shape, make_query_block(grid, size, dtype))


def restore_queries(grid: TpuFlashGrid, result: jax.Array) -> jax.Array:
    return result.swapaxes(1, 2) if grid.heads_first else result


def zero_unused_queries(call: AttentionCall, array: jax.Array) -> jax.Array:
    """Return ``[B, T, N, size]`` with zeros after the queries' lengths."""
    return zero_unused(array, jnp.arange(call.q_len, dtype=jnp.int32), call.mask.q_lengths())


def _lay_out_keys(call: AttentionCall, grid: TpuFlashGrid, array: jax.Array) -> BlockOperand:
    """Copy ``[B, S, K, size]`` heads first, in whole blocks, with zeros in unused slots."""
    clean = zero_unused(array, jnp.arange(call.kv_len, dtype=jnp.int32), call.mask.kv_lengths())
    if clean.shape[2] == 1:
        by_head = clean.reshape(clean.shape[0], 1, clean.shape[1], clean.shape[3])
    else:
        by_head = clean.swapaxes(1, 2)
    by_head = padded(by_head, grid.num_kv * grid.block_kv, axis=2)
    return BlockOperand(by_head, make_kv_block(grid, array.shape[-1], array.dtype))


def declare_key_result(grid: TpuFlashGrid, size: int, dtype: Any, *, whole: bool) -> BlockOperand:
    """Declare a gradient ``[B, K, S', size]``, written block by block or ``whole`` from HBM."""
    problem = grid.problem
    shape = (problem.batch, problem.num_kv_heads, grid.num_kv * grid.block_kv, size)
    block = None if whole else make_kv_block(grid, size, dtype)
    return BlockOperand(jax.ShapeDtypeStruct(shape, dtype), block)


def restore_keys(call: AttentionCall, by_head: jax.Array) -> jax.Array:
    """Return ``[B, K, S', size]`` as ``[B, S, K, size]``."""
    return by_head[:, :, : call.kv_len].swapaxes(1, 2)


def lay_out_over_rows(grid: TpuFlashGrid, vector: jax.Array, fill: float = 0) -> BlockOperand:
    """Make an operand of a vector ``[B or 1, N or 1, T or 1]``, padded with ``fill``."""
    vector = jnp.broadcast_to(vector, (*vector.shape[:2], grid.problem.q_len))
    array = split_into_tiles(vector, grid, fill)[:, :, :, None]
    return BlockOperand(array, make_row_block(grid, array.dtype, *array.shape[:2]))


def lay_out_sinks(grid: TpuFlashGrid, sinks: jax.Array) -> BlockOperand:
    """Make an operand of sinks ``[N]``, in units of log2."""
    return lay_out_over_rows(grid, sinks.astype(jnp.float32)[None, :, None] * LOG2E)


def declare_lse(grid: TpuFlashGrid) -> BlockOperand:
    """Declare an output that `restore_rows` returns as ``[B, T, N]``."""
    batch, heads = grid.problem.batch, grid.problem.num_kv_heads
    shape = jax.ShapeDtypeStruct((batch, heads, grid.num_q, 1, grid.rows), jnp.float32)
    return BlockOperand(shape, make_row_block(grid, jnp.float32, batch, heads))


def restore_rows(grid: TpuFlashGrid, array: jax.Array) -> jax.Array:
    """Return ``[B, K, tiles, 1, rows]`` as ``[B, T, N]``."""
    return join_tiles(array[:, :, :, 0], grid)


def _lay_out_over_keys(grid: TpuFlashGrid, vector: jax.Array, fill: float = 0) -> BlockOperand:
    """Make an operand of a vector ``[B or 1, N or 1, S or 1]``, padded with ``fill``."""
    vector = jnp.broadcast_to(vector, (*vector.shape[:2], grid.problem.kv_len))
    array = padded(vector, grid.num_kv * grid.block_kv, fill, axis=2)
    array = array.reshape(*array.shape[:2], grid.num_kv, 1, grid.block_kv)
    return BlockOperand(array, make_key_block(grid, array.dtype, *array.shape[:2]))


def _lay_out_tiles(grid: TpuFlashGrid, array: jax.Array) -> BlockOperand:
    """Make an operand of ``[B or 1, N or 1, T, S]``."""
    return BlockOperand(array, make_tile_block(grid, array.dtype, *array.shape[:2]))
