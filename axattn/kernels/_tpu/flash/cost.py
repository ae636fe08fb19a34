"""What a kernel does, for XLA's scheduler and for cost reports: `pl.CostEstimate`.

Blocks that a mask of static structure empties do not count. Where the structure is in arrays
(lengths, segments, offsets), all blocks do: an upper bound.
"""

from __future__ import annotations

from jax.experimental import pallas as pl

from axattn._call import AttentionCall
from axattn.kernels._block_bounds import blocks_per_tile
from axattn.kernels._tpu.flash.grid import Cut


def forward(call: AttentionCall, cut: Cut) -> pl.CostEstimate:
    """Two products; a block of keys is read once per block of queries of its whole group."""
    return _estimate(call, cut, head=1, value=1, rows_read=(1, 1), keys_written=0)


def fused(call: AttentionCall, cut: Cut) -> pl.CostEstimate:
    return _estimate(call, cut, head=3, value=2, rows_read=(2, 1), keys_written=1)


def query_grad(call: AttentionCall, cut: Cut) -> pl.CostEstimate:
    return _estimate(call, cut, head=2, value=1, rows_read=(2, 1), keys_written=0)


def key_grad(call: AttentionCall, cut: Cut) -> pl.CostEstimate:
    return _estimate(call, cut, head=2, value=2, rows_read=(1, 1), keys_written=0)


def _estimate(call, cut: Cut, *, head, value, rows_read, keys_written) -> pl.CostEstimate:
    """``head`` and ``value`` count products over the head sizes, ``rows_read`` arrays over rows."""
    problem, size = cut.problem, call.query.dtype.itemsize
    sizes = problem.head_dim, problem.value_head_dim
    visited = blocks_per_tile(call, cut.block_q, cut.block_kv, cut.major).sum()
    blocks = problem.batch * problem.num_heads * int(visited)
    pairs = blocks * cut.block_q * cut.block_kv
    rows = problem.batch * problem.num_heads * problem.q_len
    keys = problem.batch * problem.num_kv_heads * problem.kv_len
    of_rows = rows * sum(n * s for n, s in zip(rows_read, sizes, strict=True)) * size
    moved = blocks // problem.group
    if cut.major == "q":
        of_keys = moved * cut.block_kv * sum(sizes) * size
    else:
        of_rows = moved * cut.rows * sum(sizes) * size
        of_keys = 2 * keys * sum(sizes) * size
    return pl.CostEstimate(
        flops=2 * pairs * (head * sizes[0] + value * sizes[1]),
        transcendentals=pairs,
        bytes_accessed=of_rows + of_keys + keys * sum(sizes) * size * keys_written,
    )
