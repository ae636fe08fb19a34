"""Caches, what attention reads of them, and masks in jax.export's and Flax's own formats."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
import types

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import Mask, _serialization, parallel, quantization
from axattn._stored import KeyValueArrays
from axattn.cache import DenseCache, PagedCache, RingCache
from tests import caches
from tests.parallel import sharded_caches
from tests.tiers import ci

DTYPES = ("float32", "bfloat16", *caches.QUANTIZED)


def filled(tree, seed=0):
    """Numbers in the place of zeros."""
    rng = np.random.default_rng(seed)

    def numbers(x):
        if isinstance(x, int):
            return x
        return jax.device_put(rng.integers(0, 7, x.shape).astype(x.dtype), x.sharding)

    return jax.tree.map(numbers, tree)


def cache_of(kind, dtype, **options):
    options = {"values_in_keys": True} if kind == "ring" else {"key_center": jnp.ones((2, 16))}
    return filled(caches.make(kind, dtype=dtype, **options))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def exported(function, *arguments):
    """What ``function`` gives after its program was written down and read again."""
    pytest.importorskip("flatbuffers")
    program = jax.export.export(jax.jit(function))(*arguments).serialize()
    return jax.export.deserialize(program).call(*arguments)


# Every dtype, and every kind, as floats and quantized.
CACHES = [
    ("dense", "float32"), ("ring", "bfloat16"), ("dense", "int4"), ("ring", "int8"), ("paged", "float8_e4m3fn"),
    ("paged", "float32"),
]  # fmt: skip
CACHES += ci(*sorted(set(itertools.product(caches.KINDS, DTYPES)) - set(CACHES)))


@pytest.mark.parametrize("kind, dtype", CACHES)
def test_caches_in_exported_programs(kind, dtype):
    cache = cache_of(kind, dtype)
    got, stored = exported(lambda cache: (cache, cache.stored()), cache)
    assert_same(got, cache)
    assert_same(stored, cache.stored())


def test_an_exported_step():
    cache, tokens = caches.make("paged", dtype="int8"), caches.tokens(5)

    def step(cache, tokens):
        codes = quantization.quantize(tokens[1], "int8")
        return *cache.extend(*tokens, implementation="xla"), codes

    got, want = exported(step, cache, tokens), jax.jit(step)(cache, tokens)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    np.testing.assert_array_equal(got[1].arrays.keys, want[1].arrays.keys)


@pytest.mark.parametrize("kind, dtype", CACHES)
def test_caches_of_flax(kind, dtype):
    tree = {"step": 3, "caches": (cache_of(kind, dtype), cache_of(kind, dtype).stored())}
    target = {"step": 0, "caches": tuple(filled(x, seed=1) for x in tree["caches"])}
    got = flax.serialization.from_bytes(target, flax.serialization.to_bytes(tree))
    assert_same(got, tree)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(got["caches"][0]))
    shapes = jax.eval_shape(lambda: target["caches"][0])
    state = flax.serialization.to_state_dict(tree["caches"][0])
    assert_same(flax.serialization.from_state_dict(shapes, state), tree["caches"][0])


IDS = np.array([[0, 1, 1]])
MASKS = {
    "nothing": Mask(),
    "static": Mask.causal(1) & Mask.window(2, None) & Mask.prefix(2) & Mask.lengths(q=3),
    "arrays": Mask.causal(jnp.array([1, 2]))
    & Mask.prefix(jnp.array([0, 2]))
    & Mask.lengths(kv=jnp.array([1, 3]))
    & Mask.segments(IDS, IDS + 1)
    & Mask.dense(np.eye(3, dtype=bool)),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    mask = MASKS[mask]
    assert exported(lambda mask: mask, mask) == mask
    target = jax.tree.map(jnp.zeros_like, mask)
    assert flax.serialization.from_bytes(target, flax.serialization.to_bytes(mask)) == mask


def dense(length=8, heads=2, size=4, **options):
    return DenseCache.create(2, length, heads, size, **{"dtype": "float32", **options})


REFUSED = {
    "length": (dense(9), dense(), "keys float32 [2, 2, 9, 4] for float32 [2, 2, 8, 4]"),
    "batch": (
        DenseCache.create(3, 8, 2, 4, dtype="float32"), dense(),
        "lengths int32 [3] for int32 [2]",
    ),
    "head_dim": (dense(size=6), dense(), "head_dim 6 for 4"),
    "value_head_dim": (dense(value_head_dim=3), dense(), "value_head_dim 3 for 4"),
    "dtype": (dense(dtype="bfloat16"), dense(), "dtype bfloat16 for float32"),
    "scales": (dense(dtype="int8"), dense(), "key_scales float32 [2, 2, 8] for None"),
    "values": (
        dense(values_in_keys=True), dense(), "values None for float32 [2, 2, 8, 4]",
    ),
    "key_center": (dense(key_center=jnp.ones((2, 4))), dense(), "key_center float32 [2, 4] for None"),
    "kind": (RingCache.create(2, 7, 2, 4), dense(), "DenseCache RingCache for DenseCache"),
    "window": (
        RingCache.create(2, 6, 2, 4), RingCache.create(2, 7, 2, 4), "window 6 for 7",
    ),
    "pages": (
        PagedCache.create(2, 5, 4, 3, 2, 4), PagedCache.create(2, 5, 4, 2, 2, 4),
        "block_table int32 [2, 3] for int32 [2, 2]",
    ),
    "no cache": ({"keys": 1}, dense(), "DenseCache None for DenseCache"),
    "number of a mask": (Mask.causal(1), Mask.causal(2), "offset 1 for 2"),
    "array of a mask": (Mask.prefix(jnp.array([1])), Mask.prefix(2), "length int32 [1] for 2"),
    "part of a mask": (Mask.causal(), Mask.prefix(0), "0 Causal for Prefix"),
    "parts of a mask": (Mask.causal(), Mask(), "parts ['0'] for []"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_another_geometry(case):
    given, target, words = REFUSED[case]
    kind = type(target).__name__
    with pytest.raises(ValueError, match=f"{kind} of its own sizes.*{re.escape(words)}"):
        flax.serialization.from_bytes(target, flax.serialization.to_bytes(given))


def test_bfloat16_as_bits():
    """Some backends store it as uint16; its bits are the same."""
    cache = filled(dense(dtype="bfloat16"))
    as_bits = jax.tree.map(lambda x: np.asarray(x).view(np.uint16), cache.arrays)
    bits = dataclasses.replace(cache, arrays=as_bits)
    for given, target in ((bits, cache), (cache, bits)):
        state = flax.serialization.to_state_dict(given)
        assert_same(flax.serialization.from_state_dict(target, state), target)


def test_several_devices(mesh_of):
    mesh = mesh_of(data=2, model=2, context=2)
    cache = filled(sharded_caches.make("paged", mesh, dtype="int8"))
    got = exported(lambda cache: cache, cache)
    assert_same(got, cache)
    state = flax.serialization.to_bytes(cache)
    got = flax.serialization.from_bytes(filled(cache, seed=1), state)
    assert_same(got, cache)
    assert got.cache.arrays.keys.sharding == cache.cache.arrays.keys.sharding
    other = sharded_caches.make("paged", mesh_of(data=2, context=4), dtype="int8")
    with pytest.raises(ValueError, match="sequence shards 2 for 4"):
        flax.serialization.from_bytes(other, state)
    part = parallel.StripedCache(dense(), "context")
    assert_same(exported(lambda part: part, part), part)


def test_flax_may_come_later(monkeypatch):
    """A type is made known when there is a value of it and Flax is there."""
    known = []
    later = types.SimpleNamespace(register_serialization_state=lambda cls, *_: known.append(cls))
    monkeypatch.setattr(_serialization, "_unregistered", [DenseCache])
    monkeypatch.delitem(sys.modules, "flax.serialization")
    dense()
    assert not known
    monkeypatch.setitem(sys.modules, "flax.serialization", later)
    dense()
    assert known == [DenseCache] and not _serialization._unregistered


def test_stored_names_stay():
    """Artifacts and states hold these names: what older releases wrote loads in every later one."""
    found = {_serialization.name_stored_type(kind) for kind in _serialization._registry}
    assert found == {
        "axattn.cache.dense.DenseCache",
        "axattn.cache.paged.PagedCache",
        "axattn.cache.ring.RingCache",
        "axattn.mask_parts.Causal",
        "axattn.mask_parts.Dense",
        "axattn.mask_parts.Lengths",
        "axattn.mask_parts.Prefix",
        "axattn.mask_parts.Segments",
        "axattn.mask_parts.Window",
        "axattn.masks.Mask",
        "axattn.parallel.caches.ShardedCache",
        "axattn.parallel.dealt.DealtCache",
        "axattn.stored.Stored",
    }
    assert _serialization.name_stored_type(KeyValueArrays) == "axattn.stored.KeyValueArrays"
