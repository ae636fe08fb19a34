"""Caches of every kind for tests, and what is in them, read without the library's own reader."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from axattn.cache import DenseCache, PagedCache, RingCache

KINDS = ("dense", "ring", "paged")
FLOATS = ("float32", "bfloat16", "float16")
QUANTIZED = ("int8", "float8_e4m3fn", "int4")

B, K, G, H, h = 3, 2, 3, 16, 8
N = K * G
PAGE = 8


def make(
    kind, *, capacity=48, batch=B, kv_heads=K, head_dim=H, max_append=16, window=None, **kwargs
):
    """An empty cache with room for ``capacity`` tokens (a multiple of 8); pages are shuffled."""
    kwargs = {"value_head_dim": h, "dtype": "float32", **kwargs}
    if kind == "dense":
        return DenseCache.create(batch, capacity, kv_heads, head_dim, **kwargs)
    if kind == "ring":
        window = capacity - 1 if window is None else window
        return RingCache.create(batch, window, kv_heads, head_dim, max_append=max_append, **kwargs)
    pages = capacity // PAGE
    cache = PagedCache.create(batch, batch * pages + 2, PAGE, pages, kv_heads, head_dim, **kwargs)
    table = np.random.default_rng(5).permutation(batch * pages + 2)[: batch * pages]
    return cache.with_table(table.reshape(batch, pages))


def tokens(
    length, *, batch=B, kv_heads=K, group=G, head_dim=H, value_dim=h, dtype="float32", seed=0
):
    """Query, key and value of so many tokens."""
    rng = np.random.default_rng(seed)
    shapes = (kv_heads * group, head_dim), (kv_heads, head_dim), (kv_heads, value_dim)
    return [jnp.asarray(rng.normal(size=(batch, length, *s)).astype(dtype)) for s in shapes]


append = jax.jit(lambda cache, k, v, n: cache.append(k, v, lengths=n))


def grown(cache, key, value, lengths, *, step=8):
    """The cache with so many of the tokens in each row; ``value`` is None where it is in the keys."""
    for at in range(0, key.shape[1], step):
        k, v = jax.tree.map(lambda x, at=at: x[:, at : at + step], (key, value))
        cache = append(cache, k, v, np.clip(lengths - at, 0, k.shape[1]).astype(np.int32))
    np.testing.assert_array_equal(cache.lengths, lengths)
    return cache


def float_dtype(dtype):
    """The dtype of the tokens that go into a cache of ``dtype``."""
    return "float32" if dtype in QUANTIZED else dtype


def _numbers(array, dtype):
    """Stored numbers as float64."""
    array = np.asarray(array)
    real = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}.get(dtype)
    if real is not None and array.dtype != real:
        array = array.view(real)
    return array.astype(np.float64)


def places(cache, b):
    """(row of the arrays, slot, position) of every token that row ``b`` holds."""
    length = int(cache.lengths[b])
    slots = cache.arrays.keys.shape[2]
    first = 0
    if isinstance(cache, RingCache):
        first = max(0, length - slots)
    for p in range(first, length):
        if isinstance(cache, PagedCache):
            yield int(cache.block_table[b, p // slots]), p % slots, p
        else:
            yield b, p % slots, p


def contents(cache):
    """Keys and values of all rows by position, float64 ``[B, longest, K, size]``; else 0."""
    longest = max(1, int(cache.lengths.max()))
    arrays = cache.arrays
    results = []
    for codes, scales, size in (
        (arrays.keys, arrays.key_scales, cache.head_dim),
        (arrays.values, arrays.value_scales, cache.value_head_dim),
    ):
        if codes is None:
            results.append(results[0][..., :size])
            continue
        numbers = _numbers(codes, cache.dtype)
        if scales is not None:
            numbers = numbers * np.asarray(scales, np.float64)[..., None]
        out = np.zeros((cache.batch, longest, numbers.shape[1], numbers.shape[3]))
        for b in range(cache.batch):
            for row, slot, position in places(cache, b):
                out[b, position] = numbers[row, :, slot]
        results.append(out)
    if cache.key_center is not None:
        results[0] = results[0] + np.asarray(cache.key_center, np.float64)
    return results


def poisoned(cache, room=0):
    """The cache with NaN, or garbage, wherever no token is, and a table to match.

    Rows keep the pages that ``room`` more tokens need.
    """
    used = np.zeros((cache.arrays.keys.shape[0], cache.arrays.keys.shape[2]), bool)
    for b in range(cache.batch):
        for row, slot, _ in places(cache, b):
            used[row, slot] = True
    garbage = {"uint8": 0x7F, "uint16": 0x7FC1, "int8": 99, "int4": 5}

    def poison(array):
        bad = np.asarray(garbage.get(str(array.dtype), np.nan)).astype(array.dtype)
        keep = used[:, None, :].reshape(len(used), 1, -1, *(1 for _ in array.shape[3:]))
        return jnp.asarray(np.where(keep, np.asarray(array), bad))

    changes = {"arrays": jax.tree.map(poison, cache.arrays)}
    if isinstance(cache, PagedCache):
        table, ends = np.array(cache.block_table), np.asarray(cache.lengths) + room
        for b in range(cache.batch):
            table[b, -(-int(ends[b]) // cache.page_size) :] = [10**6, -7, -1, 3][b % 4]
        changes["block_table"] = jnp.asarray(table)
    return dataclasses.replace(cache, **changes)
