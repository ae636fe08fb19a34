"""One shard's part of a cache, inside a ``shard_map`` of the user."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import axattn
from axattn import parallel
from axattn.cache import DenseCache, PagedCache, RingCache
from axattn.parallel._striped_cache import StripedCache

SHARDS, B, N, K, H = 4, 2, 8, 2, 16
LENGTH, SLOTS = 23, 8  # slots of a shard: 32 in all


def make(kind):
    sizes = dict(num_kv_heads=K, head_dim=H, dtype="float32")
    if kind == "dense":
        return StripedCache(DenseCache.create(B, SLOTS, **sizes), "context")
    cache = StripedCache(PagedCache.create(B, 2 * B, 4, 2, **sizes), "context")
    return cache.with_table(np.arange(2 * B)[::-1].reshape(B, 2))


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_a_prompt_and_tokens(mesh_of, kind):
    rng = np.random.default_rng(2)
    arrays = [
        jnp.asarray(rng.normal(size=(B, LENGTH, n, H)).astype(jnp.float32)) for n in (N, K, K)
    ]

    def run(q, k, v):
        cache, outs = make(kind), []
        for first, last in ((0, 10), (10, 11), (11, 12), (12, LENGTH)):
            at = slice(first, last)
            out, cache = cache.extend(q[:, at], k[:, at], v[:, at])
            outs.append(out)
        assert cache.capacity == SHARDS * SLOTS and cache.nbytes == SLOTS * B * K * H * 8
        refused = cache.append(k[:, :10], v[:, :10])
        return outs, (refused.lengths, refused.overflowed), cache.fork([1]).cache.arrays

    run = jax.shard_map(
        run, mesh=mesh_of(context=SHARDS), in_specs=P(), out_specs=(P(), P(), P("context"))
    )
    outs, (lengths, overflowed), _ = jax.jit(run)(*arrays)
    want = axattn.dot_product_attention(*arrays, is_causal=True)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=2e-5)
    assert lengths.tolist() == [LENGTH] * B and overflowed.all()


def test_the_deprecated_name():
    with pytest.warns(DeprecationWarning, match=r"use axattn\.parallel\.StripedCache"):
        assert parallel.DealtCache is StripedCache
    assert "DealtCache" not in parallel.__all__
    with pytest.raises(AttributeError, match="no attribute 'Dealt'"):
        parallel.Dealt  # noqa: B018


def test_rings_stay_whole():
    with pytest.raises(ValueError, match="cache takes a dense or a paged one"):
        StripedCache(RingCache.create(1, 4, 1, 8), "context")
