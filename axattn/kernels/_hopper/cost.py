"""What a kernel does, for XLA's scheduler and for cost reports: `pl.CostEstimate`.

FLOPs are those of the blocks that are visited. Blocks that a mask of static structure empties do
not count; where it is in arrays (lengths, segments, offsets) all blocks do: an upper bound.
Bytes are those of HBM: every array once, since what blocks of work read again comes from L2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.experimental.pallas import CostEstimate as Estimate

from axattn._call import AttentionCall
from axattn.kernels import _cost
from axattn.kernels._block_bounds import blocks_per_tile

Arrays = Mapping[str, Any]
Block = tuple[int, int]  # query rows and keys of a tile of scores


def forward(call: AttentionCall, arrays: Arrays, out: Sequence[Any], block: Block) -> Estimate:
    """Two products."""
    return _tiles(call, arrays, out, block, "q", head=1, value=1)


def query_grad(call: AttentionCall, arrays: Arrays, out: Any, block: Block) -> Estimate:
    """Three products: scores, gradients of weights and of queries."""
    return _tiles(call, arrays, [out], block, "q", head=2, value=1)


def key_grad(
    call: AttentionCall, arrays: Arrays, out: Sequence[Any], block: Block, *, split: bool
) -> Estimate:
    """Four products; where two warpgroups ``split`` the gradients, both compute the scores."""
    return _tiles(call, arrays, out, block, "kv", head=3 if split else 2, value=2)


def _tiles(call, arrays, out, block, major: str, *, head: int, value: int) -> Estimate:
    """``head`` and ``value`` count products over the head sizes."""
    block_q, block_kv = block
    visited = int(blocks_per_tile(call, block_q, block_kv, major).sum())
    pairs = call.batch * call.num_heads * visited * block_q * block_kv
    return Estimate(
        flops=2 * pairs * (head * call.head_dim + value * call.value_head_dim),
        transcendentals=pairs * _cost.per_score(call),
        bytes_accessed=_once(call, arrays, out),
    )


def few_rows(call: AttentionCall, arrays: Arrays, out: Sequence[Any]) -> Estimate:
    """The decode kernels: both products over all slots, for the rows that there are."""
    all_keys = _cost.over_all_keys(call)
    return dataclasses.replace(all_keys, bytes_accessed=_once(call, arrays, out))


def merge(out: Sequence[Any], *, results: int, size: int) -> Estimate:
    """A weighted sum of ``results`` float32 vectors of ``size`` numbers, each with its LSE."""
    return Estimate(
        flops=2 * results * size,
        transcendentals=results,
        bytes_accessed=4 * results * (size + 1) + _bytes(out),
    )


def _once(call: AttentionCall, arrays: Arrays, out: Sequence[Any]) -> int:
    """Of a cache's arrays, which may hold more, the slots of the batch."""
    of_keys = ("key", "value", "key_scales", "value_scales")
    others = [array for name, array in arrays.items() if name not in of_keys]
    return _cost.key_bytes(call) + _bytes([*others, *out])


def _bytes(arrays: Sequence[Any]) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)
