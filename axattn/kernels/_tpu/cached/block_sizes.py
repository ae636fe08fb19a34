"""The calls over caches that the kernel takes, and their block sizes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from axattn import _quantization
from axattn._call import AttentionCall
from axattn._typing import present
from axattn.kernels._problem import round_up
from axattn.kernels._tpu.cached.blocks import CachedMemory, declare_memory
from axattn.kernels._tpu.cached.copies import SCALES
from axattn.kernels._tpu.cached.grid import (
    CachedBlockSizes,
    CachedGrid,
    find_slots_last,
    make_cached_grid,
)
from axattn.kernels._tpu.layout import LANES, count_vmem_bytes

# Up to this many tokens are one tile, if they do not have too many rows.
DECODE_TOKENS = 16

# Rows of all heads of a group in a tile: enough for the matrix unit to keep up with memory.
MOST_ROWS = 1024
PREFILL_ROWS = 512

# Bytes of a block of keys and values that are worth a copy.
BLOCK_BYTES = 2 * 2**20

BLOCKS = (2048, 1024, 512, 256, 128)

# The block table is kept in scalar memory, which has 1 MiB.
MOST_PAGES = 2**17


def find_cache_refusal(call: AttentionCall) -> str | None:
    """Return why the kernel does not take this cache, or None."""
    stored = present(call.stored)
    if stored.dtype not in ("bfloat16", "float32", *_quantization.LIMITS):
        return f"does not support a cache of {stored.dtype}"
    where = "a row" if stored.block_table is None else "a page"
    if stored.page_size % 8:
        return f"needs slots of {where} in a multiple of 8, got {stored.page_size}"
    for name, size in (("head", call.head_dim), ("value head", call.value_head_dim)):
        if size % 8:
            return f"needs a {name} size that is a multiple of 8 over a cache, got {size}"
    if stored.page_size % LANES and find_slots_last(call):
        return (
            f"needs slots of {where} in a multiple of {LANES} for head sizes of {call.head_dim} "
            f"and {call.value_head_dim}, which a TPU lays out slots last, got {stored.page_size}"
        )
    if stored.block_table is not None and stored.block_table.size > MOST_PAGES:
        return f"takes at most {MOST_PAGES} pages of all rows, got {stored.block_table.size}"
    if call.dropout_key is not None:
        return "does not support dropout over a cache"
    return None


def choose_block_sizes(call: AttentionCall, vmem_bytes: int) -> CachedBlockSizes:
    """Return sizes for a core with so much VMEM: large blocks of keys, then many queries."""
    budget = vmem_bytes * 3 // 4
    longest = round_up(call.kv_len, LANES)
    for block_q in _list_query_blocks(call):
        for block_kv in BLOCKS:
            if block_kv > max(longest, BLOCKS[-1]):
                continue
            sizes = CachedBlockSizes(block_q, block_kv)
            grid = make_cached_grid(call, sizes, 1)
            if _count_slot_bytes(call, grid) * block_kv > BLOCK_BYTES and block_kv > BLOCKS[-1]:
                continue
            needed = estimate_vmem_bytes(call, grid)
            if needed <= budget:
                limit = None if needed <= 10 * 2**20 else min(2 * needed, vmem_bytes * 15 // 16)
                return dataclasses.replace(sizes, vmem_limit=limit)
    return dataclasses.replace(sizes, vmem_limit=vmem_bytes * 15 // 16)


def _list_query_blocks(call: AttentionCall) -> list[int]:
    """Return the query tokens of a tile that are tried, the best first."""
    most = max(1, MOST_ROWS // call.group)
    if call.q_len <= min(DECODE_TOKENS, most):
        first = call.q_len
    else:
        first = max(8, min(round_up(call.q_len, 8), PREFILL_ROWS // call.group // 8 * 8))
    smaller = [2**n for n in range(12, -1, -1) if 2**n < first]
    return [first, *(n for n in smaller if n >= min(8, first) or first <= DECODE_TOKENS)]


def _count_slot_bytes(call: AttentionCall, grid: CachedGrid) -> int:
    """Return the bytes of one slot of all heads in VMEM, where rows are whole lanes."""
    sizes = [call.head_dim]
    if present(call.stored).arrays.values is not None:
        sizes.append(call.value_head_dim)
    return grid.kv_heads * sum(
        _quantization.bytes_per_vector(grid.stored_dtype, round_up(size, LANES)) for size in sizes
    )


def estimate_vmem_bytes(call: AttentionCall, grid: CachedGrid) -> int:
    """Return the bytes of what the kernel declares, and an estimate of the rest."""
    memory = declare_memory(call, grid)
    return memory.count_vmem_bytes() + _estimate_product_bytes(call, grid, memory)


def _estimate_product_bytes(call: AttentionCall, grid: CachedGrid, memory: CachedMemory) -> int:
    """Estimate the values of one product that the compiler keeps in VMEM."""
    tile = grid.rows * grid.block_kv * 4
    # The numbers that codes become.
    itemsize = jnp.dtype(grid.problem.dtype).itemsize
    if _quantization.is_quantized(grid.stored_dtype):
        itemsize += 4
    sizes = round_up(call.head_dim, LANES) + round_up(call.value_head_dim, LANES)
    total = grid.heads_per_product * grid.block_kv * sizes * itemsize
    # Blocks with the slots last, transposed to rows of whole lanes.
    for name in grid.slots_last:
        buffer = memory.buffers[name]
        rows = (*buffer.shape[:2], grid.block_kv, buffer.shape[2])
        transposed = count_vmem_bytes(jax.ShapeDtypeStruct(rows, buffer.dtype))
        total += transposed - count_vmem_bytes(buffer)
    # A mask as 32-bit numbers, for each head.
    if "allowed" in memory.buffers:
        total += 2 * grid.kv_heads * tile - count_vmem_bytes(memory.buffers["allowed"])
    # Scores, weights, and vectors over rows and keys, those that are declared among them.
    scales = [array for array in memory.buffers if array in SCALES]
    vectors = 5 * grid.heads_per_product * tile + 8 * len(scales) * grid.kv_heads * grid.block_kv
    return total + max(0, vectors - memory.count_vector_bytes())
