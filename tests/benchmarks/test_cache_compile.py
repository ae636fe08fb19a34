from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks.harness import cache_compile, cache_sizes
from benchmarks.harness.cache_tables import Size
from tests.tiers import ci

MODEL = dict(layers=32, heads=32, batch=4, page_size=16)
MAIN = dict(kv_heads=4, head_dim=128, tokens=4096)
ODD = dict(kv_heads=1, head_dim=80, tokens=1000)


def compiled(kind, dtype, shape, target):
    case = cache_sizes.CacheCase(kind, dtype, **MODEL, **shape)
    return Size.of(case, target, cache_compile.compile_append(case, target))


@pytest.mark.parametrize(
    "kind, dtype",
    [("dense", "int8"), ("paged", "bfloat16"), *ci(("dense", "float8_e4m3fn"), ("paged", "int4"))],
)
def test_cpu_agrees(kind, dtype):
    size = compiled(kind, dtype, MAIN, "cpu")
    assert size.disagreement is None
    assert size.compiled_bytes == size.layer_bytes == size.tiled_bytes


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5p", "h200"])
@pytest.mark.parametrize("kind", cache_sizes.KINDS)
@pytest.mark.parametrize("dtype", cache_sizes.BITS)
def test_targets_agree(kind, dtype, target):
    size = compiled(kind, dtype, MAIN, target)
    assert size.disagreement is None
    assert size.compiled_bytes == size.layer_bytes  # at this shape tiles add nothing
    assert not size.copies


@pytest.mark.aot
@pytest.mark.parametrize("kind", cache_sizes.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_tiles_explain_what_an_odd_shape_takes_more(kind, dtype):
    size = compiled(kind, dtype, ODD, "v5p")
    assert size.disagreement is None
    assert size.layer_bytes < size.compiled_bytes == size.tiled_bytes < 1.1 * size.layer_bytes


def layout(major_to_minor, tiling=None, bits=0):
    return types.SimpleNamespace(
        major_to_minor=major_to_minor, tiling=tiling, sub_byte_element_size_in_bits=bits
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "of", "wanted"),
    [
        ((2, 3, 5), "float32", layout((0, 1, 2)), 2 * 3 * 5 * 4),
        ((2, 3, 5), "float32", layout((0, 1, 2), ((8, 128),)), 2 * 8 * 128 * 4),
        ((2, 100, 5), "int8", layout((0, 2, 1), ((8, 128), (4, 1))), 2 * 8 * 128),
        ((2, 3), "float32", layout((1, 0), ((128,),)), 3 * 128 * 4),
        ((2, 64, 128), "int4", layout((0, 1, 2), ((64, 128), (8, 1)), bits=4), 2 * 64 * 128 // 2),
        ((2, 64, 128), "int4", layout((0, 1, 2)), 2 * 64 * 128),
    ],
)
def test_tiled_bytes(shape, dtype, of, wanted):
    assert cache_compile.tiled_bytes(shape, jnp.dtype(dtype), of) == wanted


def test_a_cache_that_does_not_fit_has_no_size(monkeypatch):
    refused = types.SimpleNamespace(refusal="out of memory (hbm): 2 of 1")
    monkeypatch.setattr(cache_compile.aot, "analyze", lambda *_, **__: refused)
    size = compiled("dense", "int8", MAIN, "v5p")
    assert size.refusal == "out of memory (hbm): 2 of 1"
    assert size.compiled_bytes is None and size.disagreement is None


def test_nothing_is_allocated():
    case = cache_sizes.CacheCase("dense", "bfloat16", 1, 32, 32, 128, 1, 2**20, 1)  # 16 GiB
    before = len(jax.live_arrays())
    assert cache_compile.compile_append(case, "cpu").aliased == 2**34
    assert len(jax.live_arrays()) == before
