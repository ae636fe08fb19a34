"""What the kernels say of their cost: arithmetic over the blocks that a mask leaves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn.cache import PagedCache
from axattn.kernels import _cost as shared
from axattn.kernels._hopper import cost
from tests.kernels.calls import call_of_cache, make_call

B, T, S, N, K, H, h = 2, 200, 300, 6, 2, 64, 32
BLOCK = 128, 64
MASKS = {
    "full": {},
    "causal": dict(is_causal=True),
    "window": dict(local_window_size=(70, 0)),
}


def count_scores(options):
    """Scores of the blocks of which a query attends to anything."""
    allowed = np.ones((T, S), bool)
    behind = np.arange(T)[:, None] - np.arange(S)
    if options:
        allowed = (behind >= 0) & (behind <= options.get("local_window_size", (S,))[0])
    rows, keys = (-(-n // b) for n, b in zip((T, S), BLOCK, strict=True))
    allowed = np.pad(allowed, ((0, rows * BLOCK[0] - T), (0, keys * BLOCK[1] - S)))
    blocks = allowed.reshape(rows, BLOCK[0], keys, BLOCK[1]).any((1, 3)).sum()
    return B * N * blocks * BLOCK[0] * BLOCK[1]


@pytest.mark.parametrize("mask", MASKS)
def test_flops_are_those_of_the_blocks_that_are_computed(mask):
    call = make_call(B, T, S, N, K, H, h, **MASKS[mask])
    pairs = count_scores(MASKS[mask])
    forward = cost.estimate_forward(call, {}, [], BLOCK)
    assert (forward.flops, forward.transcendentals) == (2 * pairs * (H + h), pairs)
    assert cost.estimate_query_grad(call, {}, call.query, BLOCK).flops == 2 * pairs * (2 * H + h)
    assert cost.estimate_key_grad(call, {}, [], BLOCK, split=False).flops == 2 * pairs * (
        2 * H + 2 * h
    )
    assert cost.estimate_key_grad(call, {}, [], BLOCK, split=True).flops == 2 * pairs * (
        3 * H + 2 * h
    )


def test_positions_are_data_and_a_soft_cap_is_a_function_more():
    positions = jnp.arange(T, dtype=jnp.int32)
    call = make_call(
        B, T, S, N, K, H, h, is_causal=True, q_positions=positions, logits_soft_cap=9.0
    )
    found = cost.estimate_forward(call, {}, [], BLOCK)
    assert (found.flops, found.transcendentals) == (
        2 * count_scores({}) * (H + h),
        2 * count_scores({}),
    )


def test_every_array_counts_once():
    call = make_call(B, T, S, N, K, H, h, dtype=jnp.float16)
    arrays = {"query": call.query, "key": call.key, "value": call.value, "high": jnp.zeros(8, int)}
    out = jax.ShapeDtypeStruct((B, T, N, h), jnp.float16)
    lse = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    found = cost.estimate_forward(call, arrays, [out, lse], BLOCK).bytes_accessed
    keys = 2 * B * S * K * (H + h)
    assert found == keys + 2 * B * T * N * (H + h) + 4 * B * N * T + arrays["high"].nbytes


@pytest.mark.parametrize("dtype, slot", [("bfloat16", 4 * H), ("int8", 2 * (H + 4))])
def test_pages_of_other_sequences_do_not_count(dtype, slot):
    cache = PagedCache.create(B, 100, 16, 4, K, H, dtype=dtype)
    call = call_of_cache(cache, jnp.zeros((B, 1, N, H), jnp.bfloat16))
    keys = B * K * 4 * 16 * slot
    assert shared.count_kv_bytes(call) == keys
    arrays = {"key": cache.arrays.keys, "query": call.query}
    found = cost.estimate_decode(call, arrays, [])
    assert found.bytes_accessed == keys + call.query.nbytes
    assert found.flops == 2 * B * N * 4 * 16 * 2 * H


def test_splits_are_combined_once():
    found = cost.estimate_combine([jnp.zeros((2, 1, 8, 64))], results=5 * 8, size=64)
    assert (found.flops, found.transcendentals) == (2 * 5 * 8 * 64, 5 * 8)
    assert found.bytes_accessed == 4 * (5 * 8 * 64 + 5 * 8 + 2 * 8 * 64)
