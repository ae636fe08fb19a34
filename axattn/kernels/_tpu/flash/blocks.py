"""What a flash kernel has in VMEM: the blocks of its arrays, and its scratch.

Kernels are called with these declarations, and `block_sizes` counts the same ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from axattn._call import AttentionCall
from axattn._mask_parts import Segments, Window
from axattn._typing import present
from axattn.kernels._masks import is_key_mask, list_dense_masks
from axattn.kernels._tpu.flash.grid import GridScalars, TpuFlashGrid, TpuFlashTiling
from axattn.kernels._tpu.layout import count_vmem_bytes

# Names the axis of an array that has all batch rows, or one for all of them.
BATCH_OR_ONE = "batch or one"


@dataclasses.dataclass(frozen=True)
class VmemBlock:
    """The block of an array that a step has in VMEM.

    ``axes`` has for each axis the field of `BlockIndices` that selects the block, or None if there
    is only one.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]

    def make_spec(self, grid: TpuFlashGrid, array: Any) -> pl.BlockSpec:
        """Return the spec for this array; its batch may be 1."""
        batch: dict[Any, str | None] = {BATCH_OR_ONE: "batch" if array.shape[0] > 1 else None}
        axes = [batch.get(axis, axis) for axis in self.axes]

        def index_map(b, h, tile, step, *scalars):
            at = grid.locate_blocks(b, h, tile, step, GridScalars(*scalars))
            return tuple(0 if axis is None else getattr(at, axis) for axis in axes)

        return pl.BlockSpec(self.shape, index_map)


class KernelOutput(NamedTuple):
    """The array that a kernel writes, and its block; None: it stays in HBM."""

    array: jax.ShapeDtypeStruct
    block: VmemBlock | None


class KernelMemory(NamedTuple):
    """Everything that a kernel has, by name."""

    inputs: Mapping[str, VmemBlock]
    outputs: Mapping[str, KernelOutput]
    scratch: Mapping[str, Any]

    def count_vmem_bytes(self, *, only_vectors: bool = False) -> int:
        """Return the bytes of two buffers of each block, and of the scratch."""
        outputs = [block for _, block in self.outputs.values() if block is not None]
        blocks, scratch = [*self.inputs.values(), *outputs], [*self.scratch.values()]
        if only_vectors:
            blocks = [block for block in blocks if block.shape[-2] == 1]
            scratch = [ref for ref in scratch if ref.shape[-2] == 1]
        return 2 * sum(map(count_vmem_bytes, blocks)) + sum(map(count_vmem_bytes, scratch))


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


def make_row_block(tiling: TpuFlashTiling, dtype: Any, heads: int = 1) -> VmemBlock:
    """Return the block of a vector over rows, for ``heads`` query heads or one for all."""
    has_heads = heads > 1 or tiling.problem.num_kv_heads == 1
    shape = (1, tiling.kv_heads if has_heads else 1, 1, 1, tiling.rows)
    axes = (BATCH_OR_ONE, "heads" if has_heads else None, "q", None, None)
    return VmemBlock(shape, dtype, axes)


def make_key_block(tiling: TpuFlashTiling, dtype: Any, heads: int = 1) -> VmemBlock:
    """Return the block of a vector over keys, for ``heads`` query heads or one for all."""
    shape = (1, tiling.heads if heads > 1 else 1, 1, 1, tiling.block_kv)
    return VmemBlock(shape, dtype, (BATCH_OR_ONE, "heads" if heads > 1 else None, "kv", None, None))


def make_tile_block(tiling: TpuFlashTiling, dtype: Any, heads: int = 1) -> VmemBlock:
    """Return the block of an array over queries and keys, for ``heads`` or one for all."""
    shape = (1, tiling.heads if heads > 1 else 1, tiling.block_q, tiling.block_kv)
    return VmemBlock(shape, dtype, (BATCH_OR_ONE, "heads" if heads > 1 else None, "q", "kv"))


# ---- inputs and outputs -----------------------------------------------------------------------


def declare_inputs(call: AttentionCall, tiling: TpuFlashTiling) -> dict[str, VmemBlock]:
    """Declare what every kernel reads, as `operands.make_inputs` makes it."""
    over_rows = functools.partial(make_row_block, tiling)
    over_keys = functools.partial(make_key_block, tiling)
    parts, bias, dtype = call.mask.parts, call.bias, present(call.key).dtype
    blocks = {
        "query": make_query_block(tiling, call.head_dim, call.query.dtype),
        "key": make_kv_block(tiling, call.head_dim, dtype),
        "value": make_kv_block(tiling, call.value_head_dim, present(call.value).dtype),
        "high": over_rows(jnp.int32),
    }
    if any(isinstance(part, Window) and part.left is not None for part in parts):
        blocks["low"] = over_rows(jnp.int32)
    if call.kv_positions is not None or any(map(is_key_mask, parts)):
        blocks["kv_positions"] = over_keys(jnp.int32)
    if any(isinstance(part, Segments) for part in parts):
        blocks["q_segments"] = over_rows(jnp.int32)
        blocks["kv_segments"] = over_keys(jnp.int32)
    if call.alibi_slopes is not None:
        blocks["q_positions"] = over_rows(jnp.int32)
        blocks["slopes"] = over_rows(jnp.float32, call.num_heads)
    if call.dropout_key is not None:
        heads = 1 if call.broadcast_dropout else call.num_heads
        blocks["dropout_rows"] = over_rows(jnp.int32, heads)
    dense = list_dense_masks(call)
    if dense:
        heads = max(array.shape[1] for array in dense)
        blocks["allowed"] = make_tile_block(tiling, jnp.int8, heads)
    if bias is None:
        return blocks
    if bias.shape[2] == 1:
        blocks["key_bias"] = over_keys(jnp.float32, bias.shape[1])
    elif bias.shape[3] == 1:
        blocks["row_bias"] = over_rows(jnp.float32, bias.shape[1])
    else:
        blocks["bias"] = make_tile_block(tiling, bias.dtype, bias.shape[1])
    return blocks


def declare_query_result(tiling: TpuFlashTiling, size: int, dtype: Any) -> KernelOutput:
    """Declare an output that `operands.restore_queries` returns as ``[B, T, N, size]``."""
    problem = tiling.problem
    tokens, heads = problem.q_len, problem.num_heads
    middle = (heads, tokens) if tiling.heads_first else (tokens, heads)
    array = jax.ShapeDtypeStruct((problem.batch, *middle, size), dtype)
    return KernelOutput(array, make_query_block(tiling, size, dtype))


def declare_key_result(
    tiling: TpuFlashTiling, size: int, dtype: Any, *, whole: bool = False
) -> KernelOutput:
    """Declare a gradient ``[B, K, S', size]``, which the kernel writes itself if ``whole``."""
    problem = tiling.problem
    shape = (problem.batch, problem.num_kv_heads, tiling.num_kv * tiling.block_kv, size)
    block = None if whole else make_kv_block(tiling, size, dtype)
    return KernelOutput(jax.ShapeDtypeStruct(shape, dtype), block)


def declare_lse(tiling: TpuFlashTiling) -> KernelOutput:
    """Declare an output that `operands.restore_rows` returns as ``[B, T, N]``."""
    batch, heads = tiling.problem.batch, tiling.problem.num_kv_heads
    array = jax.ShapeDtypeStruct((batch, heads, tiling.num_q, 1, tiling.rows), jnp.float32)
    return KernelOutput(array, make_row_block(tiling, jnp.float32, tiling.problem.num_heads))
