"""Packed rows: row r of a key/value head is token r // G of head r % G, in every operand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.calls import make_call

pytest.importorskip("axattn.kernels._hopper.split_kv.pack_gqa", exc_type=ImportError)

from axattn.kernels._hopper.split_kv.pack_gqa import PackGQA, gather_packed_operands


def arrays_of(call):
    return jax.tree.map(np.asarray, jax.jit(lambda: gather_packed_operands(call).arrays)())


@pytest.mark.parametrize("T, N, K", [(1, 8, 2), (3, 6, 2), (5, 64, 2), (2, 4, 4)])
def test_rows(T, N, K):
    S, B, G = 40, 2, N // K
    rng = np.random.default_rng(0)
    bias = rng.normal(size=(B, N, T, S)).astype(np.float32)
    slopes = rng.random((B, N)).astype(np.float32)
    call = make_call(
        B, T, S, N, K, 16, bias=bias, alibi_slopes=slopes, is_causal=True, q_offset=np.array([3, 9])
    )
    arrays = arrays_of(call)
    packing = PackGQA(G, T)
    assert packing.stored_rows % 8 == 0 and packing.tiles * 64 >= packing.rows
    query = arrays["query"].astype(np.float32).reshape(B, K, packing.stored_rows, 16)
    given = np.asarray(call.query, np.float32)
    for b in range(B):
        for k in range(K):
            for row in range(packing.rows):
                t, n = row // G, k * G + row % G
                np.testing.assert_array_equal(query[b, k, row], given[b, t, n])
                np.testing.assert_array_equal(arrays["bias"][b, k, row, :S], bias[b, n, t])
                assert arrays["row_slopes"][b, k, row] == slopes[b, n]
                assert arrays["high"][b, row] == [3, 9][b] + t + 1
                assert arrays["q_positions"][b, row] == [3, 9][b] + t
    # Rows behind attend to nothing.
    assert (arrays["high"][:, packing.rows :] < 0).all()


def test_a_bias_per_head_and_key_becomes_one_per_row():
    bias = np.random.default_rng(0).normal(size=(1, 4, 1, 40)).astype(np.float32)
    arrays = arrays_of(make_call(1, 2, 40, 4, 2, 16, bias=bias))
    assert "key_bias" not in arrays
    for row in range(4):
        for k in range(2):
            want = bias[0, 2 * k + row % 2, 0]
            np.testing.assert_array_equal(arrays["bias"][0, k, row, :40], want)
    same = arrays_of(make_call(1, 2, 40, 4, 2, 16, bias=jnp.asarray(bias[:, :1])))
    assert "bias" not in same and same["key_bias"].shape[1] == 1
