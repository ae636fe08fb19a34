"""Full caches of random tokens, made where they are, and queries for them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from axattn import _quantization
from axattn._stored import UNUSED_POSITION, KeyValueArrays
from axattn.cache import Cache, DenseCache, PagedCache, RingCache
from benchmarks.harness.decode_cases import Case

# Sets of inputs that take turns come to this much, far more than an L2 of 50 MB; they are an odd
# number, as a timer that warms up calls twice, and would time every other one of an even number.
_SETS_BYTES = 512 << 20
_FEWEST_SETS, _MOST_SETS = 3, 15
# What a ring takes at a time.
_MAX_APPEND = 16
# Elements that are drawn at a time: the whole of a cache in float32 is twice the cache.
_CHUNK = 1 << 24


class Inputs(NamedTuple):
    """What one call is given."""

    query: jax.Array  # bfloat16 [B, T, N, H]
    cache: Cache
    mask: jax.Array | None  # bool [B, 1, T, S] over the slots


def pages_needed(case: Case) -> np.ndarray:
    """int [B]: pages that each row uses."""
    return -(-case.lengths() // case.page)


def empty(case: Case) -> Cache:
    """The cache before any token. A pool has a quarter more pages than are used."""
    sizes = (case.kv_heads, case.head_dim)
    options = {
        "value_head_dim": case.value_size,
        "values_in_keys": case.latent,
        "dtype": case.dtype,
    }
    match case.kind:
        case "dense":
            return DenseCache.create(case.batch, case.length, *sizes, **options)
        case "ring":
            options["max_append"] = _MAX_APPEND
            return RingCache.create(case.batch, case.window, *sizes, **options)
        case "paged":
            needed = pages_needed(case)
            pool = int(needed.sum()) + max(1, int(needed.sum()) // 4)
            shape = (case.batch, pool, case.page, int(needed.max()))
            return PagedCache.create(*shape, *sizes, **options)
    raise ValueError(f"kind takes dense, ring or paged, got {case.kind!r}")


def structs(case: Case) -> Inputs:
    """Shapes and dtypes alone."""
    cache = jax.eval_shape(functools.partial(empty, case))
    query = jax.ShapeDtypeStruct((case.batch, case.tokens, case.heads, case.head_dim), jnp.bfloat16)
    mask = case.mask()
    return Inputs(query, cache, None if mask is None else jax.ShapeDtypeStruct(mask.shape, bool))


def count(case: Case) -> int:
    """How many sets of inputs take turns."""
    wanted = -(-_SETS_BYTES // case.cache_bytes())
    return min(_MOST_SETS, max(_FEWEST_SETS, wanted) | 1)


def make(case: Case, seed: int) -> Inputs:
    """Random inputs on the device. Slots behind the lengths, and pages of nobody, are filled, too:
    who reads them is wrong."""
    shape = structs(case)
    cache = dataclasses.replace(
        shape.cache,
        arrays=_arrays(shape.cache, seed),
        lengths=jnp.asarray(case.lengths()),
        overflowed=jnp.zeros((case.batch,), bool),
        **_of_kind(case, shape.cache, seed),
    )
    mask = case.mask()
    query, _ = _vectors(
        jax.random.key(_SETS_BYTES + seed),  # of no array of any set
        shape=shape.query.shape,
        dtype=shape.query.dtype.name,
        stored=shape.query.dtype,
    )
    return jax.block_until_ready(Inputs(query, cache, None if mask is None else jnp.asarray(mask)))


def block_table(case: Case, num_pages: int, seed: int) -> np.ndarray:
    """int32 [B, pages per row]: pages in random order, -1 behind a row's last."""
    needed = pages_needed(case)
    order = np.random.default_rng(seed).permutation(num_pages)[: needed.sum()]
    table = np.full((case.batch, needed.max()), -1, np.int32)
    table[np.arange(needed.max()) < needed[:, None]] = order
    return table


def _of_kind(case: Case, cache: Cache, seed: int) -> dict[str, jax.Array]:
    """The fields that this kind of cache has besides."""
    if isinstance(cache, PagedCache):
        return {"block_table": jnp.asarray(block_table(case, cache.num_pages, seed))}
    if isinstance(cache, RingCache):
        # Token p is in slot p % slots: the newest that belongs into each slot is there.
        slots, last = np.arange(cache.capacity), case.lengths()[:, None] - 1
        newest = last - (last - slots) % cache.capacity
        return {"positions": jnp.asarray(np.where(newest < 0, UNUSED_POSITION, newest), jnp.int32)}
    return {}


def _arrays(cache: Cache, seed: int) -> KeyValueArrays:
    arrays, keys = cache.arrays, jax.random.split(jax.random.key(seed), 2)
    draw = functools.partial(_vectors, dtype=cache.dtype)
    keys_, key_scales = draw(keys[0], shape=arrays.keys.shape, stored=arrays.keys.dtype)
    if arrays.values is None:
        return KeyValueArrays(keys_, None, key_scales, None)
    values, scales = draw(keys[1], shape=arrays.values.shape, stored=arrays.values.dtype)
    return KeyValueArrays(keys_, values, key_scales, scales)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "stored"))
def _vectors(key, *, shape: tuple[int, ...], dtype: str, stored) -> tuple:
    """Normal vectors ``[rows, ..., size]`` as they are stored, and their scales or None."""

    def row(key):
        x = jax.random.normal(key, shape[1:], jnp.float32)
        if not _quantization.is_quantized(dtype):
            return _quantization.cast_to_storage(x, dtype, stored), None
        return tuple(_quantization.quantize(x, dtype))

    together = max(1, min(shape[0], _CHUNK // math.prod(shape[1:])))
    return lax.map(row, jax.random.split(key, shape[0]), batch_size=together)
