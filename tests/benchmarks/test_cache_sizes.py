"""Bytes by arithmetic are those that the caches say, and what they come to for a model."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import pytest

from benchmarks.harness import cache_compile, cache_sizes

CASE = cache_sizes.CacheCase(
    "dense", "bfloat16", layers=32, heads=32, kv_heads=32, head_dim=128, batch=4, tokens=4096,
    page_size=16,
)  # fmt: skip
GiB = 2**30


def sizes(**changes):
    return cache_sizes.analytical(dataclasses.replace(CASE, **changes))


def test_caches_say_the_same():
    shape = dict(kv_heads=2, head_dim=6, tokens=37)
    for kind, dtype in itertools.product(cache_sizes.KINDS, cache_sizes.BITS):
        case = dataclasses.replace(CASE, kind=kind, dtype=dtype, **shape)
        cache = jax.eval_shape(lambda case=case: cache_compile.create(case))
        found = cache_sizes.analytical(case)
        assert (cache.bytes_per_token, cache.nbytes) == (found.token, found.layer), case.name
        assert found.token == 2 * found.token_head and found.total == 32 * found.layer
        assert found.keys == found.values == found.layer // 2


def test_bytes_of_a_model():
    """An eighth of the heads takes an eighth; int8, at most 0.52 of bfloat16."""
    assert sizes().total == 8 * GiB
    assert sizes(kv_heads=4).total == GiB
    assert sizes(dtype="int8").total / sizes().total == 264 / 512 <= 0.52
    for kv_heads, keys in ((32, 8 * GiB), (4, GiB)):
        million = sizes(kv_heads=kv_heads, batch=1, tokens=2**20, layers=1)
        assert million.keys == million.values == keys


def test_pages_are_whole():
    one_more = dataclasses.replace(CASE, kind="paged", tokens=4097)
    assert one_more.pages_per_row == 257
    assert one_more.slots == 4 * 4112
    assert sizes(kind="paged") == sizes()  # 4096 is a multiple of 16


def test_cases_that_cannot_be():
    wrong = {
        "kind 'ring'": {"kind": "ring"},
        "dtype 'float64'": {"dtype": "float64"},
        "kv_heads must divide heads, 32, got 5": {"kv_heads": 5},
        "tokens must be at least 1": {"tokens": 0},
        "head_dim must be even": {"dtype": "int4", "head_dim": 63},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CASE, **changes)


def test_names_of_heads():
    assert [cache_sizes.heads_name(8, k) for k in (8, 2, 1)] == ["MHA", "GQA", "MQA"]
