"""The kernel over caches on TPUs: cores, block sizes, positions and codes.

What both families of kernels do is in `tests.kernels.test_caches`.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import _jax_compat
from axattn.cache import DenseCache, PagedCache
from axattn.kernels._tpu.cached import block_sizes, grid
from axattn.kernels._tpu.cached.block_sizes import find_cache_refusal
from axattn.kernels._tpu.cached.dequantize import decode_numbers
from axattn.kernels._tpu.cached.grid import CachedBlockSizes
from axattn.kernels._tpu.cached.kernel import attend_over_cache
from tests.cache.test_attend import check
from tests.kernels import cached
from tests.kernels.cached import LENGTHS, B, K, paged
from tests.kernels.calls import call_of_cache

H = 128

attend = functools.partial(cached.attend, "mosaic_tpu")
attend_and_check = functools.partial(cached.attend_and_check, "mosaic_tpu")
filled = functools.partial(cached.filled, head_dim=H, value_dim=H)


def queries(tokens, heads, head_dim=H, **options):
    return cached.queries(tokens, heads, head_dim, **options)


def test_slots_that_would_be_copied_are_refused():
    cache = filled("dense", head_dim=64, value_dim=64)
    call = call_of_cache(cache, queries(1, 6, 64))
    assert "slots of a row in a multiple of 128" in find_cache_refusal(call)
    call = call_of_cache(PagedCache.create(B, 8, 4, 2, K, H), queries(1, 6))
    assert "slots of a page in a multiple of 8, got 4" in find_cache_refusal(call)


@pytest.mark.ci
def test_many_rows_of_groups_of_eight():
    sizes = dict(head_dim=64, value_dim=64, kv_heads=4, capacity=256)
    attend_and_check(filled("dense", **sizes), queries(33, 32, 64))


@pytest.mark.ci
@pytest.mark.parametrize(
    "page, dtype, size", [(8, "int8", H), (128, "bfloat16", H), (128, "int8", 64)]
)
def test_pages(page, dtype, size):
    """Smaller than memory tiles, and as long as lanes."""
    attend_and_check(paged(page, dtype, head_dim=size), queries(2, 6, size))


@pytest.mark.ci
def test_one_head_after_another(monkeypatch):
    monkeypatch.setattr(grid, "SCORE_BYTES", 1)
    center = np.random.default_rng(0).normal(size=(K, H)) * 3
    attend_and_check(filled("dense", "int8", key_center=center), queries(2, 6), logits_soft_cap=5.0)


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_two_cores_give_the_same(kind):
    query, sizes = queries(3, 6), CachedBlockSizes(2, 128)

    @functools.partial(jax.jit, static_argnums=0)
    def run(cores, cache, real):
        call = call_of_cache(cache, query, query_seq_lengths=real)
        return attend_over_cache(call, sizes, cores=cores, interpret=True)

    for lengths in (LENGTHS, [0, 0, 0], [0, 33, 129], [1, 0, 208]):
        lengths = np.array(lengths)
        real = np.minimum(lengths, 3)
        cache = filled(kind, lengths=lengths)
        one, two = (run(cores, cache, real) for cores in (1, 2))
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-6)
        check(query, real, cache, *one, first=lengths - real)


def test_a_core_looks_ahead_in_its_own_steps():
    """What it fetched for another core nobody would wait for."""
    own = SimpleNamespace(cores=2, results_per_core=3, num_tiles=1)
    next_steps = grid._find_next_steps(jnp.array([4, 0, 2, 0, 7], jnp.int32), own)
    np.testing.assert_array_equal(next_steps[:5], [2, 2, -1, 4, -1])
    np.testing.assert_array_equal(next_steps[5:], [0, 4])


@pytest.mark.ci
def test_one_row_is_parted_among_cores():
    query, sinks = queries(1, 6)[:1], np.linspace(-1, 2, 6).astype(np.float32)

    @jax.jit
    def run(cache, real):
        call = call_of_cache(cache, query, query_seq_lengths=real, sinks=sinks)
        return attend_over_cache(call, CachedBlockSizes(1, 128), cores=2, interpret=True)

    for length in (200, 60, 0):
        lengths = np.array([length, 1, 1])
        cache = filled("dense", lengths=lengths).fork(np.array([0]))
        real = np.minimum(lengths[:1], 1)
        check(query, real, cache, *run(cache, real), first=lengths[:1] - real, sinks=sinks)


@pytest.mark.ci
def test_batches_of_prompts_and_steps():
    """Rows of one call with different numbers of new tokens; the whole prompt, and no cache."""
    lengths, real = np.array([200, 65, 30]), np.array([1, 0, 30])
    cache, query = filled("paged", lengths=lengths), queries(30, 6)
    out, lse = attend(cache, query, query_seq_lengths=real)
    check(query, real, cache, out, lse, first=lengths - real)


@pytest.mark.ci
@pytest.mark.parametrize("length", [200, 9])
def test_positions_of_the_query(length):
    cache = filled("dense", lengths=np.array([length, length, length]))
    query, positions = queries(4, 6), np.array([3, 7, 0, 5])
    out, _ = attend(cache, query, q_positions=positions)
    in_order, _ = attend(cache, query[:, np.argsort(positions)], q_positions=np.sort(positions))
    np.testing.assert_array_equal(out[:, np.argsort(positions)], in_order)


@pytest.mark.ci
def test_float32_queries_over_small_numbers():
    attend_and_check(filled("dense", "int8"), queries(2, 6, dtype="float32"))


def test_all_codes_of_float8():
    codes = jnp.arange(256, dtype=jnp.uint8)
    want = np.asarray(jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), np.float32)
    got = decode_numbers(codes.reshape(1, 1, 32, 8), "float8_e4m3fn", jnp.bfloat16)
    got = np.asarray(got, np.float32).reshape(-1)
    there = ~np.isnan(want)
    np.testing.assert_array_equal(got[there], want[there])
    assert np.isfinite(got).all()


@pytest.mark.ci
@pytest.mark.parametrize(
    "kind, dtype, cores",
    [
        ("dense", "bfloat16", 2),
        ("paged", "int8", 1),
        ("ring", "int8", 2),
    ],
)
def test_no_race_and_no_slot_out_of_bounds(kind, dtype, cores):
    """The interpreter that knows of memory spaces: what was not written is NaN there."""
    interpret = _jax_compat.make_tpu_interpreter(cores)
    how = dict(sizes=CachedBlockSizes(2, 128), cores=cores, interpret=interpret)
    attend_and_check(filled(kind, dtype), queries(3, 6), how=how)
    assert not _jax_compat.has_tpu_races()


def test_blocks_fit():
    for heads, kv_heads, size in ((32, 8, 128), (71, 1, 64), (32, 32, 128), (16, 8, 256)):
        cache = jax.eval_shape(lambda K=kv_heads, size=size: DenseCache.create(8, 8192, K, size))
        for tokens in (1, 8, 2048):
            query = jax.ShapeDtypeStruct((8, tokens, heads, size), jnp.bfloat16)
            found = {}

            def choose(cache, query, found=found):
                call = call_of_cache(cache, query)
                for mib in (16, 64, 128):
                    found[mib] = block_sizes.choose_block_sizes(call, mib * 2**20)

            jax.eval_shape(choose, cache, query)
            for mib, own in found.items():
                assert own.block_kv >= 128
                assert own.block_q * heads // kv_heads <= 1024
                assert own.vmem_limit is None or own.vmem_limit <= mib * 2**20
