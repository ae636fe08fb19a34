"""Decode and prompts over every kind of cache on TPUs, interpreted, against float64.

Slots without a token hold NaN, and unused entries of block tables garbage.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import Mask, _jax_compat
from axattn.cache import DenseCache, PagedCache
from axattn.kernels.tpu import cached
from axattn.kernels.tpu.cached_tiles import CachedTiles, cached_tiles, refuses
from tests import caches
from tests.cache.test_attend import check
from tests.kernels import cached as kernels_cached
from tests.kernels.cached import CAPACITY, LENGTHS, MAX_APPEND, B, K
from tests.kernels.calls import call_of_cache
from tests.precision import quick_jit

H = 128

DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn", "int4")


filled = functools.partial(kernels_cached.filled, head_dim=H, value_dim=H)


def queries(tokens, heads, head_dim=H, **options):
    return kernels_cached.queries(tokens, heads, head_dim, **options)


def paged(page, dtype="bfloat16", head_dim=H, lengths=LENGTHS, tokens=200):
    pages = -(-tokens // page)
    cache = PagedCache.create(B, B * pages + 2, page, pages, K, head_dim, dtype=dtype)
    table = np.random.default_rng(5).permutation(B * pages + 2)[: B * pages]
    cache = cache.with_table(table.reshape(B, pages))
    _, k, v = caches.tokens(tokens, head_dim=head_dim, value_dim=head_dim, dtype="bfloat16")
    return caches.poisoned(cache.append(k, v, lengths=lengths))


def attend(cache, query, *, tiles=None, cores=1, interpret=True, **options):
    def program(cache, query, arrays):
        call = call_of_cache(cache, query, **static, **arrays)
        assert refuses(call) is None
        return cached.attend(
            call,
            tiles or CachedTiles(min(query.shape[1], 8), 128),
            cores=cores,
            interpret=interpret,
        )

    arrays = {k: v for k, v in options.items() if isinstance(v, (np.ndarray, jax.Array, Mask))}
    static = {k: v for k, v in options.items() if k not in arrays}
    return quick_jit(program)(cache, query, arrays)


def attend_and_check(cache, query, lengths=LENGTHS, reference=None, how=None, **options):
    tokens = query.shape[1]
    real = np.minimum(lengths, tokens)
    out, lse = attend(cache, query, query_seq_lengths=real, **(how or {}), **options)
    options = options if reference is None else reference
    check(query, real, cache, out, lse, first=lengths - real, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", caches.KINDS)
@pytest.mark.parametrize("tokens", [1, pytest.param(20, marks=pytest.mark.ci)])
def test_kinds(kind, dtype, tokens):
    """A decode step, and a prompt's end."""
    query = queries(tokens, 6, dtype="float32" if dtype == "float32" else "bfloat16")
    attend_and_check(filled(kind, dtype), query)


# What a ring of 256 slots has besides `MAX_APPEND`; heads of other sizes than whole lanes are
# laid out slots last, and come in multiples of 128 slots.
LANES = dict(capacity=256, window=256 - MAX_APPEND)


def in_lanes(kind, dtype="bfloat16", **sizes):
    options = LANES if kind == "ring" else dict(capacity=256)
    return filled(kind, dtype, **options, **sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "ring"])
def test_slots_that_are_lanes(kind, dtype):
    query = queries(3, 6, 64, dtype="float32" if dtype == "float32" else "bfloat16")
    attend_and_check(in_lanes(kind, dtype, head_dim=64, value_dim=64), query)


def test_slots_that_would_be_copied_are_refused():
    cache = filled("dense", head_dim=64, value_dim=64)
    call = call_of_cache(cache, queries(1, 6, 64))
    assert "slots of a row in a multiple of 128" in refuses(call)


FEATURES = {
    "window": dict(local_window_size=(70, 0)),
    "cap_and_sinks": dict(logits_soft_cap=2.0, sinks=np.linspace(-1, 2, 6).astype(np.float32)),
    "alibi": dict(
        alibi_slopes=np.linspace(0.1, 1, B * 6, dtype=np.float32).reshape(B, 6), scale=0.2
    ),
    "tree": dict(mask=np.random.default_rng(1).random((B, 1, 4, CAPACITY)) < 0.7),
    "heads_mask": dict(mask=np.random.default_rng(1).random((1, 6, 4, CAPACITY)) < 0.7),
    "keys_mask": dict(mask=np.random.default_rng(1).random((B, 1, 1, CAPACITY)) < 0.7),
    "bias": dict(bias=np.random.default_rng(2).normal(size=(1, 6, 4, CAPACITY)).astype(np.float32)),
    "bias_of_rows": dict(
        bias=np.random.default_rng(2).normal(size=(B, 6, 4, 1)).astype(np.float32)
    ),
    "bias_of_keys": dict(
        bias=np.random.default_rng(2).normal(size=(1, 6, 1, CAPACITY)).astype(np.float32)
    ),
    "bias_of_all_heads": dict(
        bias=np.random.default_rng(2).normal(size=(B, 1, 1, CAPACITY)).astype(np.float32)
    ),
    "segments": dict(
        query_segment_ids=np.full((B, 4), 2),
        key_value_segment_ids=np.arange(CAPACITY)[None] // 52 * [[1]] * B,
    ),
    "prefix": dict(mask=Mask.prefix(9)),
    "negative_scale": dict(scale=-0.3),
}


@pytest.mark.parametrize("block_q", [pytest.param(4, marks=pytest.mark.ci), 2])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, block_q):
    """Speculative steps, in one tile and in two."""
    dtype = ("bfloat16", "int8")[len(feature) % 2]
    lengths = np.array([200, 65, 4])
    options, reference = dict(FEATURES[feature]), dict(FEATURES[feature])
    for name in ("mask", "bias", "key_value_segment_ids"):
        if isinstance(reference.get(name), np.ndarray) and reference[name].shape[-1] > 1:
            reference[name] = reference[name][..., : lengths.max()]
    if feature == "prefix":
        reference = dict(prefix=9)
    cache = filled("paged", dtype, lengths)
    how = dict(tiles=CachedTiles(block_q, 128))
    attend_and_check(cache, queries(4, 6), lengths, reference, how, **options)


@pytest.mark.parametrize(
    "dtype, feature",
    [
        ("bfloat16", "window"),
        ("int8", "cap_and_sinks"),
        ("float8_e4m3fn", "tree"),
        ("bfloat16", "tree"),
    ],
)
def test_latent(dtype, feature):
    """Values that are the first features of their keys."""
    lengths = np.array([200, 65, 4])
    heads, options = 20, dict(FEATURES[feature])
    if "sinks" in options:
        options["sinks"] = np.linspace(-1, 2, heads).astype(np.float32)
    sizes = dict(kv_heads=1, values_in_keys=True)
    size = 256 if feature == "tree" else 192
    if size == 256:
        cache = filled("paged", dtype, lengths, head_dim=256, value_dim=128, **sizes)
    else:
        cache = in_lanes("dense", dtype, lengths=lengths, head_dim=192, value_dim=128, **sizes)
    reference = dict(options)
    if "mask" in reference:
        reference["mask"] = reference["mask"][..., : lengths.max()]
    attend_and_check(cache, queries(4, heads, size), lengths, reference, **options)


@pytest.mark.parametrize("kind", ["dense", "ring"])
def test_latent_of_deepseek(kind):
    """The real sizes: 576 features, of which 512 are the values."""
    sizes = dict(head_dim=576, value_dim=512, kv_heads=1, values_in_keys=True)
    attend_and_check(in_lanes(kind, **sizes), queries(1, 16, 576))


@pytest.mark.parametrize(
    "head_dim, value_dim, heads, kv_heads, tokens",
    [
        (128, 64, 16, 1, 5),
        (64, 128, 8, 8, 1),
        (80, 48, 6, 2, 2),
        (256, 256, 4, 2, 1),
        (64, 64, 32, 4, 33),
        (64, 64, 3, 3, 16),
    ],
)
def test_shapes(head_dim, value_dim, heads, kv_heads, tokens):
    """Groups of 1 to 16, sizes that are no powers of two, the largest."""
    cache = in_lanes("dense", head_dim=head_dim, value_dim=value_dim, kv_heads=kv_heads)
    attend_and_check(cache, queries(tokens, heads, head_dim))


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.ci), "int8"])
@pytest.mark.parametrize("page", [8, 16, 64, 96, 128, 256])
def test_pages(page, dtype):
    """Pages smaller than a block, as large, larger, and of a size that no block is a multiple of."""
    attend_and_check(paged(page, dtype), queries(2, 6))
    if page % 128 == 0:
        attend_and_check(paged(page, dtype, 64), queries(2, 6, 64))


@pytest.mark.parametrize("head_together", [1, 2])
def test_a_center_of_keys(head_together, monkeypatch):
    from axattn.kernels.tpu import cached_tiles as module

    if head_together == 1:
        monkeypatch.setattr(module, "SCORE_BYTES", 1)
    center = np.random.default_rng(0).normal(size=(K, H)) * 3
    cache = filled("dense", "int8", key_center=center)
    attend_and_check(cache, queries(2, 6), logits_soft_cap=5.0)
    attend_and_check(cache, queries(20, 8))


@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.parametrize("lengths", [LENGTHS, [0, 0, 0], [0, 33, 129], [1, 0, 208]])
def test_two_cores_give_the_same(kind, lengths):
    lengths = np.array(lengths)
    if not lengths.any():
        cache = caches.make(kind, capacity=CAPACITY, head_dim=H, value_head_dim=H, dtype="bfloat16")
        cache = caches.poisoned(cache)
    else:
        cache = filled(kind, lengths=lengths)
    query = queries(3, 6)
    tiles = CachedTiles(2, 128)
    real = np.minimum(lengths, 3)
    one, two = (
        attend(cache, query, tiles=tiles, cores=cores, query_seq_lengths=real) for cores in (1, 2)
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-6)
    check(query, real, cache, *one, first=lengths - real)


@pytest.mark.parametrize("length", [200, 60, 0])
def test_one_row_is_parted_among_cores(length):
    lengths = np.array([length, 1, 1])
    cache = filled("dense", lengths=lengths).fork(np.array([0]))
    query, sinks = queries(1, 6)[:1], np.linspace(-1, 2, 6).astype(np.float32)
    real = np.minimum(lengths[:1], 1)
    out, lse = attend(cache, query, cores=2, sinks=sinks, query_seq_lengths=real)
    check(query, real, cache, out, lse, first=lengths[:1] - real, sinks=sinks)


def test_batches_of_prompts_and_steps():
    """Rows of one call with different numbers of new tokens; the whole prompt, and no cache."""
    lengths, real = np.array([200, 65, 30]), np.array([1, 0, 30])
    cache, query = filled("paged", lengths=lengths), queries(30, 6)
    out, lse = attend(cache, query, query_seq_lengths=real)
    check(query, real, cache, out, lse, first=lengths - real)


@pytest.mark.parametrize("length", [200, 9])
def test_positions_of_the_query(length):
    cache = filled("dense", lengths=np.array([length, length, length]))
    query, positions = queries(4, 6), np.array([3, 7, 0, 5])
    out, _ = attend(cache, query, q_positions=positions)
    in_order, _ = attend(cache, query[:, np.argsort(positions)], q_positions=np.sort(positions))
    np.testing.assert_array_equal(out[:, np.argsort(positions)], in_order)


def test_float32_queries_over_small_numbers():
    cache = filled("dense", "int8")
    attend_and_check(cache, queries(2, 6, dtype="float32"))


def test_all_codes_of_float8():
    from axattn.kernels.tpu import cached_codes

    codes = jnp.arange(256, dtype=jnp.uint8)
    want = np.asarray(jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), np.float32)
    got = cached_codes.numbers(codes.reshape(1, 1, 32, 8), "float8_e4m3fn", jnp.bfloat16)
    got = np.asarray(got, np.float32).reshape(-1)
    there = ~np.isnan(want)
    np.testing.assert_array_equal(got[there], want[there])
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    "kind, dtype", [("dense", "bfloat16"), ("paged", "int8"), ("ring", "int8")]
)
@pytest.mark.parametrize("cores", [1, 2])
def test_no_race_and_no_slot_out_of_bounds(kind, dtype, cores):
    """The interpreter that knows of memory spaces: what was not written is NaN there."""
    interpret = _jax_compat.tpu_interpreter(cores)
    query = queries(3, 6)
    how = dict(tiles=CachedTiles(2, 128), cores=cores, interpret=interpret)
    attend_and_check(filled(kind, dtype), query, how=how)
    assert not _jax_compat.tpu_races_found()


@pytest.mark.parametrize("megabytes", [16, 64, 128])
@pytest.mark.parametrize(
    "heads, kv_heads, size", [(32, 8, 128), (71, 1, 64), (32, 32, 128), (16, 8, 256)]
)
def test_tiles_fit(heads, kv_heads, size, megabytes):
    cache = jax.eval_shape(lambda: DenseCache.create(8, 8192, kv_heads, size))
    for tokens in (1, 8, 2048):
        query = jax.ShapeDtypeStruct((8, tokens, heads, size), jnp.bfloat16)
        found = []
        jax.eval_shape(
            lambda cache, query, found=found: found.append(
                cached_tiles(call_of_cache(cache, query), megabytes * 2**20)
            ),
            cache,
            query,
        )
        assert found[0].block_kv >= 128
        assert found[0].block_q * heads // kv_heads <= 1024
        assert found[0].vmem_limit is None or found[0].vmem_limit <= megabytes * 2**20
