"""What the kernel over a cache has in VMEM: blocks, buffers and scratch.

The kernel is called with these declarations, and `block_sizes` counts the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from axattn._call import AttentionCall
from axattn._mask_parts import Segments, Window
from axattn._typing import present
from axattn.kernels._masks import is_key_mask, list_dense_masks
from axattn.kernels._tpu.cached.grid import CachedGrid
from axattn.kernels._tpu.layout import count_vmem_bytes


class CachedMemory(NamedTuple):
    """Everything that the kernel has in VMEM, by name."""

    inputs: Mapping[str, jax.ShapeDtypeStruct]  # the query and vectors over rows
    outputs: Mapping[str, jax.ShapeDtypeStruct]
    buffers: Mapping[str, Any]  # two of each array that is copied block by block
    scratch: Mapping[str, Any]

    def count_vmem_bytes(self) -> int:
        """Return the bytes of two buffers of each block, and of the scratch."""
        blocks = [*self.inputs.values(), *self.outputs.values()]
        scratch = [*self.buffers.values(), *self.scratch.values()]
        return 2 * sum(map(count_vmem_bytes, blocks)) + sum(map(count_vmem_bytes, scratch))

    def count_vector_bytes(self) -> int:
        """Return the part of these that are vectors over rows or keys."""
        blocks = [x for x in (*self.inputs.values(), *self.outputs.values()) if x.shape[3] == 1]
        buffers = [x for x in self.buffers.values() if len(x.shape) == 3]
        return 2 * sum(map(count_vmem_bytes, blocks)) + sum(map(count_vmem_bytes, buffers))


def declare_memory(call: AttentionCall, grid: CachedGrid) -> CachedMemory:
    """Declare what the kernel has in VMEM, from the static facts of a call."""
    tile = (grid.kv_heads, grid.rows)
    dtype = call.query.dtype if grid.num_splits == 1 else jnp.float32
    block = (1, grid.kv_heads, 1, grid.rows)
    query = jax.ShapeDtypeStruct((*block, call.head_dim), grid.problem.dtype)
    out = jax.ShapeDtypeStruct((*block, call.value_head_dim), dtype)
    return CachedMemory(
        {"query": query} | _declare_vectors(call, grid),
        {"out": out, "lse": _declare_vector(grid, jnp.float32, grid.kv_heads)},
        _declare_buffers(call, grid),
        {
            "sums": pltpu.VMEM((*tile, call.value_head_dim), jnp.float32),
            "state": pltpu.VMEM((*tile, 2), jnp.float32),  # maximum and sum
        },
    )


def _declare_vector(grid: CachedGrid, dtype: Any, heads: int = 1) -> jax.ShapeDtypeStruct:
    """Declare a vector over rows, of each key/value head or of all."""
    return jax.ShapeDtypeStruct((1, heads, 1, 1, grid.row_lanes), dtype)


def _declare_vectors(call: AttentionCall, grid: CachedGrid) -> dict[str, jax.ShapeDtypeStruct]:
    """Declare the vectors of `operands.make_row_vectors`."""
    shared = _declare_vector(grid, jnp.int32)
    each = _declare_vector(grid, jnp.float32, grid.kv_heads)
    parts, vectors = call.mask.parts, {"high": shared}
    if any(isinstance(part, Window) and part.left is not None for part in parts):
        vectors["low"] = shared
    if any(isinstance(part, Segments) for part in parts):
        vectors["q_segments"] = shared
    if call.alibi_slopes is not None:
        vectors["q_positions"] = shared
        vectors["slopes"] = each
    if call.sinks is not None:
        vectors["sinks"] = each
    if classify_bias(call) == "rows":
        heads = _count_heads(grid, present(call.bias))
        vectors["row_bias"] = _declare_vector(grid, jnp.float32, heads)
    if present(call.stored).key_center is not None:
        vectors["row_shift"] = each
    return vectors


def _declare_buffers(call: AttentionCall, grid: CachedGrid) -> dict[str, Any]:
    """Declare two buffers for a block of each array of `operands.make_sources`."""
    block_kv, parts, buffers = grid.block_kv, call.mask.parts, {}
    vector = pltpu.VMEM((2, 1, block_kv), jnp.int32)
    for name, array in present(call.stored).arrays._asdict().items():
        if array is None:
            continue
        shape: tuple[int, ...] = (2, grid.kv_heads, block_kv)  # of scales
        if array.ndim == 4 and name in grid.slots_last:
            shape = (2, grid.kv_heads, array.shape[-1], block_kv)
        elif array.ndim == 4:
            slots = (grid.copies_per_block, grid.copy_size)
            shape = (2, grid.kv_heads, *slots, array.shape[-1])
        buffers[name] = pltpu.VMEM(shape, array.dtype)
    if call.kv_positions is not None or any(map(is_key_mask, parts)):
        buffers["kv_positions"] = vector
    if any(isinstance(part, Segments) for part in parts):
        buffers["kv_segments"] = vector
    if classify_bias(call) == "keys":
        buffers["key_bias"] = pltpu.VMEM((2, 1, block_kv), jnp.float32)
    elif classify_bias(call) == "both":
        heads = _count_heads(grid, present(call.bias))
        buffers["bias"] = pltpu.VMEM((2, heads, grid.rows, block_kv), jnp.float32)
    dense = list_dense_masks(call)
    if dense:
        heads = max(_count_heads(grid, array) for array in dense)
        shape = (2, heads, grid.rows, block_kv)
        buffers["allowed"] = pltpu.VMEM(shape, choose_mask_dtype(grid))
    return buffers


def _count_heads(grid: CachedGrid, array: Any) -> int:
    """Return the key/value heads of an array ``[B or 1, N or 1, ...]``, or 1 for all."""
    return grid.kv_heads if array.shape[1] > 1 else 1


def choose_mask_dtype(grid: CachedGrid) -> Any:
    """Return bytes if rows are whole memory tiles of bytes, else words."""
    return jnp.int8 if grid.rows % 32 == 0 else jnp.int32


def classify_bias(call: AttentionCall) -> str | None:
    """Return what a bias varies over: "rows", "keys" (the same for all heads) or "both"."""
    if call.bias is None:
        return None
    if call.bias.shape[3] == 1:
        return "rows"
    return "keys" if call.bias.shape[1:3] == (1, 1) else "both"
