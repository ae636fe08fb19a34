"""Caches as values: shapes, sizes, overflow, truncation, forks, and what they refuse."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from axattn import _jax_compat
from axattn._stored import UNUSED_POSITION
from axattn.cache import Cache, DenseCache, PagedCache, RingCache, _write, bytes_per_token
from axattn.quantization import quantize
from tests import caches
from tests.caches import FLOATS, KINDS, PAGE, QUANTIZED, B, H, K, h
from tests.precision import optimized_jit
from tests.tiers import ci

append = caches.append
extend = jax.jit(lambda cache, q, k, v: cache.extend(q, k, v))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def grown(kind, lengths, **kwargs):
    """A cache with so many tokens per row, and those tokens."""
    _, k, v = caches.tokens(40)
    return caches.grown(caches.make(kind, **kwargs), k, v, lengths), k, v


# ---- what is stored, and what it takes ------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, *QUANTIZED])
def test_bytes(dtype):
    size = {"float32": 4, "int8": 1, "float8_e4m3fn": 1, "int4": 0.5}.get(dtype, 2)
    scale = 4 if dtype in QUANTIZED else 0
    per_token = K * ((H + h) * size + 2 * scale)
    for kind, slots in {"dense": B * 48, "ring": B * 64, "paged": (B * 6 + 2) * PAGE}.items():
        cache = jax.eval_shape(lambda: caches.make(kind, dtype=dtype))  # noqa: B023
        assert cache.bytes_per_token == per_token == bytes_per_token(K, H, h, dtype=dtype)
        assert cache.nbytes == slots * per_token
        assert isinstance(cache, Cache)
        assert (cache.batch, cache.num_kv_heads, cache.dtype) == (B, K, dtype)
        assert cache.capacity == {"dense": 48, "ring": 64, "paged": 48}[kind]


def test_published_sizes():
    assert bytes_per_token(1, 128) == 512
    assert bytes_per_token(1, 128, dtype="int8") == 264
    assert bytes_per_token(1, 128, dtype="int4") == 136
    assert bytes_per_token(1, 576, 512, values_in_keys=True) == 1152
    assert bytes_per_token(1, 128, dtype="int8") / bytes_per_token(1, 128) <= 0.52


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_a_pytree(kind):
    cache, _, _ = grown(kind, np.array([5, 40, 0]))
    leaves, structure = jax.tree.flatten(cache)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(cache)
    same(again, cache)
    assert jax.eval_shape(lambda: caches.make(kind)).nbytes == caches.make(kind).nbytes
    assert hash(structure) == hash(jax.tree.structure(caches.make(kind)))


@pytest.mark.parametrize(
    "kind, length, unit",
    [("dense", 16, 1), ("ring", 16, 4), ("paged", 7, 4), ("dense", 1, 4), ("paged", 16, 1)]
    + ci(("ring", 1, 4), ("ring", 7, 1), ("dense", 2, 4), ("paged", 2, 4), ("paged", 16, 4)),
)
def test_the_scatter_of_gpus_and_whole_tiles_of_tpus_write_the_same(kind, length, unit):
    """Wide rows of bytes are written in units; here of 4 slots (the ring's 64 have no remainder)."""
    _, k, v = caches.tokens(length)

    @jax.jit
    def both(cache):
        key, value, n = cache._check_tokens(k, v, np.array([length, min(length, 3), 0]))
        tokens, places = cache._encode(key, value), cache._map_slots(jnp.asarray(n), length)
        slices = _write._update_slices(cache.arrays, tokens, places, get_unit=lambda array: unit)
        return slices, _write._scatter_tokens(cache.arrays, tokens, places)

    for before in (np.array([31, 32, 0]), np.array([16, 4, 15])):
        same(*both(grown(kind, before)[0]))


def test_units_of_tpus():
    wide = {"int8": 32, "int4": 64, "uint8": 32, "bfloat16": 1, "float32": 1}
    for dtype, unit in wide.items():
        assert _write._get_tpu_unit(jax.ShapeDtypeStruct((2, 2, 128, 256), dtype)) == unit
        assert _write._get_tpu_unit(jax.ShapeDtypeStruct((2, 2, 128, 128), dtype)) == 1
        assert _write._get_tpu_unit(jax.ShapeDtypeStruct((2, 2, 16, 256), dtype)) == 1


@pytest.mark.parametrize(
    "kind, dtype",
    [("dense", "float32"), ("ring", "bfloat16"), ("paged", "int8"), ("dense", "float8_e4m3fn")]
    + ci(("dense", "bfloat16"), ("ring", "int8"), ("paged", "float32"), ("paged", "bfloat16")),
)
def test_append_is_in_place(kind, dtype):
    cache = jax.eval_shape(lambda: caches.make(kind, capacity=4096, dtype=dtype))
    _, k, v = caches.tokens(1, dtype=caches.float_dtype(dtype))
    step = optimized_jit(lambda c, k, v: c.append(k, v), donate_argnums=0)
    memory = step.lower(cache, k, v).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 8


@pytest.mark.ci
@pytest.mark.parametrize(
    "kind, dtype",
    [("dense", "float32"), ("dense", "float8_e4m3fn"), ("paged", "int8"), ("paged", "bfloat16")],
)
def test_a_step_takes_no_memory_by_the_capacity(kind, dtype):
    """int4 is not among them: XLA's CPU backend unpacks the whole array."""
    tokens = caches.tokens(1, dtype=caches.float_dtype(dtype))
    step = optimized_jit(lambda c, q, k, v: c.extend(q, k, v), donate_argnums=0)
    temporaries = []
    for capacity in (1024, 8192):
        cache = jax.eval_shape(lambda: caches.make(kind, capacity=capacity, dtype=dtype))  # noqa: B023
        memory = step.lower(cache, *tokens).compile().memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
    # The position of each slot, and the state of each block of them; keys alone are 32 and more.
    assert temporaries[1] - temporaries[0] <= 8 * (8192 - 1024)


# ---- overflow -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_overflow_is_an_error_where_it_can_be_known(kind):
    cache, k, v = grown(kind, np.array([40, 3, 0]))
    before = jax.tree.map(np.array, cache)
    with pytest.raises(ValueError, match=r"40.*(16|9)|48 tokens") as error:
        cache.append(k[:, :9], v[:, :9])
    assert "48 tokens" in str(error.value)
    same(before, cache)
    fine = cache.append(k[:, :9], v[:, :9], lengths=[8, 9, 9])
    assert not fine.overflowed.any()
    np.testing.assert_array_equal(fine.lengths, [48, 12, 9])


@pytest.mark.parametrize("kind", ["paged", *ci(("dense",))])
def test_overflow_under_jit_is_flagged_and_changes_nothing(kind):
    cache, k, v = grown(kind, np.array([40, 3, 0]))
    full = append(cache, k[:, :9], v[:, :9], np.array([9, 9, 9]))
    np.testing.assert_array_equal(full.overflowed, [True, False, False])
    np.testing.assert_array_equal(full.lengths, [40, 12, 9])
    stored = caches.contents(cache)
    for got, want in zip(caches.contents(full), stored, strict=True):
        np.testing.assert_array_equal(got[0, :40], want[0, :40])
    q, _, _ = caches.tokens(9)
    out, again = extend(cache, q, k[:, :9], v[:, :9])
    assert (np.asarray(out)[0] == 0).all() and (np.asarray(out)[1:] != 0).any()
    np.testing.assert_array_equal(again.overflowed, full.overflowed)


def test_checkify_raises():
    cache, k, v = grown("paged", np.array([40, 3, 0]))
    checked = jax.jit(checkify.checkify(lambda c, k, v, n: c.append(k, v, lengths=n)))
    refused = {(9, 0, 0): "48 tokens", (8, -1, 0): "lengths takes", (8, 10, 0): "lengths takes"}
    for counts, words in refused.items():
        error, _ = checked(cache, k[:, :9], v[:, :9], np.array(counts))
        with pytest.raises(checkify.JaxRuntimeError, match=words):
            error.throw()
    error, _ = checked(cache, k[:, :9], v[:, :9], np.array([8, 9, 0]))
    error.throw()


def test_a_page_that_is_not_there_is_overflow():
    cache, k, v = grown("paged", np.array([8, 3, 0]))
    table = np.array(cache.block_table)
    table[0, 1], table[1, 1:], table[2, 5] = -1, 10**6, -1
    cache = cache.with_table(table)
    with pytest.raises(ValueError, match=r"rows \[0\] with lengths \[8\]"):
        cache.append(k[:, :1], v[:, :1])
    flagged = append(cache, k[:, :6], v[:, :6], np.array([1, 6, 6]))
    np.testing.assert_array_equal(flagged.overflowed, [True, True, False])
    np.testing.assert_array_equal(flagged.lengths, [8, 3, 6])
    np.testing.assert_array_equal(
        append(cache, k[:, :5], v[:, :5], np.array([0, 5, 5])).lengths, [8, 8, 5]
    )


# ---- arrays that are there already -------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, dtype",
    [("dense", "float32"), ("paged", "bfloat16"), ("paged", "int8"), ("dense", "float8_e4m3fn")]
    + ci(("paged", "float32"), ("dense", "bfloat16"), ("dense", "int8"), ("paged", "float8_e4m3fn"))
    + [("dense", "int4"), *ci(("paged", "int4"))],
)
def test_from_arrays(kind, dtype):
    """Arrays laid out by hand, numbers or their bits, are a cache that tokens were appended to."""
    lengths, tokens = np.array([20, 7, 0]), caches.tokens(20, dtype=caches.float_dtype(dtype))
    want = append(caches.make(kind, dtype=dtype), *tokens[1:], lengths)
    given = dict(lengths=lengths, dtype=dtype)
    if kind == "paged":
        given["block_table"] = want.block_table
    for name, x in (("keys", tokens[1]), ("values", tokens[2])):
        parts = {name: x}
        if dtype in QUANTIZED:
            parts = dict(zip((name, f"{name[:-1]}_scales"), quantize(x, dtype), strict=True))
        for field, x in parts.items():
            x = np.asarray(x)
            rows, _, slots = want.arrays.keys.shape[:3]
            array = np.zeros((rows, K, slots, *x.shape[3:]), x.dtype)
            for b in range(B):
                for row, slot, p in caches.places(want, b):
                    array[row, :, slot] = x[b, p]
            given[field] = jnp.asarray(array)
    if dtype == "bfloat16":
        given["keys"] = jax.lax.bitcast_convert_type(given["keys"], jnp.uint16)
    if dtype == "float8_e4m3fn":
        given["values"] = jax.lax.bitcast_convert_type(given["values"], jnp.float8_e4m3fn)
    got = type(want).from_arrays(**given)
    if dtype in ("float32", "int8"):
        assert got.arrays.keys is given["keys"]
    same(got, want)
    dtypes = [[x.dtype for x in jax.tree.leaves(cache)] for cache in (got, want)]
    assert dtypes[0] == dtypes[1]


def test_from_arrays_with_values_in_keys():
    keys, center = jnp.ones((2, 2, 8, 4)), jnp.ones((2, 4))
    cache = DenseCache.from_arrays(keys, value_head_dim=3, lengths=[8, 1])
    assert cache.values_in_keys and cache.attend(jnp.ones((2, 1, 4, 4))).shape == (2, 1, 4, 3)
    cache = DenseCache.from_arrays(keys, keys, key_center=center, lengths=[8, 1])
    same(cache.key_center, center)
    assert cache.key_center is not center


def int8_arrays(**changes):
    codes, scales = jnp.ones((5, 2, 4, 8), jnp.int8), jnp.ones((5, 2, 4))
    given = dict(
        keys=codes, values=codes, key_scales=scales, value_scales=scales,
        block_table=np.array([[0, 1], [4, -1]]), lengths=np.array([8, 3]),
    )  # fmt: skip
    return PagedCache.from_arrays(**{**given, **changes})


MISFITS = {
    "keys": (ValueError, "keys takes .num_pages, K, page_size, H.", dict(keys=np.ones((5, 2, 4)))),
    "values": (
        ValueError, "values takes .* = .5, 2, 4, h. like keys, got shape .5, 4, 2, 8.",
        dict(values=np.ones((5, 4, 2, 8), np.int8)),
    ),
    "dtype of values": (TypeError, "values takes int8, got float32", dict(values=np.ones((5, 2, 4, 8), np.float32))),
    "bits without a dtype": (
        TypeError, "dtype takes that of the numbers", dict(keys=np.ones((5, 2, 4, 8), np.uint8))
    ),
    "dtype": (TypeError, "keys takes float8_e4m3fn .or its bits, uint8., got int8", dict(dtype="float8_e4m3fn")),
    "unknown dtype": (TypeError, "dtype takes one of", dict(dtype="int16")),
    "no scales": (ValueError, "key_scales takes float32 .* = .5, 2, 4. for int8, got None", dict(key_scales=None)),
    "shape of scales": (
        ValueError, "value_scales takes float32 .* got shape .5, 2.", dict(value_scales=np.ones((5, 2), np.float32))
    ),
    "dtype of scales": (
        TypeError, "key_scales takes float32 .* got bfloat16", dict(key_scales=jnp.ones((5, 2, 4), jnp.bfloat16))
    ),
    "scales of values in keys": (
        ValueError, "value_scales takes None where values are in the keys", dict(values=None)
    ),
    "scales of floats": (
        ValueError, "key_scales takes None of float32",
        dict(keys=np.ones((5, 2, 4, 8), np.float32), values=np.ones((5, 2, 4, 8), np.float32)),
    ),
    "value_head_dim": (ValueError, "value_head_dim takes that of values, 8, or None, got 4", dict(value_head_dim=4)),
    "values wider than keys": (
        ValueError, "value_head_dim takes at most head_dim, 8",
        dict(values=None, value_scales=None, value_head_dim=9),
    ),
    "block_table": (ValueError, "block_table takes .B, pages_per_row., got shape", dict(block_table=np.zeros(2, int))),
    "dtype of the table": (TypeError, "block_table takes integers", dict(block_table=np.zeros((2, 2)))),
    "lengths": (ValueError, "lengths takes int or int .B. = .2., 0 to 8", dict(lengths=9)),
    "no page": (ValueError, "lengths takes tokens that have a page: .* rows .1.", dict(lengths=[8, 5])),
    "a page that is not there": (
        ValueError, "lengths takes tokens that have a page", dict(block_table=np.array([[0, 5], [4, -1]]))
    ),
    "key_center": (ValueError, "key_center takes .K, H. = .2, 8.", dict(key_center=np.ones((2, 4)))),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_arrays_that_do_not_fit(case):
    error, message, changes = MISFITS[case]
    with pytest.raises(error, match=message):
        int8_arrays(**changes)
    assert int8_arrays().lengths.tolist() == [8, 3]


# ---- truncate, reset, fork ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_truncate_takes_tokens_back(kind):
    """A speculative block of 8 is written, part of it rejected, and other tokens follow."""
    lengths = np.array([32, 17, 8])
    cache, _, _ = grown(kind, lengths)
    _, k, v = caches.tokens(8, seed=9)
    more, keep = append(cache, k, v, np.array([8, 8, 8])), lengths + np.array([0, 3, 8])
    want = append(cache, k, v, np.array([0, 3, 8]))
    next_tokens = caches.tokens(5, seed=11)
    for truncate in (jax.jit(lambda c, n: c.truncate(n)), lambda c, n: c.truncate(n)):
        back = truncate(more, keep)
        np.testing.assert_array_equal(back.lengths, keep)
        for a, b in zip(caches.contents(back), caches.contents(want), strict=True):
            np.testing.assert_array_equal(a, b)
        out, wanted = (extend(c, *next_tokens)[0] for c in (back, want))
        np.testing.assert_allclose(out, wanted, atol=1e-6)
        assert not back.overflowed.any()
    same(cache.truncate(1000).lengths, cache.lengths)


def test_a_ring_cannot_go_back_behind_its_window():
    lengths = np.array([40, 17, 0])
    cache, _, _ = grown("ring", lengths, window=8, max_append=8)
    np.testing.assert_array_equal(cache.truncate([32, 17, 0]).lengths, [32, 17, 0])
    with pytest.raises(ValueError, match="no longer in the ring"):
        cache.truncate([31, 17, 0])
    with pytest.raises(ValueError, match="no longer in the ring"):
        cache.truncate(3)
    back = jax.jit(lambda c: c.truncate(np.array([31, 9, 0])))(cache)
    np.testing.assert_array_equal(back.overflowed, [True, False, False])
    np.testing.assert_array_equal(back.lengths, [40, 9, 0])
    np.testing.assert_array_equal(cache.truncate(np.array([40, 0, 0])).lengths, [40, 0, 0])


@pytest.mark.parametrize("window", [0, 2, *ci((1,))])
def test_a_ring_goes_back_where_the_window_is_left(window):
    """All that a ring must remember is the window before the next token."""
    rng = np.random.default_rng(window)
    empty = RingCache.create(1, window, 1, 4, max_append=3, dtype="float32")
    append = jax.jit(lambda c, n: c.append(*[jnp.ones((1, 3, 1, 4))] * 2, lengths=n))
    truncate = jax.jit(lambda c, n: c.truncate(n))
    refused = 0
    for _ in range(3):
        cache, held, length = empty, set(), 0
        for _ in range(20):
            new = int(rng.integers(1, 4))
            cache = append(cache, jnp.int32(new))
            for position in range(length, length + new):
                held = {p for p in held if (p - position) % cache.capacity} | {position}
            length += new
            keep = max(0, length - int(rng.choice([0, 1, 5, 7, 12], p=[0.8, *[0.05] * 4])))
            there = keep == length or held.issuperset(range(max(0, keep - window), keep))
            after = truncate(cache, jnp.int32(keep))
            assert after.overflowed.tolist() == [not there]
            if not there:
                refused += 1
                with pytest.raises(ValueError, match="no longer in the ring"):
                    cache.truncate(keep)
                continue
            assert cache.truncate(keep).lengths.tolist() == after.lengths.tolist() == [keep]
            cache, length = after, keep
            held = {p for p in held if p < keep}
            positions = np.asarray(cache.positions)
            assert set(positions[positions < UNUSED_POSITION].tolist()) == held
    assert (refused == 0) == (window == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_reset(kind):
    cache, k, v = grown(kind, np.array([32, 17, 3]))
    np.testing.assert_array_equal(cache.reset().lengths, [0, 0, 0])
    one = cache.reset(np.array([False, True, False]))
    np.testing.assert_array_equal(one.lengths, [32, 0, 3])
    if kind == "ring":
        assert (np.asarray(one.positions)[1] == UNUSED_POSITION).all()
    q, _, _ = caches.tokens(8)
    out, fresh = (extend(c, q, k[:, :8], v[:, :8])[0] for c in (one, caches.make(kind)))
    np.testing.assert_allclose(out[1], fresh[1], atol=1e-6)
    with pytest.raises(ValueError, match="rows takes bool"):
        cache.reset(np.array([1]))


@pytest.mark.parametrize("kind, dtype", [("dense", "float32"), ("ring", "int8"), ("paged", "int8")])
def test_fork(kind, dtype):
    cache, k, v = grown(kind, np.array([32, 17, 3]), dtype=dtype)
    rows = np.array([2, 0, 0, 1])
    forked = cache.fork(rows)
    assert forked.batch == 4
    np.testing.assert_array_equal(forked.lengths, np.asarray(cache.lengths)[rows])
    for got, want in zip(caches.contents(forked), caches.contents(cache), strict=True):
        np.testing.assert_array_equal(got, want[rows])
    if kind == "paged":
        assert forked.arrays.keys is cache.arrays.keys
    else:  # rows of their own
        _, k4, v4 = caches.tokens(4, batch=4, seed=3)
        grown_apart = append(forked, k4, v4, np.array([4, 4, 4, 4]))
        got = caches.contents(grown_apart)[0]
        assert not np.array_equal(got[1, 32:36], got[2, 32:36])
        np.testing.assert_array_equal(got[1, :32], got[2, :32])
    for bad in ([], [3], [-1], [0.5], [[0]]):
        with pytest.raises(ValueError, match="rows takes"):
            cache.fork(np.array(bad))


# ---- pages ----------------------------------------------------------------------------------


def test_copy_pages():
    cache, _, _ = grown("paged", np.array([32, 17, 3]))
    keys = np.asarray(cache.arrays.keys)
    copied = jax.jit(lambda c, s, t: c.copy_pages(s, t))(
        cache, np.array([3, -1, 7, 0]), np.array([0, 9, 1, 2])
    )
    want = keys.copy()
    want[0], want[1], want[2] = keys[3], keys[7], keys[3]
    assert want[:3].any((1, 2, 3)).all()
    np.testing.assert_array_equal(copied.arrays.keys, want)
    assert cache.copy_pages(np.array([], int), np.array([], int)) is cache
    for sources, targets in (([99], [0]), ([0], [-2]), ([0, 1], [0]), ([0.5], [0])):
        with pytest.raises((ValueError, TypeError), match="sources|targets"):
            cache.copy_pages(np.array(sources), np.array(targets))


def test_with_table():
    cache, _, _ = grown("paged", np.array([32, 17, 3]))
    table = np.asarray(cache.block_table)
    swapped = cache.with_table(table[[1, 0, 2]], lengths=[17, 32, 3])
    for got, want in zip(caches.contents(swapped), caches.contents(cache), strict=True):
        np.testing.assert_array_equal(got, want[[1, 0, 2]])
    kept = jax.jit(lambda c, t: c.with_table(t))(cache, table)
    np.testing.assert_array_equal(kept.lengths, cache.lengths)
    with pytest.raises(ValueError, match="block_table takes"):
        cache.with_table(table[:, :2])
    with pytest.raises(TypeError, match="block_table takes integers"):
        cache.with_table(table.astype(np.float32))
    with pytest.raises(ValueError, match="lengths takes"):
        cache.with_table(table, lengths=[49, 0, 0])


# ---- what is refused ------------------------------------------------------------------------

_, KEY, VALUE = caches.tokens(4)
QUERY = caches.tokens(4)[0]


@functools.cache
def holding(kind):
    return append(caches.make(kind), KEY, VALUE, np.full(B, 4))


REFUSED = {
    "head_dim": (ValueError, "key takes", lambda c: c.append(KEY[..., :8], VALUE)),
    "value_head_dim": (ValueError, "value takes", lambda c: c.append(KEY, KEY)),
    "heads": (ValueError, "key takes", lambda c: c.append(KEY[:, :, :1], VALUE[:, :, :1])),
    "batch": (ValueError, "key takes", lambda c: c.append(KEY[:2], VALUE[:2])),
    "tokens": (ValueError, "as many tokens", lambda c: c.append(KEY, VALUE[:, :3])),
    "no value": (ValueError, "value takes", lambda c: c.append(KEY)),
    "dtype": (TypeError, "dtype of the cache, float32", lambda c: c.append(KEY.astype("bfloat16"), VALUE)),
    "integers": (TypeError, "dtype", lambda c: c.append(KEY.astype(int), VALUE)),
    "lengths above T": (ValueError, "lengths takes", lambda c: c.append(KEY, VALUE, lengths=5)),
    "negative": (ValueError, "lengths takes", lambda c: c.append(KEY, VALUE, lengths=[-1, 0, 0])),
    "lengths shape": (ValueError, "lengths takes", lambda c: c.append(KEY, VALUE, lengths=[1, 1])),
    "lengths dtype": (TypeError, "lengths takes", lambda c: c.append(KEY, VALUE, lengths=1.5)),
    "query heads": (ValueError, "multiple", lambda c: c.attend(QUERY[:, :, :5])),
    "query size": (ValueError, "query takes", lambda c: c.attend(QUERY[..., :8])),
    "query batch": (ValueError, "query takes", lambda c: c.attend(QUERY[:1])),
    "query dtype": (TypeError, "query takes", lambda c: c.attend(QUERY.astype(int))),
    "own": (TypeError, "the cache knows", lambda c: c.attend(QUERY, kv_positions=np.arange(48))),
    "unknown": (TypeError, "whatever", lambda c: c.attend(QUERY, whatever=1)),
    "implementation": (NotImplementedError, "cudnn", lambda c: c.attend(QUERY, implementation="cudnn")),
    "truncate": (ValueError, "lengths takes", lambda c: c.truncate(-1)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_refused(kind, case):
    error, message, call = REFUSED[case]
    cache = holding(kind)
    before = jax.tree.map(np.array, cache)
    with pytest.raises(error, match=message):
        call(cache)
    same(before, cache)


def test_a_ring_refuses_more():
    cache = caches.make("ring", window=12, max_append=4)
    cases = [
        (lambda: cache.append(*caches.tokens(5)[1:]), "max_append = 4"),
        (lambda: cache.attend(QUERY, is_causal=False), "is_causal takes True"),
        (lambda: cache.attend(QUERY, local_window_size=(13, 0)), "local_window_size takes at most"),
        (
            lambda: cache.attend(QUERY, local_window_size=(None, 0)),
            "local_window_size takes at most",
        ),
        (lambda: cache.attend(QUERY, mask=np.ones((4, 16), bool)), "mask speaks of slots"),
        (lambda: cache.extend(*caches.tokens(9), return_residual=True), "return_residual"),
        (lambda: cache.extend(QUERY[:, :3], *caches.tokens(9)[1:]), "as many tokens"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    smaller = jax.jit(lambda c: c.append(KEY, VALUE).attend(QUERY, local_window_size=(3, 0)))
    assert np.isfinite(smaller(cache)).all()


@pytest.mark.parametrize(
    "create, message",
    [
        (lambda: DenseCache.create(0, 8, 1, 8), "batch takes"),
        (lambda: DenseCache.create(1, 8.5, 1, 8), "length takes"),
        (lambda: DenseCache.create(1, 8, True, 8), "num_kv_heads takes"),
        (lambda: DenseCache.create(1, 8, 1, 0), "head_dim takes"),
        (lambda: DenseCache.create(1, 8, 1, 8, value_head_dim=0), "value_head_dim takes"),
        (
            lambda: DenseCache.create(1, 8, 1, 8, value_head_dim=9, values_in_keys=True),
            "value_head_dim takes at most",
        ),
        (lambda: DenseCache.create(1, 8, 2, 8, key_center=np.zeros(8)), "key_center takes"),
        (
            lambda: DenseCache.create(1, 8, 1, 8, key_center=np.zeros((1, 8)), values_in_keys=True),
            "key_center takes None",
        ),
        (lambda: RingCache.create(1, -1, 1, 8), "window takes"),
        (lambda: RingCache.create(1, 4, 1, 8, max_append=0), "max_append takes"),
        (lambda: PagedCache.create(1, 0, 8, 4, 1, 8), "num_pages takes"),
        (lambda: PagedCache.create(1, 4, 0, 4, 1, 8), "page_size takes"),
        (lambda: PagedCache.create(1, 4, 8, 0, 1, 8), "pages_per_row takes"),
    ],
)
def test_caches_that_cannot_be(create, message):
    with pytest.raises(ValueError, match=message):
        create()


def test_next_positions():
    cache, _, _ = grown("dense", np.array([5, 17, 0]))
    np.testing.assert_array_equal(cache.next_positions(2), [[5, 6], [17, 18], [0, 1]])
    assert cache.next_positions(2).dtype == jnp.int32


def test_bfloat16_is_bits_where_xla_would_widen_it(monkeypatch):
    """Both ways of storing bfloat16 give the same numbers, whatever this jax does."""
    q, k, v = caches.tokens(16, dtype="bfloat16")
    results = []
    for moves in (True, False):
        monkeypatch.setattr(_jax_compat, "cpu_moves_bfloat16", lambda moves=moves: moves)
        cache = caches.make("paged", dtype="bfloat16")
        assert cache.arrays.keys.dtype == ("bfloat16" if moves else "uint16")
        out, cache = extend(cache, q, k, v)
        results.append((out, caches.contents(cache), cache.nbytes))
    same(*results)


def test_donating_one_does_not_take_another():
    """Tables, lengths and centers are the cache's own buffers."""
    center, table = jnp.ones((K, H)), jnp.arange(12).reshape(2, 6)
    made = [
        PagedCache.create(2, 12, PAGE, 6, K, H, dtype="float32", key_center=center).with_table(
            table, lengths=np.array([3, 4])
        )
        for _ in range(2)
    ]
    _, k, _ = caches.tokens(1, batch=2)
    step = jax.jit(lambda cs: tuple(c.append(k, k) for c in cs), donate_argnums=0)
    for _ in range(2):
        made = step(tuple(made))
    assert not (center.is_deleted() or table.is_deleted())
    np.testing.assert_array_equal(made[1].lengths, [5, 6])
    assert dataclasses.is_dataclass(made[0])


def test_a_row_that_overflowed_takes_no_more_until_reset():
    """Else a later token would stand where a missing one was."""
    cache, k, v = grown("dense", np.array([40, 3, 0]))
    full = append(cache, k[:, :9], v[:, :9], np.array([9, 9, 9]))
    later = append(full, k[:, :2], v[:, :2], np.array([2, 2, 2]))
    np.testing.assert_array_equal(later.lengths, [40, 14, 11])
    np.testing.assert_array_equal(later.overflowed, [True, False, False])
    np.testing.assert_array_equal(later.reset().overflowed, [False] * 3)
    with pytest.raises(ValueError, match=r"rows \[0\] have overflowed"):
        later.append(k[:, :1], v[:, :1])
    assert later.append(k[:, :1], v[:, :1], lengths=[0, 1, 1]).lengths[0] == 40
    again = later.reset(np.array([True, False, False])).append(k[:, :2], v[:, :2])
    np.testing.assert_array_equal(again.lengths, [2, 16, 13])


def test_queries_that_are_not_those_of_the_tokens_are_refused():
    q, k, v = caches.tokens(8)
    for kind in KINDS:
        cache = caches.make(kind)
        for few_q, few_k in ((q[:, -1:], k), (q, k[:, :1])):
            with pytest.raises(ValueError, match="as many tokens"):
                cache.extend(few_q, few_k, v[:, : few_k.shape[1]])
        with pytest.raises(TypeError, match="query_seq_lengths"):
            cache.extend(q, k, v, query_seq_lengths=1)
        full, cache = extend(cache, q, k, v)
        with pytest.raises(ValueError, match="query_seq_lengths takes"):
            cache.attend(q[:, -1:], query_seq_lengths=4)
        with pytest.raises(ValueError, match="query_seq_lengths takes"):
            cache.attend(q, query_seq_lengths=[1, 2])
    # Apart, they may be fewer: the last layer of a prompt needs its last token only.
    last = jax.jit(lambda c, q: c.attend(q))(cache, q[:, -1:])
    np.testing.assert_allclose(last, full[:, -1:], atol=1e-6)


def test_a_ring_refuses_queries_whose_window_is_gone():
    q, k, v = caches.tokens(10)
    cache = caches.make("ring", window=7, max_append=1)
    _, cache = extend(cache, q, k, v)
    with pytest.raises(ValueError, match="at most max_append = 1"):
        cache.attend(q[:, -3:])
    with pytest.raises(ValueError, match="window of 7 is still in the ring"):
        cache.attend(q[:, 7:8], q_positions=[7])
    attend = jax.jit(functools.partial(cache.attend, q_positions=np.array([9])))
    assert np.isfinite(attend(q[:, 9:])).all()


def test_what_is_stored_in_another_form_has_no_derivative():
    q, k, v = caches.tokens(4)

    def loss(k, cache, implementation):
        cache = cache.append(k, v.astype(k.dtype))
        return cache.attend(q, implementation=implementation).sum()

    for kind in KINDS:
        for dtype in (*QUANTIZED, "bfloat16"):
            cache = caches.make(kind, dtype=dtype)
            if cache.arrays.keys.dtype == dtype == "bfloat16":
                continue
            for name in (None, "xla"):
                with pytest.raises(NotImplementedError, match="no derivative"):
                    jax.grad(loss)(k.astype(caches.float_dtype(dtype)), cache, name)
    gradient = jax.jit(jax.grad(loss), static_argnums=2)(k, caches.make("dense"), "xla")
    assert (np.asarray(gradient) != 0).any()


def test_forks_can_be_donated():
    cache = caches.make("dense", key_center=np.ones((K, H), np.float32))
    _, k, v = caches.tokens(1)
    step = jax.jit(lambda cs: [c.append(k, v) for c in cs], donate_argnums=0)
    for _ in range(2):
        step([cache.fork([0, 1, 2]), cache.fork([2, 1, 0])])
    np.testing.assert_array_equal(cache.append(k, v).lengths, [1, 1, 1])


def test_caches_have_no_elementwise_equality():
    a, b = caches.make("dense"), caches.make("dense")
    assert a == a and a != b
    assert len({a, b}) == 2


def test_float64_needs_x64():
    with pytest.raises(TypeError, match="float64 with jax_enable_x64"):
        caches.make("dense", dtype="float64")
    with jax.enable_x64(True):
        _, k, v = caches.tokens(4, dtype="float64")
        cache = caches.make("paged", dtype="float64").append(k, v)
        np.testing.assert_array_equal(caches.contents(cache)[0][:, :4], k)


def test_the_number_of_copies_does_not_recompile():
    from axattn.cache._paged import _copy_pages

    cache = caches.make("paged")
    cache.copy_pages(np.arange(8), np.arange(8))
    before = _copy_pages._cache_size()
    for n in (5, 6, 7, 8):
        cache.copy_pages(np.arange(n), np.arange(n)[::-1].copy())
    assert _copy_pages._cache_size() == before


def test_what_is_no_array_is_named():
    cache = caches.make("dense")
    with pytest.raises(TypeError, match="key takes an array"):
        cache.append("x", VALUE)
    with pytest.raises(TypeError, match="key_center takes an array"):
        caches.make("dense", key_center="x")
    with pytest.raises(TypeError, match="key_center takes floating-point"):
        caches.make("dense", key_center=np.ones((K, H), complex))
