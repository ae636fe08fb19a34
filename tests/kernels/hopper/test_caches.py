"""Decode and prefill over every kind of cache, interpreted, against float64.

Slots without a token hold NaN, and unused entries of block tables garbage.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import Mask
from axattn.cache import PagedCache
from tests import caches
from tests.cache.test_attend import check
from tests.kernels import cached
from tests.kernels.cached import CAPACITY, LENGTHS, B, K
from tests.precision import quick_jit

H = 64

DTYPES = ("bfloat16", "int8", "float8_e4m3fn")


filled = functools.partial(cached.filled, head_dim=H, value_dim=H)


def queries(tokens, heads, head_dim=H, **options):
    return cached.queries(tokens, heads, head_dim, **options)


def attend(cache, query, **options):
    program = functools.partial(
        type(cache).attend, implementation="mosaic_gpu", return_residual=True, **options
    )
    return quick_jit(program)(cache, query)


def attend_and_check(cache, query, lengths=LENGTHS, reference=None, **options):
    tokens = query.shape[1]
    real = np.minimum(lengths, tokens)
    out, lse = attend(cache, query, query_seq_lengths=real, **options)
    options = options if reference is None else reference
    check(query, real, cache, out, lse, first=lengths - real, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", caches.KINDS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_kinds(interpreted, kind, dtype, tokens):
    """A decode step, and a prompt's end."""
    attend_and_check(filled(kind, dtype), queries(tokens, 6))


FEATURES = {
    "window": dict(local_window_size=(70, 0)),
    "cap_and_sinks": dict(logits_soft_cap=2.0, sinks=np.linspace(-1, 2, 6).astype(np.float32)),
    "alibi": dict(
        alibi_slopes=np.linspace(0.1, 1, B * 6, dtype=np.float32).reshape(B, 6), scale=0.2
    ),
    "tree": dict(mask=np.random.default_rng(1).random((B, 1, 4, CAPACITY)) < 0.7),
    "bias": dict(bias=np.random.default_rng(2).normal(size=(1, 6, 4, CAPACITY)).astype(np.float32)),
    "bias_of_keys": dict(
        bias=np.random.default_rng(2).normal(size=(1, 6, 1, CAPACITY)).astype(np.float32)
    ),
    "segments": dict(
        query_segment_ids=np.full((B, 4), 2),
        key_value_segment_ids=np.arange(CAPACITY)[None] // 52 * [[1]] * B,
    ),
    "prefix": dict(mask=Mask.prefix(9)),
    "negative_scale": dict(scale=-0.3),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features(interpreted, feature):
    """Speculative steps."""
    dtype = ("bfloat16", "int8")[len(feature) % 2]
    lengths = np.array([200, 65, 4])
    options, reference = dict(FEATURES[feature]), dict(FEATURES[feature])
    for name in ("mask", "bias", "key_value_segment_ids"):
        if isinstance(reference.get(name), np.ndarray):
            reference[name] = reference[name][..., : lengths.max()]
    if feature == "prefix":
        reference = dict(prefix=9)
    cache = filled("paged", dtype, lengths)
    attend_and_check(cache, queries(4, 6), lengths, reference, **options)


@pytest.mark.parametrize(
    "dtype, feature",
    [*zip(DTYPES, ("window", "cap_and_sinks", "tree"), strict=True), ("bfloat16", "tree")],
)
def test_latent(interpreted, dtype, feature):
    """Values that are the first features of their keys; rows of two tiles."""
    lengths = np.array([200, 65, 4])
    heads, options = 20, dict(FEATURES[feature])
    if "sinks" in options:
        options["sinks"] = np.linspace(-1, 2, heads).astype(np.float32)
    sizes = dict(head_dim=192, value_dim=128, kv_heads=1, values_in_keys=True)
    cache = filled("paged", dtype, lengths, **sizes)
    reference = dict(options)
    if "mask" in reference:
        reference["mask"] = reference["mask"][..., : lengths.max()]
    attend_and_check(cache, queries(4, heads, 192), lengths, reference, **options)


@pytest.mark.parametrize("kind", ["dense", "ring"])
def test_latent_of_deepseek(interpreted, kind):
    """The real sizes: 576 features, of which 512 are the values."""
    sizes = dict(head_dim=576, value_dim=512, kv_heads=1, values_in_keys=True)
    attend_and_check(filled(kind, **sizes), queries(1, 16, 576))


@pytest.mark.parametrize(
    "head_dim, value_dim, heads, kv_heads, tokens",
    [(128, 64, 16, 1, 5), (64, 128, 8, 8, 1), (80, 48, 6, 2, 2), (256, 256, 4, 2, 1)],
)
def test_shapes(interpreted, head_dim, value_dim, heads, kv_heads, tokens):
    """Several tiles of rows, one row, sizes that are no powers of two, the largest."""
    cache = filled("dense", head_dim=head_dim, value_dim=value_dim, kv_heads=kv_heads)
    attend_and_check(cache, queries(tokens, heads, head_dim))


@pytest.mark.parametrize(
    "page, dtype", [(16, "int8"), (32, "bfloat16"), (64, "int8"), (96, "int8"), (256, "bfloat16")]
)
def test_pages(interpreted, page, dtype):
    """Pages smaller than a block, as large, larger, and of a size that no block is a multiple of."""
    pages = -(-200 // page)
    cache = PagedCache.create(B, B * pages + 2, page, pages, K, H, dtype=dtype)
    table = np.random.default_rng(5).permutation(B * pages + 2)[: B * pages]
    cache = cache.with_table(table.reshape(B, pages))
    _, k, v = caches.tokens(200, head_dim=H, value_dim=H, dtype="bfloat16")
    cache = caches.poisoned(cache.append(k, v, lengths=LENGTHS))
    attend_and_check(cache, queries(2, 6))


def test_a_center_of_keys(interpreted):
    center = np.random.default_rng(0).normal(size=(K, H)) * 3
    cache = filled("dense", "int8", key_center=center)
    attend_and_check(cache, queries(2, 6), logits_soft_cap=5.0)
    attend_and_check(cache, queries(20, 8))  # two heads of a group in a tile


@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_fixed_splits_are_batch_invariant(interpreted, kind):
    """A row has the same bits alone and among others; the same call twice, always."""
    cache, query = filled(kind), queries(1, 6)
    split = functools.partial(attend, kv_split_size=64)
    out, lse = split(cache, query)
    check(query, None, cache, out, lse, first=LENGTHS - 1)
    one = cache.fork(np.array([1]))
    alone, alone_lse = split(one, query[1:2])
    np.testing.assert_array_equal(alone[0], out[1])
    np.testing.assert_array_equal(alone_lse[0], lse[1])
    whole = functools.partial(attend, kv_split_size=2**40)  # one part
    np.testing.assert_allclose(np.float32(whole(cache, query)[0]), np.float32(out), atol=0.02)
    for again in (split, attend):
        first, second = again(cache, query), again(cache, query)
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


def test_many_parts(interpreted):
    """More results of a sequence than one warpgroup joins; sequences with few of them besides."""
    lengths = np.array([1290, 65, 0])
    cache = filled("dense", lengths=lengths, kv_heads=1, capacity=1296)
    sinks = np.array([0.5, -0.5], np.float32)
    attend_and_check(
        cache, queries(1, 2), lengths, kv_split_size=64, sinks=sinks, reference=dict(sinks=sinks)
    )


def test_decode_over_arrays(interpreted):
    """Keys and values as a caller has them: lengths behind which there is NaN, odd S."""
    import axattn

    cache = filled("dense", lengths=np.array([200, 65, 1]))
    query, lengths = queries(2, 6), np.array([199, 65, 1])
    k, v = (jnp.asarray(x[:, :199], jnp.bfloat16) for x in caches.contents(cache))
    behind = np.arange(199)[:, None, None] >= lengths[:, None, None, None]
    k, v = (jnp.where(behind, jnp.nan, x) for x in (k, v))

    def program(implementation, *arrays):
        return axattn.dot_product_attention(
            *arrays,
            key_value_seq_lengths=lengths,
            implementation=implementation,
            return_residual=True,
        )

    out, lse = quick_jit(functools.partial(program, "mosaic_gpu"))(query, k, v)
    plain, plain_lse = quick_jit(functools.partial(program, "xla"))(query, k, v)
    np.testing.assert_allclose(np.float32(out), np.float32(plain), atol=0.02)
    np.testing.assert_allclose(lse, plain_lse, atol=1e-4)


def test_vmap(interpreted):
    """A cache per element."""
    caches_ = [filled("dense", lengths=n) for n in (LENGTHS, LENGTHS[::-1].copy())]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *caches_)
    query = jnp.stack([queries(1, 6), queries(1, 6, seed=4)])
    outs, _ = jax.vmap(attend)(stacked, query)
    for cache, q, out in zip(caches_, query, outs, strict=True):
        np.testing.assert_allclose(
            np.float32(out), np.float32(attend(cache, q)[0]), atol=0.02, rtol=0.02
        )
