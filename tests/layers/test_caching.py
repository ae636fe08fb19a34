"""Layers over caches: every layer of both Flax APIs, every cache, against the full forward pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as flax_linen
from flax import nnx as flax_nnx

import axattn.linen
import axattn.nnx
from axattn.cache import DenseCache, PagedCache, PagePool, RingCache
from axattn.rotary import RotaryEmbedding
from tests.tiers import ci

B, T, E, N, H = 3, 24, 32, 4, 8
LENGTHS = np.array([24, 13, 0])
LAYERS = {
    "MultiHeadAttention": N,
    "SelfAttention": N,
    "GroupedQueryAttention": 2,
    "MultiQueryAttention": 1,
}


def make_cache(kind, kv_heads, dtype="float32", **kwargs):
    if kind == "dense":
        return DenseCache.create(B, T + 8, kv_heads, H, dtype=dtype, **kwargs)
    if kind == "ring":
        return RingCache.create(B, T, kv_heads, H, max_append=5, dtype=dtype, **kwargs)
    cache = PagedCache.create(B, 4 * B, 8, 4, kv_heads, H, dtype=dtype, **kwargs)
    return cache.with_table(np.random.default_rng(0).permutation(4 * B).reshape(B, 4))


@functools.cache
def layer(api, name, **options):
    """``call(x, **kwargs)`` of a layer with fixed parameters."""
    kv_heads = {"num_kv_heads": LAYERS[name]} if name == "GroupedQueryAttention" else {}
    options = {"rope": RotaryEmbedding(), **kv_heads, **options}
    if api == "linen":
        module = getattr(axattn.linen, name)(num_heads=N, **options)
        params = jax.jit(module.clone(deterministic=True).init)(jax.random.key(0), inputs())
        return functools.partial(module.apply, params)
    rngs = flax_nnx.Rngs(0)
    return getattr(axattn.nnx, name)(num_heads=N, in_features=E, decode=False, rngs=rngs, **options)


def inputs():
    return np.random.default_rng(1).normal(size=(B, T, E)).astype(np.float32)


def forward(call, x, **options):
    return jax.jit(lambda x: call(x, is_causal=True, **options))(x)


def stepwise(call, x, cache, size=12):
    step = jax.jit(lambda x, cache, n: call(x, cache=cache, lengths=n))
    outs = []
    for at in range(0, T, size):
        y, cache = step(x[:, at : at + size], cache, np.clip(LENGTHS - at, 0, size))
        outs.append(y)
    return np.concatenate(outs, 1), cache


OPTIONS = {
    "none": {},
    "window": dict(window=(5, 0)),
    "scores": dict(logits_soft_cap=2.0, scale=0.4),
    "sinks": dict(sinks=True, qk_norm="rms"),
    "fused": dict(fused_qkv=True, rope=None),
}


@pytest.mark.parametrize(
    "api, name, kind, dtype, options",
    [
        ("linen", "MultiHeadAttention", "dense", "float32", "sinks"),
        ("nnx", "SelfAttention", "ring", "float32", "window"),
        ("linen", "MultiQueryAttention", "paged", "float32", "none"),
        *ci(
            ("linen", "GroupedQueryAttention", "ring", "bfloat16", "fused"),
            ("nnx", "GroupedQueryAttention", "dense", "int8", "scores"),
            ("nnx", "MultiHeadAttention", "paged", "bfloat16", "fused"),
            ("linen", "SelfAttention", "dense", "float8_e4m3fn", "window"),
            ("linen", "GroupedQueryAttention", "paged", "int4", "scores"),
            ("nnx", "GroupedQueryAttention", "ring", "float32", "sinks"),
            ("nnx", "MultiQueryAttention", "dense", "float32", "none"),
        ),
    ],
)
def test_steps_are_one_forward_pass(api, name, kind, dtype, options):
    """Keys and values are cast or quantized to what the cache stores; the layer is the same."""
    call, x = layer(api, name, **OPTIONS[options]), inputs()
    y, cache = stepwise(call, x, make_cache(kind, LAYERS[name], dtype))
    full = forward(call, x)
    near = {"float32": 1e-6, "float8_e4m3fn": 0.1, "int4": 0.3}.get(dtype, 0.02)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_allclose(y[b, :n], full[b, :n], atol=near * np.abs(full).max())
    np.testing.assert_array_equal(cache.lengths, LENGTHS)
    assert y.dtype == full.dtype and cache.dtype == dtype


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_mask_and_positions(api):
    """And no lengths: all tokens are real."""
    call, x = layer(api, "SelfAttention"), inputs()
    visible = np.random.default_rng(4).random((B, 1, T, T + 8)) < 0.7
    visible[..., np.arange(T), np.arange(T)] = True
    at = dict(positions=2 * np.arange(T) + 7)  # other distances than the cache's own
    full = forward(call, x, mask=visible[..., :T], **at)
    step = jax.jit(lambda x, c: call(x, cache=c, mask=visible.astype(np.float32), **at))
    y, cache = step(x, make_cache("dense", N))
    np.testing.assert_allclose(y, full, atol=2e-6)
    np.testing.assert_array_equal(cache.lengths, [T] * B)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_refused(api):
    name, x = "MultiHeadAttention", inputs()
    call, cache = layer(api, name), make_cache("dense", N)
    rates = {"dropout_rate": 0.5}
    if api == "nnx":
        own = layer(api, name, attention_fn=flax_nnx.dot_product_attention)
        dropping = layer(api, name, **rates, deterministic=False)
    else:
        own = layer(api, name, attention_fn=flax_linen.dot_product_attention)
        dropping = functools.partial(
            layer(api, name, **rates), deterministic=False, rngs={"dropout": jax.random.key(0)}
        )
    cases = [
        (ValueError, "inputs_k or inputs_v", lambda: call(x, x + 1, cache=cache)),
        (ValueError, "kv_positions", lambda: call(x, cache=cache, kv_positions=np.arange(T))),
        (
            ValueError,
            "segment_ids",
            lambda: call(x, cache=cache, segment_ids=np.zeros((B, T), int)),
        ),
        (ValueError, "sow_weights", lambda: call(x, cache=cache, sow_weights=True)),
        (ValueError, "is_causal=False .* cache", lambda: call(x, cache=cache, is_causal=False)),
        (ValueError, "is_causal=False .* cache", lambda: call(x, cache=cache, is_causal=np.False_)),
        (ValueError, "attention_fn", lambda: own(x, cache=cache)),
        (ValueError, "dropout", lambda: dropping(x, cache=cache)),
        (ValueError, r"inputs_q takes \[B, T, E\]", lambda: call(x[0], cache=cache)),
        (TypeError, "cache takes a cache", lambda: call(x, cache=(cache,))),
        (ValueError, "lengths takes None without a cache", lambda: call(x, lengths=LENGTHS)),
        (ValueError, "key takes", lambda: call(x, cache=make_cache("dense", 2))),
        (ValueError, "inputs_q takes .* B = 3", lambda: call(x[:2], cache=cache)),
        (ValueError, "32 tokens", lambda: call(jnp.tile(x, (1, 2, 1)), cache=cache)),
    ]
    for error, message, refused in cases:
        with pytest.raises(error, match=message):
            refused()
    if api == "nnx":
        with pytest.raises(ValueError, match="decode=True does not go with cache"):
            call(x, cache=cache, decode=True)
    else:
        with pytest.raises(ValueError, match="decode=True does not go with cache"):
            layer(api, name, decode=True)(x, cache=cache)


def test_a_cache_is_made_and_used_in_scan():
    """Layers of one model stacked and scanned over, as large models do, with donated caches."""
    call, x = layer("nnx", "GroupedQueryAttention"), inputs()
    cache = make_cache("dense", 2)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), cache)

    @functools.partial(jax.jit, donate_argnums=1)
    def model(x, caches):
        def one(x, cache):
            y, cache = call(x, cache=cache)
            return x + y, cache

        return jax.lax.scan(one, x, caches)

    plain = jax.jit(lambda x: x + call(x, is_causal=True))
    want = plain(plain(x))
    got, stacked = model(x[:, :16], stacked)
    rest, stacked = model(x[:, 16:], stacked)
    np.testing.assert_allclose(jnp.concatenate([got, rest], 1), want, atol=5e-6)
    np.testing.assert_array_equal(stacked.lengths, np.full((2, B), T))


def test_continuous_batching_with_shared_prefixes():
    """Requests come and go over one pool: each gets what it would have got alone."""
    call = layer("nnx", "GroupedQueryAttention")
    embed = np.random.default_rng(3).normal(size=(50, E)).astype(np.float32)
    rng = np.random.default_rng(2)
    page, pages_per_row, width = 4, 6, 8
    pool = PagePool(14, page)
    cache = PagedCache.create(B, 14, page, pages_per_row, 2, H, dtype="float32")
    step = jax.jit(lambda x, cache, n: call(x, cache=cache, lengths=n))
    copy = jax.jit(lambda cache, s, t: cache.copy_pages(s, t))
    system = rng.integers(0, 50, 7).tolist()
    waiting = [system + rng.integers(0, 50, n).tolist() for n in (5, 9, 2, 11, 1, 6)]
    rows: list = [None] * B
    outputs: dict[int, list] = {}
    shared = 0
    while waiting or any(rows):
        for i in range(B):
            if rows[i] is None and waiting:
                ids = waiting.pop(0)
                sequence = pool.allocate(ids)
                shared += pool.cached(sequence)
                rows[i] = (sequence, ids)
        live = [row and row[0] for row in rows]
        sources, targets = pool.take_copies()
        if len(sources):
            cache = copy(cache, sources, targets)
        done = [0 if row is None else pool.cached(row[0]) for row in rows]
        cache = cache.with_table(pool.block_table(live, pages_per_row), lengths=done)
        x, real = np.zeros((B, width), int), np.zeros(B, int)
        for i, row in enumerate(rows):
            if row is not None:
                new = row[1][done[i] : done[i] + width]
                x[i, : len(new)], real[i] = new, len(new)
        assert (real <= width).all()
        y, cache = step(embed[x], cache, real.astype(np.int32))
        assert not cache.overflowed.any()
        for i, row in enumerate(rows):
            if row is None:
                continue
            sequence, ids = row
            outputs.setdefault(sequence, []).append((ids, done[i], np.asarray(y[i, : real[i]])))
            if done[i] + real[i] == len(ids):
                pool.publish(sequence)
                pool.free(sequence)
                rows[i] = None
            else:
                pool.truncate(sequence, done[i] + int(real[i]))
                pool.publish(sequence)
                pool.append(sequence, ids[done[i] + int(real[i]) :])
    assert shared >= 7
    assert pool.statistics().pages_in_use == 0
    assert len(outputs) == 6
    alone = jax.jit(lambda x: call(x, is_causal=True))
    for pieces in outputs.values():
        ids = np.zeros(page * pages_per_row, int)  # what follows a causal prefix has no part in it
        ids[: len(pieces[0][0])] = pieces[0][0]
        full = np.asarray(alone(embed[ids][None])[0])
        for _, first, got in pieces:
            np.testing.assert_allclose(got, full[first : first + len(got)], atol=5e-6)
