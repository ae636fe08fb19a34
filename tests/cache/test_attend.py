"""Attention over caches against float64, for every kind, precision, way of filling and feature."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from axattn import Mask
from tests import caches, reference
from tests.caches import FLOATS, KINDS, QUANTIZED, B, H, K, N, h
from tests.precision import ULPS, _one_minus_cosine, quick_jit

LENGTHS = np.array([40, 17, 0])


@functools.partial(quick_jit, static_argnames=("cap", "scale"))
def _plain(query, key, value, allowed, bias, sinks, *, scale, cap):
    """Attention as one writes it without a library, in float32, K and V repeated."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = scale * jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(allowed, scores + bias, -jnp.inf)
    sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))
    scores = jnp.concatenate([scores, sink], -1)
    empty = (scores == -jnp.inf).all(-1, keepdims=True)
    weights = jnp.where(empty, 0.0, jax.nn.softmax(jnp.where(empty, 0.0, scores)))[..., :-1]
    out = jnp.einsum(
        "bnts,bsnh->btnh", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return out.astype(query.dtype)


def check(query, lengths, cache, out, lse=None, *, first=0, **options):
    """``out`` for queries at positions ``first``.. of each row, over what is in the cache.

    The reference reads the numbers that the cache stores: quantization is judged elsewhere.
    """
    key, value = caches.contents(cache)
    exact = reference.attend(
        query,
        key,
        value,
        is_causal=True,
        q_positions=np.broadcast_to(first, (cache.batch,))[:, None] + np.arange(query.shape[1]),
        query_seq_lengths=lengths,
        key_value_seq_lengths=np.asarray(cache.lengths),
        **options,
    )
    dtype = out.dtype
    bias = np.zeros((), np.float32)
    if options.get("alibi_slopes") is not None:
        q = np.broadcast_to(first, (cache.batch,))[:, None] + np.arange(query.shape[1])
        distance = np.abs(q[:, :, None] - np.arange(key.shape[1])).astype(np.float32)
        bias = bias - np.asarray(options["alibi_slopes"])[..., None, None] * distance[:, None]
    if options.get("bias") is not None:
        bias = bias + np.asarray(options["bias"], np.float32)
    sinks = options.get("sinks")
    plain = _plain(
        query,
        jnp.asarray(key, dtype),
        jnp.asarray(value, dtype),
        np.asarray(exact.allowed),
        bias,
        np.full(query.shape[2], -np.inf, np.float32) if sinks is None else np.asarray(sinks),
        scale=float(exact.inputs["scale"]),
        cap=options.get("logits_soft_cap"),
    )
    got, baseline = np.asarray(out, np.float64), np.asarray(plain, np.float64)
    want = exact.out
    assert np.isfinite(got).all()
    few = ULPS * float(jnp.finfo(dtype).eps) * np.abs(want).max()
    assert np.abs(got - want).max() <= 2 * np.abs(baseline - want).max() + few
    size = np.sqrt(np.mean(want**2))
    if size > 0:
        bound = 2 * _one_minus_cosine(baseline, want) + 0.5 * (few / size) ** 2
        assert _one_minus_cosine(got, want) <= bound
    if lse is not None:
        np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact.lse))
        there = ~np.isneginf(exact.lse)
        short = 2.0**-7 if dtype != jnp.float32 else 1e-5
        np.testing.assert_allclose(np.asarray(lse)[there], exact.lse[there], rtol=short, atol=short)


def fill(cache, query, key, value, *, steps, lengths=LENGTHS, implementation=None, **options):
    """Extends the cache in steps of so many tokens; all outputs and the full cache."""
    extend = quick_jit(
        lambda cache, q, k, v, n: cache.extend(
            q, k, v, lengths=n, implementation=implementation, **options
        )
    )
    outs, done = [], 0
    for step in steps:
        here = slice(done, done + step)
        real = np.clip(lengths - done, 0, step).astype(np.int32)
        out, cache = extend(cache, query[:, here], key[:, here], value[:, here], real)
        outs.append(out)
        done += step
    return jnp.concatenate(outs, 1), cache


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
@pytest.mark.parametrize("dtype", [*FLOATS, *QUANTIZED])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_filling_is_one_forward_pass(kind, dtype, implementation, force_blocks):
    force_blocks(8, 16)
    q, k, v = caches.tokens(40, dtype=caches.float_dtype(dtype))
    for steps in ((16, 1, 1, 16, 6), (40,) if kind != "ring" else (24, 16)):
        out, cache = fill(
            caches.make(kind, dtype=dtype), q, k, v, steps=steps, implementation=implementation
        )
        np.testing.assert_array_equal(cache.lengths, LENGTHS)
        check(q, LENGTHS, cache, out)


@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_full_pass_agrees(kind, dtype):
    """Not quantized: the same numbers as attention over the arrays themselves."""
    q, k, v = caches.tokens(40)
    out, _ = fill(caches.make(kind, dtype=dtype), q, k, v, steps=(16, 1, 16, 7))
    full = axattn.dot_product_attention(
        q, k, v, is_causal=True, query_seq_lengths=LENGTHS, key_value_seq_lengths=LENGTHS
    )
    error = np.linalg.norm(out - full) / np.linalg.norm(full)
    assert error < {"float32": 1e-6, "int8": 0.01, "float8_e4m3fn": 0.05, "int4": 0.2}[dtype]


FEATURES = {
    "window": dict(local_window_size=(5, 0)),
    "soft_cap": dict(logits_soft_cap=2.0),
    "sinks": dict(sinks=np.linspace(-1, 2, N).astype(np.float32)),
    "alibi": dict(alibi_slopes=np.linspace(0.1, 1, B * N, dtype=np.float32).reshape(B, N)),
    "scale": dict(scale=0.7),
    "mask": dict(mask=np.random.default_rng(1).random((B, N, 4, 48)) < 0.7),
    "bias": dict(bias=np.random.default_rng(2).normal(size=(1, N, 4, 48)).astype(np.float32)),
    "segments": dict(
        query_segment_ids=np.full((B, 4), 2),
        key_value_segment_ids=np.arange(48)[None] // 12 * [[1]] * B,
    ),
    "prefix": dict(mask=Mask.prefix(9)),
}


def attend_both(cache, query, **options):
    """Output and LSE by both implementations, from one program."""

    def program(cache, query):
        return [
            cache.attend(query, implementation=name, return_residual=True, **options)
            for name in ("xla", "xla_chunked")
        ]

    return quick_jit(program)(cache, query)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_mask_features(kind, feature, force_blocks):
    if kind == "ring" and feature in ("mask", "bias", "segments", "prefix"):
        pytest.skip("a ring refuses what speaks of slots")
    force_blocks(4, 16)
    options = dict(FEATURES[feature])
    lengths = np.array([40, 17, 4])
    q, k, v = caches.tokens(40, dtype="float32")
    _, cache = fill(caches.make(kind, dtype="int8"), q, k, v, steps=(16, 16, 16), lengths=lengths)
    results = attend_both(caches.poisoned(cache), q[:, :4], **options)
    for name in ("mask", "bias", "key_value_segment_ids"):
        if isinstance(options.get(name), np.ndarray):
            options[name] = options[name][..., : int(lengths.max())]
    if feature == "prefix":
        options = dict(prefix=9)  # the reference's name for it
    for out, lse in results:
        check(q[:, :4], None, cache, out, lse, first=lengths - 4, **options)


@pytest.mark.parametrize("dtype", [*FLOATS, *QUANTIZED])
@pytest.mark.parametrize("kind", KINDS)
def test_unused_slots_are_never_read(kind, dtype, force_blocks):
    force_blocks(4, 16)
    q, k, v = caches.tokens(48, dtype=caches.float_dtype(dtype))
    _, cache = fill(caches.make(kind, dtype=dtype), q, k, v, steps=(16, 16, 16))
    clean = attend_both(cache, q[:, -3:])
    for (want, _), (got, lse) in zip(
        clean, attend_both(caches.poisoned(cache), q[:, -3:]), strict=True
    ):
        np.testing.assert_array_equal(got, want)
        assert np.isfinite(np.asarray(got, np.float32)).all()
        assert (np.asarray(got, np.float32)[2] == 0).all()  # a row of no tokens
        assert np.isneginf(lse[2]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_appending_after_poison_heals(kind):
    q, k, v = caches.tokens(48)
    _, cache = fill(caches.make(kind), q, k, v, steps=(16,))
    table = getattr(cache, "block_table", None)
    cache = caches.poisoned(cache)
    if table is not None:
        cache = cache.with_table(table)
    rest = np.maximum(LENGTHS - 16, 0)
    _, cache = fill(cache, q[:, 16:], k[:, 16:], v[:, 16:], steps=(16, 16), lengths=rest)
    out = cache.attend(q[:, -1:])
    check(q[:, -1:], None, cache, out, first=LENGTHS - 1)


@pytest.mark.parametrize("window, max_append", [(0, 1), (1, 1), (5, 3), (9, 16), (20, 1)])
def test_rings_go_around(window, max_append, force_blocks):
    """Many times around, in steps longer and shorter than the ring: always the window before."""
    force_blocks(8, 8)
    q, k, v = caches.tokens(60)
    lengths = np.array([60, 31, 0])
    dtype = "int8" if window == 5 else "float32"
    full = caches.make("dense", capacity=64, dtype=dtype)
    full = full.append(k, v, lengths=lengths)
    ring = caches.make("ring", window=window, max_append=max_append, dtype=dtype)
    assert ring.capacity == -(-(window + max_append) // 8) * 8
    out, ring = fill(ring, q, k, v, steps=(1, 1, 29, 29), lengths=lengths)
    check(q, lengths, full, out, local_window_size=(window, 0))
    np.testing.assert_array_equal(ring.lengths, lengths)


def test_values_in_keys():
    q, k, _ = caches.tokens(40, kv_heads=1, group=N)
    for dtype in ("float32", "int8"):
        for kind in KINDS:
            cache = caches.make(kind, kv_heads=1, dtype=dtype, values_in_keys=True)
            two = caches.make(kind, kv_heads=1, dtype="float32")
            extend = quick_jit(lambda c, q, k: c.extend(q, k))
            out, cache = extend(cache, q[:, :16], k[:, :16])
            assert cache.arrays.values is None
            assert cache.nbytes < caches.make(kind, kv_heads=1, dtype=dtype).nbytes
            check(q[:, :16], None, cache, out)
            want, _ = two.extend(q[:, :16], k[:, :16], k[:, :16, :, :h])
            np.testing.assert_allclose(out, want, atol=1e-6 if dtype == "float32" else 0.05)


@pytest.mark.parametrize(
    "group, kv_heads, kind", [(1, 4, "dense"), (16, 1, "paged"), (1, 1, "ring")]
)
def test_other_groups(group, kv_heads, kind, force_blocks):
    force_blocks(4, 16)
    q, k, v = caches.tokens(48, kv_heads=kv_heads, group=group)
    out, cache = fill(caches.make(kind, kv_heads=kv_heads), q, k, v, steps=(16, 1, 16, 1))
    check(q[:, :34], np.minimum(LENGTHS, 34), cache, out)


def test_not_causal():
    """Cross-attention: every query sees all that is stored."""
    q, k, v = caches.tokens(40)
    cache = caches.make("dense").append(k, v, lengths=LENGTHS)
    out = cache.attend(q[:, :5], is_causal=False)
    want = axattn.dot_product_attention(q[:, :5], k, v, key_value_seq_lengths=LENGTHS)
    np.testing.assert_allclose(out, want, atol=1e-6)


def test_positions_of_the_query():
    q, k, v = caches.tokens(40)
    cache = caches.make("paged").append(k, v)
    positions = np.array([3, 39, 0, 12])
    out = cache.attend(q[:, positions], q_positions=positions)
    want = axattn.dot_product_attention(q, k, v, is_causal=True)[:, positions]
    np.testing.assert_allclose(out, want, atol=1e-6)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_key_center_changes_nothing_but_rounding(dtype, cap):
    q, k, v = caches.tokens(40)
    center = 4 * np.random.default_rng(3).normal(size=(K, H)).astype(np.float32)
    k = (k + center).astype(caches.float_dtype(dtype))
    q, v = (x.astype(k.dtype) for x in (q, v))
    options = dict(logits_soft_cap=cap, sinks=np.ones(N, np.float32), return_residual=True)
    for kind in KINDS:
        cache = caches.make(kind, dtype=dtype, key_center=center)
        for at in range(0, 32, 16):
            cache = cache.append(k[:, at : at + 16], v[:, at : at + 16])
        out, lse = cache.attend(q[:, 31:32], **options)
        exact = reference.attend(
            q[:, 31:32],
            *(np.asarray(x, np.float64)[:, :32] for x in (k, v)),
            logits_soft_cap=cap,
            sinks=options["sinks"],
        )
        near = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.03, "int4": 0.4}[dtype]
        assert np.abs(np.asarray(out, np.float64) - exact.out).max() < near
        assert np.abs(np.asarray(lse, np.float64) - exact.lse).max() < 5 * near


def _relative_error(dtype, offsets, centered):
    """Output error of a decode step over 512 Gaussian tokens, H = 128, against float64."""
    rng = np.random.default_rng(7)
    q, k, v = (rng.normal(size=(2, n, 4, 128)) for n in (8, 512, 512))
    k[..., [5, 77]] += offsets
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    center = axattn.quantization.key_center(k[:, :128]) if centered else None
    cache = caches.make(
        "dense",
        capacity=512,
        batch=2,
        kv_heads=4,
        head_dim=128,
        value_head_dim=128,
        dtype=dtype,
        key_center=center,
    ).append(k, v)
    out = cache.attend(q, is_causal=False)
    exact = reference.attend(q, k, v).out
    return np.linalg.norm(out - exact) / np.linalg.norm(exact)


def test_int8_is_within_one_percent_of_gaussian_inputs():
    assert _relative_error("int8", 0.0, False) < 0.01


def test_centering_keeps_int8_accurate_under_outlier_channels():
    plain, centered = (_relative_error("int8", 10.0, c) for c in (False, True))
    assert centered < 0.01
    assert plain > 1.5 * centered


def test_bfloat16_queries_over_float32_and_int8_caches():
    q, k, v = caches.tokens(16)
    for dtype in ("float32", "int8"):
        cache = caches.make("dense", dtype=dtype).append(k, v)
        out = cache.attend(q.astype(jnp.bfloat16))
        assert out.dtype == jnp.bfloat16
        check(q.astype(jnp.bfloat16), None, cache, out)


def test_float16_queries_over_small_quantized_values():
    """A weight times a value scale of 1e-5 is no number of float16."""
    q, k, v = caches.tokens(16)
    v = v * 1e-4
    cache = caches.make("dense", dtype="int8").append(k, v)
    out = np.asarray(cache.attend(q.astype(jnp.float16)), np.float64)
    exact = np.asarray(cache.attend(q), np.float64)
    assert np.abs(out - exact).max() < 0.01 * np.abs(exact).max()


def test_no_derivative_is_said():
    q, k, v = caches.tokens(16)
    cache = caches.make("dense").append(k, v)
    with pytest.raises(NotImplementedError, match="no derivative over a cache"):
        jax.grad(lambda q: cache.attend(q, implementation="xla_chunked").sum())(q)
    grad = jax.grad(lambda q: cache.attend(q, implementation="xla").sum())(q)
    want = jax.grad(lambda q: axattn.dot_product_attention(q, k, v, is_causal=True).sum())(q)
    np.testing.assert_allclose(grad, want, atol=1e-6)


def test_explain():
    q, k, v = caches.tokens(1)
    cache = caches.make("paged").append(k, v)
    why = axattn.explain_implementations(q, cache.stored(), None)
    assert why["xla"] is None and why["xla_chunked"] is None
    assert "a cache" in why["cudnn"]
    assert why.by_platform["cpu"] == "xla_chunked"
    with pytest.raises(ValueError, match="value takes None with a cache"):
        axattn.dot_product_attention(q, cache.stored(), v)


def test_no_array_of_the_size_of_the_cache(force_blocks):
    """Neither path dequantizes the cache or repeats its heads in memory, one token at a time."""
    from tests.test_no_copies import traced

    force_blocks(1, 64)
    slots = 1024
    cache = caches.make("dense", capacity=slots, dtype="int8")
    q, k, v = caches.tokens(1)
    found, count = traced(
        lambda c, q, k, v: c.extend(q, k, v, implementation="xla_chunked"),
        (cache, q, k, v),
        B * K * slots * min(H, h),
    )
    assert count > 20
    # The arrays themselves, on their way through calls and loops.
    assert {shape for _, shape in found} <= {x.shape for x in jax.tree.leaves(cache.arrays)}
