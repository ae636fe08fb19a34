"""The calls of ``decode_bench.py``: their bytes, their FLOPs, and the caches that they read."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import Mask
from axattn._stored import UNUSED_POSITION
from benchmarks.harness import (
    bandwidth,
    decode_compile,
    decode_inputs,
    decode_peers,
    decode_programs,
    rounds,
)
from benchmarks.harness.decode_cases import PRESETS, Case

SMOKE, ISSUE = PRESETS["smoke"](), PRESETS["issue"]()
DENSE, PAGED, LATENT = SMOKE
RING = Case(3, 40, 4, 2, 32, kind="ring", window=16)
TREE = Case(2, 24, 4, 2, 32, tokens=4, tree=True)
WINDOW = Case(2, 64, 4, 2, 32, tokens=2, window=8)


# ---- bytes and FLOPs ----------------------------------------------------------------------------


def test_bytes_are_those_of_the_arrays():
    for case in (DENSE, LATENT, dataclasses.replace(DENSE, dtype="int8")):
        given = decode_inputs.structs(case)
        assert case.cache_bytes() == given.cache.nbytes
        out = jax.eval_shape(decode_programs.program(case, "xla").attend, given)
        assert case.bytes() - case.cache_bytes() == 2 * (given.query.size + out.size)


def test_ragged_rows():
    lengths = PAGED.lengths()
    assert sorted(lengths) == [0, 8, 23, 64] and lengths.dtype == np.int32
    np.testing.assert_array_equal(lengths, PAGED.lengths())
    np.testing.assert_array_equal(PAGED.keys_seen()[:, 0], lengths)


def test_pairs_are_those_of_the_mask():
    for case in (
        Case(2, 24, 4, 2, 32, tokens=5),
        TREE,
        WINDOW,
        dataclasses.replace(WINDOW, window=100),
    ):
        mask = Mask.causal()
        if case.window is not None:
            mask = mask & Mask.window(case.window, 0)
        if case.tree:
            mask = mask & Mask.dense(jnp.asarray(case.mask()))
        newest = jnp.arange(case.length - case.tokens, case.length)
        allowed = np.asarray(mask.materialize(case.tokens, case.length, q_positions=newest))
        allowed = np.broadcast_to(allowed, (case.batch, 1, case.tokens, case.length))
        np.testing.assert_array_equal(case.keys_seen(), allowed[:, 0].sum(-1), case.name)
        np.testing.assert_array_equal(case.keys_read(), allowed[:, 0].any(1).sum(-1), case.name)
        sizes = case.head_dim + case.value_size
        assert case.flops() == 2 * case.heads * sizes * allowed.sum()


def test_a_copy_counts_both_ways(monkeypatch):
    monkeypatch.setattr(rounds, "timer", lambda *_: (lambda: 0.5, None))
    (rate,) = bandwidth.Copy(1 << 12)()
    assert rate == 2 * (1 << 12) / 0.5


# ---- the preset ---------------------------------------------------------------------------------


def test_issue_has_what_was_asked_for():
    names = [case.name for case in ISSUE]
    assert len(set(names)) == len(names)
    assert {case.layout for case in ISSUE} == {"dense", "ring", "paged16", "paged64", "paged256"}
    assert {case.dtype for case in ISSUE} == {"bfloat16", "int8", "float8_e4m3fn"}
    assert {case.tokens for case in ISSUE} == {1, 4, 8, 16, 512}
    # All that a name is made of.
    assert set(names) >= {
        "gqa32/8/b32/4k/dense/bf16",
        "gqa32/8/b32/ragged/paged64/bf16/split2k",
        "gqa16/8/h256/b16/4k/cap50/window4k/dense/bf16",
        "gqa32/8/b16/4k/t8/tree/dense/bf16",
        "mla128/b64/8k/paged64/fp8",
    }


def test_sets_of_inputs_are_larger_than_l2_and_fit():
    for case in ISSUE:
        shape = decode_inputs.structs(case)
        assert decode_inputs.count(case) * case.cache_bytes() > 4 * 50e6, case
        # Twice more in layouts of others.
        assert 3 * decode_inputs.count(case) * shape.cache.nbytes < 64 << 30, case
        assert (shape.query.shape[0], shape.cache.batch) == (case.batch, case.batch)
        if case.page is not None:
            assert shape.cache.num_pages > decode_inputs.pages_needed(case).sum(), case


# ---- inputs -------------------------------------------------------------------------------------


def test_pages_are_shuffled_and_nobodys_twice():
    pool = decode_inputs.structs(PAGED).cache.num_pages
    table = decode_inputs.block_table(PAGED, pool, 0)
    used = table[table >= 0]
    assert len(used) == len(set(used)) == decode_inputs.pages_needed(PAGED).sum()
    assert used.max() < pool and not np.array_equal(used, np.sort(used))
    np.testing.assert_array_equal((table >= 0).sum(1), decode_inputs.pages_needed(PAGED))
    assert not np.array_equal(table, decode_inputs.block_table(PAGED, pool, 1))


@pytest.mark.ci
@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.name)
def test_caches_are_full_and_differ_from_set_to_set(case):
    first, second = (decode_inputs.make(case, seed) for seed in range(2))
    shape = decode_inputs.structs(case)
    for a, b, struct in zip(*map(jax.tree.leaves, (first, second, shape)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) == (struct.shape, struct.dtype)
    assert not np.array_equal(first.query, second.query)
    for a, b in zip(*(jax.tree.leaves(x.cache.arrays) for x in (first, second)), strict=True):
        assert not np.array_equal(a, b)
    np.testing.assert_array_equal(first.cache.lengths, case.lengths())
    if case is PAGED:
        table = decode_inputs.block_table(case, first.cache.num_pages, 0)
        np.testing.assert_array_equal(first.cache.block_table, table)
    keys = np.asarray(decode_peers._numbers(first.cache)[0], np.float32)
    assert np.isfinite(keys).all() and keys.std() > 0.5


@pytest.mark.ci
def test_a_ring_is_as_if_it_had_been_filled():
    cache = decode_inputs.empty(RING)
    while int(cache.lengths[0]) < RING.length:
        key = jnp.zeros((RING.batch, 8, RING.kv_heads, RING.head_dim), jnp.bfloat16)
        cache = cache.append(key, key)
    given = decode_inputs.make(RING, 0).cache
    np.testing.assert_array_equal(given.positions, cache.positions)
    np.testing.assert_array_equal(given.lengths, cache.lengths)
    short = decode_inputs.make(dataclasses.replace(RING, length=5), 0).cache
    assert sorted(set(np.asarray(short.positions)[0])) == [0, 1, 2, 3, 4, UNUSED_POSITION]


# ---- compiled, not measured ---------------------------------------------------------------------


def test_what_cannot_be_compiled_has_a_reason(monkeypatch):
    monkeypatch.setattr(decode_compile.aot, "device", lambda target: None)
    job = decode_compile.Compile(LATENT, ("fwd",), ("jax_nn_xla",), 0.0, math.inf)
    (row,) = (message for message in job() if isinstance(message, decode_compile.Row))
    assert (row.status, row.reason) == ("unsupported", "does not take quantized caches")
    assert row.floor_seconds == pytest.approx(LATENT.bytes() / 4.8e12)
