"""What a flash kernel computes and moves, for XLA's scheduler and for cost reports.

Blocks that a static mask makes empty are not counted. Masks that depend on arrays (lengths,
segments, offsets) count in full: an upper bound.
"""

from __future__ import annotations

from jax.experimental import pallas as pl

from axattn._call import AttentionCall
from axattn.kernels._block_bounds import blocks_per_tile
from axattn.kernels._tpu.flash.grid import TpuFlashGrid


def estimate_forward(call: AttentionCall, grid: TpuFlashGrid) -> pl.CostEstimate:
    """Count two products; a block of keys is read once per query block of its whole group."""
    return _estimate(call, grid, head=1, value=1, rows_read=(1, 1), keys_written=0)


def estimate_fused(call: AttentionCall, grid: TpuFlashGrid) -> pl.CostEstimate:
    return _estimate(call, grid, head=3, value=2, rows_read=(2, 1), keys_written=1)


def estimate_query_grad(call: AttentionCall, grid: TpuFlashGrid) -> pl.CostEstimate:
    return _estimate(call, grid, head=2, value=1, rows_read=(2, 1), keys_written=0)


def estimate_key_grad(call: AttentionCall, grid: TpuFlashGrid) -> pl.CostEstimate:
    return _estimate(call, grid, head=2, value=2, rows_read=(1, 1), keys_written=0)


def _estimate(call, grid: TpuFlashGrid, *, head, value, rows_read, keys_written):
    """Count ``head`` and ``value`` products over the head sizes, and ``rows_read`` query arrays."""
    problem, size = grid.problem, call.query.dtype.itemsize
    sizes = problem.head_dim, problem.value_head_dim
    per_tile = blocks_per_tile(call, grid.block_q, grid.block_kv, grid.major)
    blocks = problem.batch * problem.num_heads * int(per_tile.sum())
    pairs = blocks * grid.block_q * grid.block_kv
    rows = problem.batch * problem.num_heads * problem.q_len
    keys = problem.batch * problem.num_kv_heads * problem.kv_len
    row_bytes = rows * sum(n * s for n, s in zip(rows_read, sizes, strict=True)) * size
    loaded = blocks // problem.group
    if grid.major == "q":
        key_bytes = loaded * grid.block_kv * sum(sizes) * size
    else:
        row_bytes = loaded * grid.rows * sum(sizes) * size
        key_bytes = 2 * keys * sum(sizes) * size
    return pl.CostEstimate(
        flops=2 * pairs * (head * sizes[0] + value * sizes[1]),
        transcendentals=pairs,
        bytes_accessed=row_bytes + key_bytes + keys * sum(sizes) * size * keys_written,
    )
