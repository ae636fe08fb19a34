"""What a kernel does, for XLA's scheduler and for cost reports: `pl.CostEstimate`.

FLOPs count the blocks that are computed. Blocks that a static mask empties do not count; where
the mask is in arrays (lengths, segments, offsets) all blocks do: an upper bound. Bytes are those of
HBM: every array counts once, since what programs read again comes from L2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.experimental.pallas import CostEstimate as Estimate

from axattn._call import AttentionCall
from axattn.kernels import _cost
from axattn.kernels._block_bounds import bound_blocks

Arrays = Mapping[str, Any]
BlockShape = tuple[int, int]  # query rows, keys


def estimate_forward(
    call: AttentionCall, arrays: Arrays, out: Sequence[Any], block: BlockShape
) -> Estimate:
    """Estimate the forward kernel: two products."""
    return _estimate_products(call, arrays, out, block, "q", head=1, value=1)


def estimate_query_grad(
    call: AttentionCall, arrays: Arrays, out: Any, block: BlockShape
) -> Estimate:
    """Estimate three products: scores, gradients of weights and of queries."""
    return _estimate_products(call, arrays, [out], block, "q", head=2, value=1)


def estimate_key_grad(
    call: AttentionCall, arrays: Arrays, out: Sequence[Any], block: BlockShape, *, split: bool
) -> Estimate:
    """Estimate four products, or (``split``) five: both warpgroups compute the scores."""
    return _estimate_products(call, arrays, out, block, "kv", head=3 if split else 2, value=2)


def _estimate_products(call, arrays, out, block, major: str, *, head: int, value: int) -> Estimate:
    """Estimate ``head`` products over the head size, and ``value`` over that of the values."""
    block_q, block_kv = block
    blocks = int(bound_blocks(call, block_q, block_kv, major).sum())
    pairs = call.batch * call.num_heads * blocks * block_q * block_kv
    return Estimate(
        flops=2 * pairs * (head * call.head_dim + value * call.value_head_dim),
        transcendentals=pairs * _cost.count_transcendentals(call),
        bytes_accessed=_count_bytes(call, arrays, out),
    )


def estimate_decode(call: AttentionCall, arrays: Arrays, out: Sequence[Any]) -> Estimate:
    """Estimate a decode kernel: both products over all slots, without padded rows."""
    all_keys = _cost.estimate_all_keys(call)
    return dataclasses.replace(all_keys, bytes_accessed=_count_bytes(call, arrays, out))


def estimate_combine(out: Sequence[Any], *, results: int, size: int) -> Estimate:
    """Estimate a weighted sum of ``results`` float32 vectors of ``size`` numbers with LSEs."""
    return Estimate(
        flops=2 * results * size,
        transcendentals=results,
        bytes_accessed=4 * results * (size + 1) + _sum_bytes(out),
    )


def _count_bytes(call: AttentionCall, arrays: Arrays, out: Sequence[Any]) -> int:
    """Return the bytes of all arrays, but of a cache only those of the batch's slots."""
    stored = ("key", "value", "key_scales", "value_scales")
    others = [array for name, array in arrays.items() if name not in stored]
    return _cost.count_kv_bytes(call) + _sum_bytes([*others, *out])


def _sum_bytes(arrays: Sequence[Any]) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)
