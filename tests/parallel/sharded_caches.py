"""Caches on meshes for tests, and the same ones on one device."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from axattn._sharded.axes import Axes
from axattn.cache import DenseCache, PagedCache
from axattn.parallel._sharded_cache import ShardedCache
from tests import caches
from tests.caches import PAGE, H, K, h

AXES = Axes(batch="data", heads="model", sequence="context")
B = 4


def make(kind, mesh, *, capacity=48, axes=AXES, batch=B, kv_heads=K, head_dim=H, **options):
    """An empty cache like that of `tests.caches.make`, on a mesh; each pool is shuffled."""
    options = {"value_head_dim": h, "dtype": "float32", "axes": axes, "mesh": mesh, **options}
    if kind == "dense":
        return ShardedCache.create(DenseCache, batch, capacity, kv_heads, head_dim, **options)
    pages = capacity // PAGE
    count = batch * pages + 2 * pools(axes, mesh)
    cache = ShardedCache.create(
        PagedCache, batch, count, PAGE, pages, kv_heads, head_dim, **options
    )
    rng, rows = np.random.default_rng(5), batch // pools(axes, mesh)
    tables = [rng.permutation(rows * pages + 2)[:-2] for _ in range(pools(axes, mesh))]
    return cache.with_table(np.concatenate(tables).reshape(batch, pages))


def pools(axes, mesh):
    return axes.size(mesh, "batch")


def _order(cache):
    """Where token p of a row (or page) lies, and how often each head is there."""
    shards = cache.axes.size(cache.mesh, "sequence")
    slots = np.arange(cache.cache.arrays.keys.shape[2])
    order = slots % shards * (len(slots) // shards) + slots // shards
    return order, cache.cache.arrays.keys.shape[1] // cache.num_kv_heads


def _first_pages(cache):
    """The first page of each row's pool, ``[B, 1]``."""
    ways = pools(cache.axes, cache.mesh)
    pages = cache.cache.arrays.keys.shape[0] // ways
    return np.arange(cache.batch)[:, None] // (cache.batch // ways) * pages


def gathered(cache):
    """The same cache on one device, its tokens in order; read without the library."""
    order, copies = _order(cache)
    arrays = jax.tree.map(lambda x: np.asarray(x)[:, ::copies, order], cache.cache.arrays)
    changes = {"arrays": arrays, "lengths": np.asarray(cache.lengths)}
    if isinstance(cache.cache, PagedCache):
        changes["block_table"] = np.asarray(cache.block_table) + _first_pages(cache)
    return dataclasses.replace(cache.cache, **changes)


def poisoned(cache):
    """The cache with NaN, or garbage, wherever no token is."""
    order, copies = _order(cache)
    bad = caches.poisoned(gathered(cache))
    back = np.argsort(order)

    def place(x):
        return np.repeat(np.asarray(x)[:, :, back], copies, axis=1)

    changes = {"arrays": jax.tree.map(place, bad.arrays)}
    changed = dataclasses.replace(cache, cache=dataclasses.replace(cache.cache, **changes))
    return jax.device_put(changed, cache.shardings)
