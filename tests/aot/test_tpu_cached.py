"""The TPU kernel over caches through the TPU compiler: it fits, and nothing copies the cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from axattn.cache import DenseCache, PagedCache, RingCache
from axattn.kernels._tpu.cached.block_sizes import choose_block_sizes, find_cache_refusal
from axattn.kernels._tpu.cached.kernel import attend_over_cache
from tests.aot.compilers import analyze, releases_have_all
from tests.kernels.calls import call_of_cache

pytestmark = pytest.mark.aot

B, S = 8, 8192
DTYPES = ("bfloat16", "int8", "float8_e4m3fn", "int4")
VMEM = {"v4": 16, "v5e": 128, "v5p": 64, "v6e": 128, "tpu7x": 64}  # MiB of a core
CORES = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 1}  # of one device

# Query heads, key/value heads, head size, value head size.
HEADS = {
    "llama_8b": (32, 8, 128, 128),
    "llama_70b": (64, 8, 128, 128),
    "gemma_9b": (16, 8, 256, 256),
    "falcon": (71, 1, 64, 64),
    "qwen_7b": (28, 4, 128, 128),
    "mha": (32, 32, 128, 128),
    "deepseek": (128, 1, 576, 512),
}


def structs(kind, heads, tokens, dtype="bfloat16", batch=B, query_dtype="bfloat16"):
    """Shapes of a cache and a query."""
    num_heads, kv_heads, size, value_size = HEADS[heads]
    options = dict(value_head_dim=value_size, values_in_keys=size != value_size, dtype=dtype)
    if kind == "dense":
        make = functools.partial(DenseCache.create, batch, S, kv_heads, size, **options)
    elif kind == "ring":
        make = functools.partial(
            RingCache.create, batch, 4096, kv_heads, size, max_append=16, **options
        )
    else:
        page, pages = kind, S // kind
        make = functools.partial(
            PagedCache.create, batch, batch * pages, page, pages, kv_heads, size, **options
        )
    query = jax.ShapeDtypeStruct((batch, tokens, num_heads, size), query_dtype)
    return jax.eval_shape(make), query


def compiled(target, cache, query, arrays=None, **options):
    """The report; the kernel with block sizes of its own choice."""

    def program(cache, query, arrays):
        call = call_of_cache(cache, query, **options, **(arrays or {}))
        assert find_cache_refusal(call) is None
        sizes = choose_block_sizes(call, VMEM[target] * 2**20)
        return attend_over_cache(call, sizes, cores=CORES[target])

    r = analyze(program, cache, query, arrays, target=target)
    assert r.ok, r
    return r


def outer_bytes(query):
    """Of the query in whole lanes and sublanes, with room for the output and both laid out."""
    batch, tokens, heads, size = query.shape
    return 4 * batch * -(-tokens // 16) * 16 * heads * -(-size // 128) * 128 * 2


# Each model on a chip, chips in turn.
MODELS = [(heads, list(VMEM)[i % len(VMEM)], 8) for i, heads in enumerate(HEADS)]


@releases_have_all("heads, target, tokens", MODELS, HEADS, VMEM, (1, 8))
def test_models(heads, target, tokens):
    """A step, and a speculative one."""
    cache, query = structs("dense", heads, tokens)
    # Besides the cache there are only the query, in tiles, and the output.
    assert compiled(target, cache, query).temp_bytes < cache.nbytes // 2


# All kinds (numbers are of slots of a page), all dtypes and all chips.
KINDS = ("dense", "ring", 16, 64, 128)
QUICK = [
    ("dense", "v5p", "int8"),
    ("ring", "v4", "float8_e4m3fn"),
    (16, "v6e", "bfloat16"),
    (64, "v5e", "int4"),
    (128, "tpu7x", "int8"),
    ("dense", "v4", "int4"),
    (64, "v5p", "float8_e4m3fn"),
]


@releases_have_all("kind, target, dtype", QUICK, KINDS, VMEM, DTYPES)
def test_kinds(kind, target, dtype):
    cache, query = structs(kind, "llama_8b", 1, dtype)
    r = compiled(target, cache, query)
    # Scales of small pages are laid out anew.
    gathered = dtype != "bfloat16" and kind in (16, 64)
    assert r.temp_bytes < (30 if gathered else 4) * 2**20
    assert r.temp_bytes < cache.nbytes // 2


@releases_have_all(
    "heads, dtype",
    [("falcon", "int4"), ("deepseek", "float8_e4m3fn")],
    ("falcon", "deepseek"),
    ("int8", "float8_e4m3fn", "int4"),
)
def test_slots_that_are_lanes(heads, dtype):
    for kind in ("dense", 128):
        cache, query = structs(kind, heads, 1, dtype)
        assert compiled("v5p", cache, query).temp_bytes < cache.nbytes // 2


@releases_have_all(
    "heads, target",
    [("llama_8b", "v6e"), ("falcon", "v4"), ("deepseek", "v4")],
    HEADS,
    ("v4", "v6e"),
)
def test_prompts(heads, target):
    cache, query = structs("dense", heads, 512, batch=2)
    r = compiled(target, cache, query)
    assert r.temp_bytes < outer_bytes(query) + 2**22


ARRAYS = {
    "mask": jax.ShapeDtypeStruct((2, 1, 4, S), jnp.bool_),
    "bias": jax.ShapeDtypeStruct((1, 32, 4, S), jnp.float32),
    "sinks": jax.ShapeDtypeStruct((32,), jnp.float32),
    "alibi_slopes": jax.ShapeDtypeStruct((32,), jnp.float32),
    "query_segment_ids": jax.ShapeDtypeStruct((2, 4), jnp.int32),
    "key_value_segment_ids": jax.ShapeDtypeStruct((2, S), jnp.int32),
    "query_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
}


@releases_have_all(
    "target, dtype", [("v4", "int8"), ("tpu7x", "bfloat16")], VMEM, ("bfloat16", "int8")
)
def test_features(target, dtype):
    cache, query = structs(64, "llama_8b", 4, dtype, batch=2)
    compiled(target, cache, query, ARRAYS, logits_soft_cap=30.0, local_window_size=(4096, 0))


@releases_have_all("target", ["v4"], VMEM)
def test_float32(target):
    for dtype in ("float32", "int8"):
        cache, query = structs("dense", "llama_8b", 4, dtype, 2, "float32")
        compiled(target, cache, query, precision="highest")
        compiled(target, cache, query)


@pytest.mark.parametrize("target", ["v4"])
def test_one_row_for_two_cores(target):
    cache, query = structs("dense", "llama_8b", 1, batch=1)
    assert compiled(target, cache, query).temp_bytes < 2**21
