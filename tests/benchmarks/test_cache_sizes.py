from __future__ import annotations

import dataclasses

import jax
import pytest

from benchmarks.harness import cache_compile, cache_sizes

CASE = cache_sizes.CacheCase(
    "dense",
    "bfloat16",
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    batch=4,
    tokens=4096,
    page_size=16,
)
MiB, GiB = 2**20, 2**30


def sizes(**changes):
    return cache_sizes.analytical(dataclasses.replace(CASE, **changes))


@pytest.mark.parametrize(
    ("dtype", "token_head"),
    [
        ("float32", 1024),
        ("bfloat16", 512),
        ("int8", 264),  # 2 * (128 + a scale of 4)
        ("float8_e4m3fn", 264),
        ("int4", 136),
    ],
)
def test_bytes_of_a_token_and_head(dtype, token_head):
    assert sizes(dtype=dtype).token_head == token_head


@pytest.mark.parametrize(
    ("kv_heads", "token", "layer", "total"),
    [
        (32, 16384, 256 * MiB, 8 * GiB),
        (8, 4096, 64 * MiB, 2 * GiB),
        (4, 2048, 32 * MiB, 1 * GiB),
        (1, 512, 8 * MiB, 256 * MiB),
    ],
)
def test_bytes_of_a_model(kv_heads, token, layer, total):
    found = sizes(kv_heads=kv_heads)
    assert (found.token, found.layer, found.total) == (token, layer, total)
    assert found.keys == found.values == layer // 2


def test_int8_is_at_most_052_of_bfloat16():
    assert sizes(dtype="int8").total == 4_429_185_024
    assert sizes(dtype="int8").total / sizes().total == 264 / 512 <= 0.52


@pytest.mark.parametrize(("kv_heads", "keys"), [(32, 8 * GiB), (4, GiB)])
def test_a_million_tokens(kv_heads, keys):
    found = sizes(kv_heads=kv_heads, batch=1, tokens=2**20, layers=1)
    assert found.keys == found.values == keys
    assert found.layer == 2 * keys


def test_pages_are_whole():
    one_more = dataclasses.replace(CASE, kind="paged", tokens=4097)
    assert one_more.pages_per_row == 257
    assert one_more.slots == 4 * 4112
    assert sizes(kind="paged") == sizes()  # 4096 is a multiple of 16


@pytest.mark.parametrize("kind", cache_sizes.KINDS)
@pytest.mark.parametrize("dtype", cache_sizes.BITS)
def test_caches_say_the_same(kind, dtype):
    case = dataclasses.replace(CASE, kind=kind, dtype=dtype, kv_heads=2, head_dim=6, tokens=37)
    cache = jax.eval_shape(lambda: cache_compile.create(case))
    found = cache_sizes.analytical(case)
    assert (cache.bytes_per_token, cache.nbytes) == (found.token, found.layer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ring"}, "kind 'ring'"),
        ({"dtype": "float64"}, "dtype 'float64'"),
        ({"kv_heads": 5}, "kv_heads must divide heads, 32, got 5"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"dtype": "int4", "head_dim": 63}, "head_dim must be even"),
    ],
)
def test_cases_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CASE, **changes)


def test_names_of_heads():
    assert [cache_sizes.heads_name(8, k) for k in (8, 2, 1)] == ["MHA", "GQA", "MQA"]
