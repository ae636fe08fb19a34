"""Caches through their own door, and under ``vmap``."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn.cache import DenseCache, PagedCache

pytestmark = pytest.mark.ci

LENGTHS = np.array([70, 9])


def dense(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    k, v = (jnp.asarray(rng.normal(size=(2, 70, 2, 128)).astype(jnp.float32)) for _ in range(2))
    cache = DenseCache.create(2, 128, 2, 128, dtype=dtype)
    return cache.append(k, v, lengths=LENGTHS)


def paged(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    k, v = (jnp.asarray(rng.normal(size=(2, 70, 2, 128)).astype(jnp.float32)) for _ in range(2))
    cache = PagedCache.create(2, 20, 16, 8, 2, 128, dtype=dtype)
    table = rng.permutation(20)[:16].reshape(2, 8).astype(np.int32)
    return cache.with_table(table).append(k, v, lengths=LENGTHS)


def query(seed=1, tokens=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(2, tokens, 4, 128)).astype(jnp.float32))


def alike(run, tolerance=1e-5):
    np.testing.assert_allclose(run("mosaic_tpu"), run("xla_chunked"), tolerance, tolerance)


@pytest.mark.parametrize("make, dtype", [(dense, "float32"), (paged, "int8")])
def test_attend(interpreted, make, dtype):
    """The kernel is what a cache's own ``attend`` calls."""
    cache = make(dtype=dtype)
    alike(
        lambda name: cache.attend(query(), implementation=name), 0.02 if dtype == "int8" else 1e-5
    )


def test_vmap_over_caches(interpreted):
    """Pages of several pools are counted through."""
    caches = jax.tree.map(lambda *x: jnp.stack(x), paged(0), paged(5))
    queries = jnp.stack([query(1), query(2)])

    def run(name):
        return jax.jit(jax.vmap(lambda c, q: c.attend(q, implementation=name)))(caches, queries)

    alike(run)


@pytest.mark.parametrize("make", [dense, paged])
def test_vmap_over_queries(interpreted, make):
    """One cache for several queries: pages are shared, rows are read one query after another."""
    cache, queries = make(), jnp.stack([query(1), query(2), query(3)])

    def run(name):
        return jax.jit(jax.vmap(lambda q: cache.attend(q, implementation=name)))(queries)

    alike(run)


def test_vmap_over_tables(interpreted):
    cache = paged()
    tables = jnp.stack([cache.block_table, cache.block_table[::-1]])

    def run(name):
        def attend(table):
            return dataclasses.replace(cache, block_table=table).attend(
                query(), implementation=name
            )

        return jax.jit(jax.vmap(attend))(tables)

    alike(run)
