"""What the flash kernels compute and move, for XLA's scheduler and to choose block sizes."""

from __future__ import annotations

import dataclasses

from jax.experimental import pallas as pl

from axattn._call import AttentionCall
from axattn.kernels._block_bounds import bound_blocks
from axattn.kernels._tpu.flash.grid import TpuFlashGrid


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """Counts of one kernel: products per pair of blocks, and arrays read or written."""

    major: str  # the side of the outer loop, "q" or "kv"
    key_products: int  # over the key head size
    value_products: int  # over the value head size
    query_arrays: tuple[int, int]  # [B, T, N, H] and [B, T, N, h]
    keys_written: int  # gradients of all keys and values at the end
    live_scores: int  # tiles of float32 scores that are alive at once


FORWARD = KernelWork("q", 1, 1, (1, 1), 0, 3)
FUSED = KernelWork("q", 3, 2, (2, 1), 1, 5)
QUERY_GRAD = KernelWork("q", 2, 1, (2, 1), 0, 5)
KEY_GRAD = KernelWork("kv", 2, 2, (1, 1), 0, 5)


def estimate_cost(call: AttentionCall, grid: TpuFlashGrid, work: KernelWork) -> pl.CostEstimate:
    """Estimate a kernel; a block of keys is read once per query block of its whole group.

    Blocks that a static mask makes empty are not counted. Masks that depend on arrays (lengths,
    segments, offsets) count in full: an upper bound.
    """
    problem, itemsize = grid.problem, call.query.dtype.itemsize
    sizes = problem.head_dim, problem.value_head_dim
    per_tile = bound_blocks(call, grid.block_q, grid.block_kv, grid.major)
    blocks = problem.batch * problem.num_heads * int(per_tile.sum())
    pairs = blocks * grid.block_q * grid.block_kv
    rows = problem.batch * problem.num_heads * problem.q_len
    keys = problem.batch * problem.num_kv_heads * problem.kv_len
    loaded = blocks // problem.group
    if grid.major == "q":
        arrays = zip(work.query_arrays, sizes, strict=True)
        row_bytes = rows * sum(count * size for count, size in arrays) * itemsize
        key_bytes = loaded * grid.block_kv * sum(sizes) * itemsize
    else:
        row_bytes = loaded * grid.rows * sum(sizes) * itemsize
        key_bytes = 2 * keys * sum(sizes) * itemsize
    written = work.keys_written * keys * sum(sizes) * itemsize
    return pl.CostEstimate(
        flops=2 * pairs * (work.key_products * sizes[0] + work.value_products * sizes[1]),
        transcendentals=pairs,
        bytes_accessed=row_bytes + key_bytes + written,
    )
