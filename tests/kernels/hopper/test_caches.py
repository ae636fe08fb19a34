"""Decode over caches and arrays: how keys are split among processors, and what calls it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from tests import caches
from tests.cache.test_attend import check
from tests.kernels import cached
from tests.kernels.cached import LENGTHS, attend_and_check, queries

pytestmark = pytest.mark.ci

H = 64

filled = functools.partial(cached.filled, head_dim=H, value_dim=H)
attend = functools.partial(cached.attend, "mosaic_gpu")


def test_fixed_splits_are_batch_invariant(interpreted):
    """A row has the same bits alone and among others; the same call twice, always."""
    cache, query = filled("paged"), queries(1, 6, H)
    split = functools.partial(attend, kv_split_size=64)
    out, lse = split(cache, query)
    check(query, None, cache, out, lse, first=LENGTHS - 1)
    alone, alone_lse = split(cache.fork(np.array([1])), query[1:2])
    np.testing.assert_array_equal(alone[0], out[1])
    np.testing.assert_array_equal(alone_lse[0], lse[1])
    whole = attend(cache, query, kv_split_size=2**40)  # one split
    np.testing.assert_allclose(np.float32(whole[0]), np.float32(out), atol=0.02)
    jax.tree.map(np.testing.assert_array_equal, split(cache, query), (out, lse))


def test_many_splits(interpreted):
    """More results of a sequence than one warpgroup combines, beside sequences with few."""
    lengths = np.array([1290, 65, 0])
    cache = filled("dense", lengths=lengths, kv_heads=1, capacity=1296)
    sinks = np.array([0.5, -0.5], np.float32)
    attend_and_check(
        "mosaic_gpu", cache, queries(1, 2, H), lengths, dict(sinks=sinks), kv_split_size=64, sinks=sinks
    )  # fmt: skip


def test_decode_over_arrays(interpreted):
    """Keys and values as a caller has them: lengths behind which there is NaN, odd S."""
    cache = filled("dense", lengths=np.array([200, 65, 1]))
    query, lengths = queries(2, 6, H), np.array([199, 65, 1])
    k, v = (jnp.asarray(x[:, :199], jnp.bfloat16) for x in caches.contents(cache))
    behind = np.arange(199)[:, None, None] >= lengths[:, None, None, None]
    k, v = (jnp.where(behind, jnp.nan, x) for x in (k, v))

    def program(implementation, *arrays):
        return axattn.dot_product_attention(
            *arrays,
            key_value_seq_lengths=lengths,
            implementation=implementation,
            return_residual=True,
        )

    out, lse = jax.jit(functools.partial(program, "mosaic_gpu"))(query, k, v)
    plain, plain_lse = jax.jit(functools.partial(program, "xla"))(query, k, v)
    np.testing.assert_allclose(np.float32(out), np.float32(plain), atol=0.02)
    np.testing.assert_allclose(lse, plain_lse, atol=1e-4)


def test_vmap(interpreted):
    """A cache per element."""
    of_each = [filled("dense", lengths=n) for n in (LENGTHS, LENGTHS[::-1].copy())]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *of_each)
    query = jnp.stack([queries(1, 6, H), queries(1, 6, H, seed=4)])
    outs, _ = jax.vmap(attend)(stacked, query)
    for cache, q, out in zip(of_each, query, outs, strict=True):
        want = cache.attend(q, implementation="xla_chunked")
        np.testing.assert_allclose(np.float32(out), np.float32(want), atol=0.02, rtol=0.02)
