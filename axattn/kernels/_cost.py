"""Cost estimates from static shapes, for the kernels of all machines."""

from __future__ import annotations

from jax.experimental import pallas as pl

from axattn import _quantization
from axattn._call import AttentionCall
from axattn._typing import present


def estimate_all_keys(call: AttentionCall) -> pl.CostEstimate:
    """Estimate both products over all slots, and the bytes of the batch's slots, read once.

    It is an upper bound: how many slots are in use is data.
    """
    pairs = call.batch * call.num_heads * call.q_len * call.kv_len
    sizes = call.head_dim + call.value_head_dim
    outer = call.batch * call.q_len * call.num_heads * sizes * call.query.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * pairs * sizes,
        transcendentals=pairs * count_transcendentals(call),
        bytes_accessed=count_kv_bytes(call) + outer,
    )


def count_transcendentals(call: AttentionCall) -> int:
    """Count transcendental functions per score: the softmax's, and the soft cap's."""
    return 1 if call.logits_soft_cap is None else 2


def count_kv_bytes(call: AttentionCall) -> int:
    """Count the bytes of the batch's keys and values, with their scales."""
    slots = call.batch * call.num_kv_heads * call.kv_len
    if call.stored is None:
        sizes = call.head_dim + call.value_head_dim
        return slots * sizes * present(call.key).dtype.itemsize
    own = [call.head_dim] + [call.value_head_dim] * (call.stored.arrays.values is not None)
    return slots * sum(_quantization.bytes_per_vector(call.stored.dtype, size) for size in own)
