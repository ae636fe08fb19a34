"""Attention over caches against float64, for every kind, precision, way of filling and feature."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from axattn import Mask
from axattn.cache import DenseCache
from tests import caches, reference
from tests.caches import FLOATS, QUANTIZED, B, H, K, N, h
from tests.precision import ULPS, _one_minus_cosine
from tests.tiers import ci

LENGTHS = np.array([40, 17, 0])


@functools.partial(jax.jit, static_argnames=("cap", "scale"))
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
    positions = np.broadcast_to(first, (cache.batch,))[:, None] + np.arange(query.shape[1])
    exact = reference.attend(
        query,
        key,
        value,
        is_causal=True,
        q_positions=positions,
        query_seq_lengths=lengths,
        key_value_seq_lengths=np.asarray(cache.lengths),
        **options,
    )
    dtype = out.dtype
    bias = np.zeros((), np.float32)
    if options.get("alibi_slopes") is not None:
        distance = np.abs(positions[:, :, None] - np.arange(key.shape[1])).astype(np.float32)
        bias = bias - np.asarray(options["alibi_slopes"])[..., None, None] * distance[:, None]
    if options.get("bias") is not None:
        bias = bias + np.asarray(options["bias"], np.float32)
    sinks = options.get("sinks")
    plain = _plain(
        query,
        key.astype(dtype),
        value.astype(dtype),
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


def stepper(implementation=None, **options):
    """``cache.extend`` as it is jitted: once for each number of tokens."""
    return jax.jit(
        lambda cache, q, k, v, n: cache.extend(
            q, k, v, lengths=n, implementation=implementation, **options
        )
    )


def fill(extend, cache, query, key, value, *, steps, lengths=LENGTHS, poison=False):
    """Extends the cache in steps of so many tokens; all outputs and the full cache.

    Tokens that are not real are NaN. All steps but those of one token are as wide as the longest.
    With ``poison`` whatever a step has no need of is garbage before it.
    """
    unreal = np.arange(query.shape[1]) >= np.reshape(lengths, (-1, 1))
    tokens = [
        np.where(unreal[..., None, None], np.nan, x).astype(x.dtype) for x in (query, key, value)
    ]
    table = getattr(cache, "block_table", None)
    outs, done = [], 0
    for step in steps:
        real = np.clip(lengths - done, 0, step).astype(np.int32)
        width = 1 if step == 1 else max(steps)
        here = [
            np.pad(
                x[:, done : done + step],
                ((0, 0), (0, width - step), (0, 0), (0, 0)),
                constant_values=np.nan,
            )
            for x in tokens
        ]
        if poison and table is not None:
            cache = dataclasses.replace(cache, block_table=table)
        out, cache = extend(caches.poisoned(cache, real) if poison else cache, *here, real)
        outs.append(np.asarray(out)[:, :step])
        done += step
    return np.concatenate(outs, 1), cache


WAYS = {"steps": (16, 1, 1, 16, 6), "prompt": (40,)}  # which a ring takes in steps of its own
# Every pair of a dtype, an implementation, a way of filling and a kind; dtypes with kinds in part.
FILLED = [
    ("float32", "dense", "xla", "steps", 3, 2),
    ("float32", "ring", "xla_chunked", "prompt", 3, 2),
    ("bfloat16", "ring", "xla", "prompt", 3, 2),
    ("bfloat16", "paged", "xla_chunked", "steps", 3, 2),
    ("float16", "paged", "xla", "steps", 3, 2),
    ("float16", "dense", "xla_chunked", "prompt", 3, 2),
    ("int8", "paged", "xla", "prompt", 3, 2),
    ("int8", "dense", "xla_chunked", "steps", 1, 4),
    ("float8_e4m3fn", "dense", "xla", "prompt", 1, 1),
    ("float8_e4m3fn", "ring", "xla_chunked", "steps", 3, 2),
    ("int4", "ring", "xla", "steps", 16, 1),
    ("int4", "paged", "xla_chunked", "prompt", 3, 2),
]
FILLED_IN_CI = [
    ("float32", "paged", "xla_chunked", "prompt", 3, 2),
    ("bfloat16", "dense", "xla_chunked", "prompt", 3, 2),
    ("float16", "ring", "xla_chunked", "steps", 3, 2),
    ("int8", "ring", "xla", "steps", 3, 2),
    ("float8_e4m3fn", "paged", "xla", "steps", 3, 2),
    ("int4", "dense", "xla", "prompt", 3, 2),
]
# The error of what is stored, and of what attention makes of it.
STORED = {"int8": 0.02, "float8_e4m3fn": 0.2, "int4": 0.3}
NEAR = {
    "float32": 1e-6, "bfloat16": 0.01, "float16": 1e-3, "int8": 0.01, "float8_e4m3fn": 0.05, "int4": 0.2
}  # fmt: skip


@pytest.mark.parametrize(
    "dtype, kind, implementation, way, group, kv_heads", [*FILLED, *ci(*FILLED_IN_CI)]
)
def test_every_way_of_filling_is_one_forward_pass(
    dtype, kind, implementation, way, group, kv_heads, force_blocks
):
    """Tokens are where they belong, and nothing is read but tokens."""
    force_blocks(8, 16)
    tokens = caches.tokens(40, dtype=caches.float_dtype(dtype), group=group, kv_heads=kv_heads)
    empty, extend = caches.make(kind, dtype=dtype, kv_heads=kv_heads), stepper(implementation)
    out, cache = fill(extend, empty, *tokens, steps=WAYS[way])
    np.testing.assert_array_equal(cache.lengths, LENGTHS)
    check(tokens[0], LENGTHS, cache, out)
    assert (out[2] == 0).all()  # a row of no tokens

    for got, want in zip(caches.contents(cache), tokens[1:], strict=True):
        for b, n in enumerate(LENGTHS):
            want_b = np.asarray(want, np.float64)[b, :n]
            np.testing.assert_allclose(got[b, :n], want_b, atol=STORED.get(dtype, 0))
    lengths = dict(query_seq_lengths=LENGTHS, key_value_seq_lengths=LENGTHS)
    full = reference.attend(*tokens, is_causal=True, **lengths).out
    assert np.linalg.norm(out - full) < NEAR[dtype] * np.linalg.norm(full)

    again, _ = fill(extend, empty, *tokens, steps=WAYS[way], poison=True)
    np.testing.assert_array_equal(again, out)


def test_every_pair_is_filled():
    assert {row[0] for row in FILLED} == {*FLOATS, *QUANTIZED}
    for a, b in itertools.combinations(range(4), 2):
        rows = [*FILLED, *FILLED_IN_CI] if (a, b) == (0, 1) else FILLED
        factors = [{row[i] for row in rows} for i in (a, b)]
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(*factors))


FEATURES = {
    "structure": dict(
        local_window_size=(5, 0),
        sinks=np.linspace(-1, 2, N).astype(np.float32),
        alibi_slopes=np.linspace(0.1, 1, B * N, dtype=np.float32).reshape(B, N),
        scale=0.7,
    ),
    "arrays": dict(
        logits_soft_cap=2.0,
        mask=np.random.default_rng(1).random((B, N, 4, 48)) < 0.7,
        bias=np.random.default_rng(2).normal(size=(1, N, 4, 48)).astype(np.float32),
    ),
    "ids": dict(
        query_segment_ids=np.full((B, 4), 2),
        key_value_segment_ids=np.arange(48)[None] // 12 * [[1]] * B,
        mask=Mask.prefix(9),
    ),
}


@pytest.mark.ci
@pytest.mark.parametrize(
    "kind, feature",
    [
        ("dense", "structure"),
        ("ring", "structure"),
        ("paged", "arrays"),
        ("paged", "ids"),
        ("paged", "structure"),
        ("dense", "arrays"),
        ("dense", "ids"),
    ],
)
def test_mask_features(kind, feature, force_blocks):
    force_blocks(4, 16)
    options, lengths = dict(FEATURES[feature]), np.array([40, 17, 4])
    q, k, v = caches.tokens(40)
    cache = caches.poisoned(caches.grown(caches.make(kind, dtype="int8"), k, v, lengths))
    results = jax.jit(
        lambda cache, query: [
            cache.attend(query, implementation=name, return_residual=True, **options)
            for name in ("xla", "xla_chunked")
        ]
    )(cache, q[:, :4])
    for name in ("mask", "bias", "key_value_segment_ids"):
        if isinstance(options.get(name), np.ndarray):
            options[name] = options[name][..., : int(lengths.max())]
    if feature == "ids":
        options["prefix"] = 9  # the reference's name for it
        del options["mask"]
    for out, lse in results:
        check(q[:, :4], None, cache, out, lse, first=lengths - 4, **options)


def test_rows_without_tokens():
    """Zeros, and an LSE of -inf; whatever is in their slots."""
    q, k, v = caches.tokens(40)
    cache = caches.poisoned(caches.grown(caches.make("dense"), k, v, LENGTHS))
    for name in ("xla", "xla_chunked"):
        attend = functools.partial(cache.attend, implementation=name, return_residual=True)
        out, lse = jax.jit(attend)(q[:, -3:])
        assert np.isfinite(out).all() and (np.asarray(out)[2] == 0).all()
        assert np.isneginf(lse[2]).all() and np.isfinite(lse[:2]).all()


@pytest.mark.parametrize("window, max_append", [(5, 3), *ci((0, 1), (1, 1), (9, 16), (20, 1))])
def test_rings_go_around(window, max_append, force_blocks):
    """Many times around, in steps longer and shorter than the ring: always the window before."""
    force_blocks(8, 8)
    q, k, v = caches.tokens(60)
    lengths = np.array([60, 31, 0])
    dtype = "int8" if window == 5 else "float32"
    full = caches.grown(caches.make("dense", capacity=64, dtype=dtype), k, v, lengths)
    ring = caches.make("ring", window=window, max_append=max_append, dtype=dtype)
    assert ring.capacity == -(-(window + max_append) // 8) * 8
    out, ring = fill(stepper(), ring, q, k, v, steps=(29, 1, 1, 29), lengths=lengths)
    check(q, lengths, full, out, local_window_size=(window, 0))
    np.testing.assert_array_equal(ring.lengths, lengths)


@pytest.mark.ci
@pytest.mark.parametrize("kind, dtype", [("dense", "int8"), ("ring", "float32"), ("paged", "int8")])
def test_values_in_keys(kind, dtype):
    q, k, _ = caches.tokens(16, kv_heads=1, group=N)
    options = dict(kv_heads=1, dtype=dtype)
    cache = caches.make(kind, values_in_keys=True, **options)
    assert cache.nbytes < caches.make(kind, **options).nbytes
    out, cache = jax.jit(lambda c, q, k: c.extend(q, k))(cache, q, k)
    assert cache.arrays.values is None
    check(q, None, cache, out)
    full = reference.attend(q, k, k[..., :h], is_causal=True).out
    np.testing.assert_allclose(out, full, atol=1e-6 if dtype == "float32" else 0.05)


def attended(cache, query, key, value, **options):
    """``attend`` after ``append``, from one program."""
    run = jax.jit(lambda c, q, k, v: c.append(k, v).attend(q, **options))
    return run(cache, query, key, value)


def test_not_causal():
    """Cross-attention: every query sees all that is stored."""
    q, k, v = caches.tokens(16)
    out = attended(caches.make("dense"), q[:, :5], k, v, is_causal=False)
    np.testing.assert_allclose(out, reference.attend(q[:, :5], k, v).out, atol=1e-6)


def test_positions_of_the_query():
    q, k, v = caches.tokens(40)
    positions = np.array([3, 39, 0, 12])
    out = attended(caches.make("paged"), q[:, positions], k, v, q_positions=positions)
    want = reference.attend(q, k, v, is_causal=True).out[:, positions]
    np.testing.assert_allclose(out, want, atol=1e-6)


@pytest.mark.ci
@pytest.mark.parametrize(
    "kind, dtype, cap, implementation",
    [
        ("dense", "float32", 3.0, "xla"),
        ("ring", "bfloat16", None, "xla_chunked"),
        ("paged", "int8", 3.0, "xla_chunked"),
        ("dense", "int4", None, "xla"),
        ("paged", "float32", None, "xla_chunked"),
        ("dense", "bfloat16", 3.0, "xla"),
        ("ring", "int8", None, "xla"),
        ("ring", "int4", 3.0, "xla_chunked"),
    ],
)
def test_a_key_center_changes_nothing_but_rounding(kind, dtype, cap, implementation):
    center = 4 * np.random.default_rng(3).normal(size=(K, H)).astype(np.float32)
    q, k, v = map(np.asarray, caches.tokens(16))
    q, k, v = (jnp.asarray(x, caches.float_dtype(dtype)) for x in (q, k + center, v))
    options = dict(logits_soft_cap=cap, sinks=np.ones(N, np.float32))
    cache = caches.make(kind, dtype=dtype, key_center=center)
    out, lse = attended(
        cache, q[:, -1:], k, v, implementation=implementation, return_residual=True, **options
    )
    exact = reference.attend(q[:, -1:], k, v, **options)
    near = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.03, "int4": 0.4}[dtype]
    assert np.abs(np.asarray(out, np.float64) - exact.out).max() < near
    assert np.abs(np.asarray(lse, np.float64) - exact.lse).max() < 5 * near


def test_int8_is_within_one_percent_of_gaussian_inputs():
    """Centered also under outlier channels: a decode step over 512 tokens, H = 128."""

    def error(offsets, centered):
        rng = np.random.default_rng(7)
        q, k, v = (rng.normal(size=(2, n, 4, 128)) for n in (8, 512, 512))
        k[..., [5, 77]] += offsets
        q, k, v = (x.astype(np.float32) for x in (q, k, v))
        center = axattn.quantization.key_center(k[:, :128]) if centered else None
        options = dict(capacity=512, batch=2, kv_heads=4, head_dim=128, value_head_dim=128)
        cache = caches.make("dense", dtype="int8", key_center=center, **options)
        out, exact = run(cache, q, k, v), reference.attend(q, k, v).out
        return np.linalg.norm(out - exact) / np.linalg.norm(exact)

    run = jax.jit(lambda c, q, k, v: c.append(k, v).attend(q, is_causal=False))
    assert error(0.0, False) < 0.01
    plain, centered = error(10.0, False), error(10.0, True)
    assert centered < 0.01
    assert plain > 1.5 * centered


def test_bfloat16_queries_over_float32_and_int8_caches():
    q, k, v = caches.tokens(16)
    q = q.astype(jnp.bfloat16)
    for dtype in ("float32", "int8"):
        cache = caches.grown(caches.make("dense", dtype=dtype), k, v, np.full(B, 16))
        out = jax.jit(lambda cache: cache.attend(q))(cache)
        assert out.dtype == jnp.bfloat16
        check(q, None, cache, out)


def test_float16_queries_over_small_quantized_values():
    """A weight times a value scale of 1e-5 is no number of float16."""
    q, k, v = caches.tokens(16)
    v = v * 1e-4
    cache, attend = caches.make("dense", dtype="int8"), jax.jit(lambda c, q: c.attend(q))
    cache = caches.grown(cache, k, v, np.full(B, 16))
    out, exact = (
        np.asarray(attend(cache, q.astype(x)), np.float64) for x in ("float16", "float32")
    )
    assert np.abs(out - exact).max() < 0.01 * np.abs(exact).max()


def test_no_derivative_is_said():
    q, k, v = caches.tokens(8)
    cache = caches.grown(caches.make("dense"), k, v, np.full(B, 8))
    with pytest.raises(NotImplementedError, match="no derivative over a cache"):
        jax.grad(lambda q: cache.attend(q, implementation="xla_chunked").sum())(q)
    grad = jax.jit(jax.grad(lambda q: cache.attend(q, implementation="xla").sum()))(q)
    exact = reference.attend(q, k, v, is_causal=True)
    want = exact.gradients(np.ones_like(exact.out), np.zeros_like(exact.lse))["query"]
    np.testing.assert_allclose(grad, want, atol=1e-5)


def test_explain():
    q, k, v = caches.tokens(1)
    cache = caches.make("paged")
    why = cache.explain_implementations(q)
    assert why["xla"] is None and why["xla_chunked"] is None
    assert "a cache" in why["cudnn"]
    assert why.by_platform["cpu"] == "xla_chunked"
    # A TPU cleans a dense cache while it reads it; pages XLA would copy first.
    for kind, name in (("dense", "xla"), ("paged", "xla_chunked")):
        other = caches.make(kind, dtype="float16")  # which no kernel for TPUs takes
        assert other.explain_implementations(q).by_platform["tpu"] == name
    shapes = jax.eval_shape(lambda: cache)
    assert shapes.explain_implementations(jax.eval_shape(lambda: q)) == why
    large = jax.eval_shape(lambda: DenseCache.create(2, 1024, 2, 128, dtype="int8"))
    query = jax.ShapeDtypeStruct((2, 1, 8, 128), "bfloat16")
    assert large.explain_implementations(query, target="v5p").chosen == "mosaic_tpu"
    with pytest.raises(TypeError, match="attend takes no argument kv_positions"):
        cache.explain_implementations(q, kv_positions=0)


def test_a_cache_is_no_array():
    q, _, v = caches.tokens(1)
    with pytest.raises(TypeError, match=r"key takes an array \[..., S, K, H\], got DenseCache"):
        axattn.dot_product_attention(q, caches.make("dense"), v)


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
