"""Caches on chips that are not here: bytes, updates in place, memory that prompts do not change."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from axattn.cache import DenseCache, PagedCache, RingCache, prefill
from tests.aot.compilers import analyze, releases_have_all

pytestmark = pytest.mark.aot

B, N, K, H, S = 4, 16, 2, 128, 8192
PAGE = 64
DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn", "int4")
KINDS = {
    "dense": functools.partial(DenseCache.create, B, S, K, H),
    "ring": functools.partial(RingCache.create, B, 4096, K, H, max_append=256),
    "paged": functools.partial(PagedCache.create, B, B * S // PAGE, PAGE, S // PAGE, K, H),
}


def structs(kind, dtype):
    return jax.eval_shape(lambda: KINDS[kind](dtype=dtype))


def tokens(length, dtype=jnp.bfloat16):
    return (
        jax.ShapeDtypeStruct((B, length, N, H), dtype),
        jax.ShapeDtypeStruct((B, length, K, H), dtype),
    )


def append(cache, kv):
    return cache.append(kv, kv)


def extend(cache, q, kv):
    return cache.extend(q, kv, kv)


# Every kind with every dtype, by the two compilers in turn.
IN_TURN = [
    (kind, dtype, ("v5p", "h200")[i % 2])
    for i, (kind, dtype) in enumerate(itertools.product(KINDS, DTYPES))
]


@releases_have_all("kind, dtype, target", IN_TURN, KINDS, DTYPES, ("v5p", "h200"))
def test_append_is_in_place(kind, dtype, target):
    cache = structs(kind, dtype)
    _, kv = tokens(1, "float32" if dtype == "float32" else "bfloat16")
    r = analyze(append, cache, kv, target=target, donate_argnums=(0,))
    assert r.ok, r
    # All arrays are aliased, each within the rounding of its rows; and none is copied.
    rounding = 1.01 if kind == "ring" else 1.001
    assert cache.nbytes <= r.alias_bytes <= rounding * cache.nbytes + 2**16
    assert r.temp_bytes < 2**20
    if target == "v5p":  # where XLA counts what is read and written
        assert r.bytes_accessed < 2**21


@pytest.mark.parametrize(
    "head_dim, dtype", [(256, "bfloat16"), (512, "int8"), (256, "float8_e4m3fn"), (512, "int4")]
)
def test_wide_heads_are_written_in_place(head_dim, dtype):
    """Bytes in rows wider than the lanes: their tiles are written whole."""
    cache = jax.eval_shape(lambda: DenseCache.create(B, S, K, head_dim, dtype=dtype))
    kv = jax.ShapeDtypeStruct((B, 1, K, head_dim), jnp.bfloat16)
    r = analyze(append, cache, kv, target="v5p", donate_argnums=(0,))
    assert r.alias_bytes >= cache.nbytes
    assert r.temp_bytes < 2**20
    assert r.bytes_accessed < 2**23


def test_a_copy_would_be_seen():
    r = analyze(append, structs("dense", "bfloat16"), tokens(1)[1], target="v5p")
    assert r.alias_bytes == 0
    assert r.bytes_accessed > structs("dense", "bfloat16").nbytes


@pytest.mark.parametrize("kind, dtype", [*itertools.product(("dense", "paged"), DTYPES)])
def test_bytes_are_those_of_the_formula(kind, dtype):
    cache = structs(kind, dtype)
    per_head = {"float32": 1024, "bfloat16": 512, "int8": 264, "float8_e4m3fn": 264, "int4": 136}
    assert cache.bytes_per_token == K * per_head[dtype]
    assert cache.nbytes == B * S * cache.bytes_per_token
    r = analyze(lambda arrays: arrays, cache.arrays, target="v5p", donate_argnums=(0,))
    assert cache.nbytes <= r.argument_bytes <= 1.001 * cache.nbytes


@releases_have_all(
    "kind, dtype",
    [
        *(("dense", "int8"), ("dense", "int4"), ("ring", "bfloat16")),
        *(("ring", "float8_e4m3fn"), ("paged", "int8"), ("paged", "bfloat16")),
    ],
    KINDS,
    DTYPES[1:],
)
def test_a_decode_step_dequantizes_nothing(kind, dtype):
    cache = structs(kind, dtype)
    r = analyze(extend, cache, *tokens(1), target="v5p", donate_argnums=(0,))
    assert r.ok, r
    logits = 4 * B * N * cache.capacity
    # The keys alone in bfloat16 are 16 MiB (8 MiB in the ring).
    assert r.temp_bytes < 2 * logits + (8 if kind == "paged" else 1) * 2**20
    assert r.temp_bytes < math.prod(cache.arrays.keys.shape) * 2


def test_prefill_in_chunks_does_not_grow_with_the_prompt():
    chunk, temporaries = 256, {}
    for length in (1024, 8192):
        embedding = jax.ShapeDtypeStruct((256, N * H), jnp.bfloat16)

        def run(cache, embedding, prompt, lengths):
            def step(cache, ids, lengths):
                q = embedding[ids].reshape(B, chunk, N, H)
                return cache.extend(q, q[:, :, :K], q[:, :, -K:], lengths=lengths)

            return prefill(step, cache, prompt, lengths, chunk_size=chunk)

        r = analyze(
            run,
            structs("dense", "int8"),
            embedding,
            jax.ShapeDtypeStruct((B, length), jnp.int32),
            jax.ShapeDtypeStruct((B,), jnp.int32),
            target="v5p",
            donate_argnums=(0,),
        )
        assert r.ok, r
        temporaries[length] = r.temp_bytes
    whole = analyze(
        extend, structs("dense", "int8"), *tokens(8192), target="v5p", donate_argnums=(0,)
    )
    # Ids of the prompt may be padded: 4 bytes each.
    assert temporaries[8192] <= temporaries[1024] + 2 * 4 * B * 8192
    assert temporaries[8192] < 0.5 * whole.temp_bytes


@releases_have_all(
    "kind, dtype",
    [("dense", "int8"), ("ring", "bfloat16"), ("paged", "int4")],
    KINDS,
    ("bfloat16", "int8", "int4"),
)
def test_a_loop_of_steps_keeps_its_caches_in_place(kind, dtype):
    """Two layers in a while loop, as in generation."""

    def generate(caches, embedding, ids):
        def step(state):
            count, caches, ids = state
            x = embedding[ids].reshape(B, 1, N, H)
            grown = []
            for cache in caches:
                out, cache = cache.extend(x, x[:, :, :K], x[:, :, -K:])
                grown.append(cache)
                x = out
            return count + 1, tuple(grown), jnp.argmax(x.reshape(B, -1), -1)

        return jax.lax.while_loop(lambda s: (s[0] < 99) & (s[2] != 7).any(), step, (0, caches, ids))

    cache = structs(kind, dtype)
    embedding = jax.ShapeDtypeStruct((256, N * H), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((B,), jnp.int32)
    r = analyze(generate, (cache, cache), embedding, ids, target="v5p", donate_argnums=(0,))
    assert r.alias_bytes >= 2 * cache.nbytes
    assert r.temp_bytes < max(2 * cache.nbytes / 5, 8 * 2**20)
