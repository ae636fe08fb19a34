"""axattn.Mask: what it says against numpy, what it promises of blocks, and how it is a pytree."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import axattn
from axattn import Mask
from axattn._mask_parts import EMPTY, FULL, PARTIAL
from axattn._masks import allows_every_row
from tests.reference import visible
from tests.tiers import ci

T, S, B = 13, 17, 3
RNG = np.random.default_rng(0)
Q_IDS, KV_IDS = RNG.integers(0, 3, (B, T)), RNG.integers(0, 3, (B, S))
PER_ROW = np.array([0, 5, -3])
Q_LENGTHS, KV_LENGTHS = np.array([13, 0, 4]), np.array([0, 17, 7])
DENSE = RNG.random((B, 4, T, S)) < 0.5

# name -> (mask, the reference's options for the same)
MASKS = {
    "all": (Mask(), {}),
    "causal": (Mask.causal(), dict(is_causal=True)),
    "causal_offset": (Mask.causal(6), dict(causal_offset=6)),
    "causal_negative": (Mask.causal(-5), dict(causal_offset=-5)),
    "causal_per_row": (Mask.causal(PER_ROW), dict(causal_offset=PER_ROW)),
    "window": (Mask.window(3, 2), dict(local_window_size=(3, 2))),
    "window_self": (Mask.window(0, 0), dict(local_window_size=(0, 0))),
    "window_left": (Mask.window(4, None), dict(local_window_size=(4, None))),
    "window_right": (Mask.window(None, 2), dict(local_window_size=(None, 2))),
    "window_open": (Mask.window(None, None), {}),
    "prefix": (Mask.prefix(5), dict(prefix=5)),
    "prefix_per_row": (Mask.prefix(PER_ROW), dict(prefix=PER_ROW)),
    "lengths": (
        Mask.lengths(Q_LENGTHS, KV_LENGTHS),
        dict(query_seq_lengths=Q_LENGTHS, key_value_seq_lengths=KV_LENGTHS),
    ),
    "q_lengths": (Mask.lengths(q=Q_LENGTHS), dict(query_seq_lengths=Q_LENGTHS)),
    "kv_length": (Mask.lengths(kv=9), dict(key_value_seq_lengths=9)),
    "segments": (
        Mask.segments(Q_IDS, KV_IDS),
        dict(query_segment_ids=Q_IDS, key_value_segment_ids=KV_IDS),
    ),
    "segments_sorted": (
        Mask.segments(np.sort(Q_IDS), np.sort(KV_IDS)[:1]),
        dict(query_segment_ids=np.sort(Q_IDS), key_value_segment_ids=np.sort(KV_IDS)[:1]),
    ),
    "dense": (Mask.dense(DENSE), dict(mask=DENSE)),
    "dense_TS": (Mask.dense(DENSE[0, 0]), dict(mask=DENSE[0, 0])),
    "dense_keys": (Mask.dense(DENSE[:, :, :1]), dict(mask=DENSE[:, :, :1])),
    "dense_queries": (Mask.dense(DENSE[..., :1]), dict(mask=DENSE[..., :1])),
    "dense_number": (Mask.dense(np.array(False)), dict(mask=np.array(False))),
    "and": (
        Mask.causal(2) & Mask.window(4, None) & Mask.lengths(kv=KV_LENGTHS),
        dict(causal_offset=2, local_window_size=(4, None), key_value_seq_lengths=KV_LENGTHS),
    ),
    "and_all": (
        Mask.prefix(4) & Mask.segments(Q_IDS, KV_IDS) & Mask.dense(DENSE) & Mask(),
        dict(prefix=4, query_segment_ids=Q_IDS, key_value_segment_ids=KV_IDS, mask=DENSE),
    ),
}

POSITIONS = {
    "slots": {},
    "shifted": dict(q_positions=np.arange(T) + 4),
    "per_row": dict(
        q_positions=np.arange(T) + np.array([[0], [9], [2]]),
        kv_positions=RNG.permutation(S),
    ),
}


def expected(options, positions, q_len=T, kv_len=S):
    pair = (
        positions.get("q_positions", np.arange(q_len)),
        positions.get("kv_positions", np.arange(kv_len)),
    )
    return visible(q_len, kv_len, positions=pair, **options)


def for_all(function):
    """``function(mask, positions)`` of every mask and kind of positions, from one program."""

    @jax.jit
    def program(masks):
        return {
            (name, kind): function(mask, positions)
            for name, mask in masks.items()
            for kind, positions in POSITIONS.items()
        }

    return program({name: mask for name, (mask, _) in MASKS.items()})


def test_materialize():
    found = for_all(lambda mask, positions: mask.materialize(T, S, **positions))
    for (name, kind), got in found.items():
        want = expected(MASKS[name][1], POSITIONS[kind])
        assert got.dtype == np.bool_
        assert got.shape[-2:] == (T, S)
        full = np.broadcast_shapes(got.shape, want.shape)
        got, want = np.broadcast_to(got, full), np.broadcast_to(want, full)
        np.testing.assert_array_equal(got, want, err_msg=f"{name}, {kind}")


def per_block(array, block_q, block_kv):
    """``(some, every)`` of every block of ``[..., T, S]``, reduced over heads."""
    array = array.reshape(-1, *array.shape[-3:]) if array.ndim > 3 else array[None]
    q_len, kv_len = array.shape[-2:]
    some, every = [], []
    for q, kv in itertools.product(range(0, q_len, block_q), range(0, kv_len, block_kv)):
        tile = array[..., q : q + block_q, kv : kv + block_kv]
        some.append(tile.any((1, 2, 3)))
        every.append(tile.all((1, 2, 3)))
    shape = (-1, -(-q_len // block_q), -(-kv_len // block_kv))
    return (np.stack(x, 1).reshape(shape) for x in (some, every))


def assert_sound(
    states, options, positions, q_len, kv_len, block_q, block_kv, *, tight=False, label=""
):
    states = np.asarray(states)
    some, every = per_block(expected(options, positions, q_len, kv_len), block_q, block_kv)
    assert states.dtype == np.int8
    assert states.shape[1:] == some.shape[1:], label
    states, some, every = np.broadcast_arrays(states, some, every)
    assert not some[states == EMPTY].any(), f"{label}: a block called empty is not"
    assert every[states == FULL].all(), f"{label}: a block called full is not"
    assert np.isin(states, (EMPTY, PARTIAL, FULL)).all(), label
    if tight:
        np.testing.assert_array_equal(states == EMPTY, ~some, err_msg=label)
        np.testing.assert_array_equal(states == FULL, every, err_msg=label)


# A part alone knows its blocks exactly, where positions ascend; a conjunction answers part by part.
TIGHT = {name for name in MASKS if not name.startswith(("segments", "and", "dense"))}


@pytest.mark.parametrize("blocks", [(4, 4), (5, 3), *ci(((1, 1),), ((16, 32),))])
def test_block_map(blocks):
    found = for_all(lambda mask, positions: mask.block_map(T, S, *blocks, **positions))
    for (name, kind), states in found.items():
        tight = kind != "per_row" and name in TIGHT
        positions = POSITIONS[kind]
        label = f"{name}, {kind}"
        assert_sound(states, MASKS[name][1], positions, T, S, *blocks, tight=tight, label=label)


def test_block_map_of_dense_and_sorted_segments_is_tight():
    # One head (a block is shared by all heads), and one segment per block at most.
    states = jax.jit(lambda mask: mask.block_map(T, S, 3, 2))(Mask.dense(DENSE[0, 0]))
    assert_sound(states, dict(mask=DENSE[0, 0]), {}, T, S, 3, 2, tight=True)
    ids = np.repeat([3, 5, 9], 4)[None]
    states = jax.jit(lambda mask: mask.block_map(12, 12, 4, 4))(Mask.segments(ids))
    assert_sound(states, dict(query_segment_ids=ids), {}, 12, 12, 4, 4, tight=True)
    np.testing.assert_array_equal(states[0], 2 * np.eye(3))


@pytest.mark.ci
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_block_map_is_sound(data):
    """EMPTY and FULL are promises, for any conjunction, block sizes and positions."""
    integers = lambda lo, hi: data.draw(st.integers(lo, hi))  # noqa: E731
    # Few lengths and blocks: every new shape compiles.
    q_len, kv_len = 9, 14
    block_q, block_kv = data.draw(st.sampled_from([(4, 5), (16, 2)]))
    rng = np.random.default_rng(integers(0, 2**32))
    mask, options, positions = Mask(), {}, {}
    if data.draw(st.booleans()):
        n = integers(-3, 6)
        mask, options["causal_offset"] = mask & Mask.causal(n), n
    if data.draw(st.booleans()):
        pair = data.draw(st.tuples(*[st.none() | st.integers(0, 9)] * 2))
        mask, options["local_window_size"] = mask & Mask.window(*pair), pair
    if data.draw(st.booleans()):
        n = rng.integers(-2, 15, 2)
        mask, options["prefix"] = mask & Mask.prefix(n), n
    if data.draw(st.booleans()):
        q, kv = rng.integers(0, q_len + 3, 2), rng.integers(0, kv_len + 3, 2)
        mask = mask & Mask.lengths(q, kv)
        options.update(query_seq_lengths=q, key_value_seq_lengths=kv)
    if data.draw(st.booleans()):
        q, kv = rng.integers(0, 3, (2, q_len)), rng.integers(0, 3, (2, kv_len))
        if data.draw(st.booleans()):
            q, kv = np.sort(q), np.sort(kv)
        mask = mask & Mask.segments(q, kv)
        options.update(query_segment_ids=q, key_value_segment_ids=kv)
    if data.draw(st.booleans()):
        options["mask"] = np.sort(rng.random((2, 1, q_len, kv_len)) < rng.random())
        mask = mask & Mask.dense(options["mask"])
    if data.draw(st.booleans()):
        positions["q_positions"] = rng.integers(0, 20, (2, q_len))
    if data.draw(st.booleans()):
        positions["kv_positions"] = rng.integers(0, 20, (2, kv_len))
    states = mask.block_map(q_len, kv_len, block_q, block_kv, **positions)
    assert_sound(states, options, positions, q_len, kv_len, block_q, block_kv)


def test_rows_that_are_said_to_see_a_key_do():
    """The einsum then leaves out its tests for empty rows."""
    parts = [
        Mask(), Mask.causal(), Mask.causal(2), Mask.causal(-1), Mask.causal(PER_ROW),
        Mask.window(3, 2), Mask.window(4, None), Mask.window(None, 0), Mask.prefix(0),
        Mask.prefix(PER_ROW), Mask.lengths(kv=9), Mask.segments(Q_IDS, KV_IDS), Mask.dense(DENSE),
    ]  # fmt: skip
    known = {}
    for first, second in itertools.combinations_with_replacement(range(len(parts)), 2):
        mask = parts[first] & parts[second]
        for q_len, kv_len in ((T, S), (T, T), (T, 5)):
            if (q_len, kv_len) != (T, S) and max(first, second) > 9:
                continue  # arrays of one size
            known[first, second, kv_len] = allows_every_row(mask, q_len, kv_len)
            if known[first, second, kv_len]:
                seen = np.asarray(mask.materialize(q_len, kv_len)).any(-1)
                assert seen.all(), (mask, q_len, kv_len)
    assert known[0, 0, 5] and known[1, 1, 5] and known[1, 5, T] and known[2, 9, S]
    assert not any(known[i, i, S] for i in (3, 4, 10, 11, 12)) and not known[5, 5, 5]


@pytest.mark.parametrize("huge", [2**31 - 1, 2**31, 2**40])
def test_huge_windows_are_open(huge):
    """Callers write "no bound" as a large number; int32 arithmetic must not wrap around."""
    mask = Mask.window(huge, huge) & Mask.causal()
    positions = dict(q_positions=np.arange(T) + 2**30, kv_positions=np.arange(S) + 2**30)
    want = visible(T, S, is_causal=True)[None]
    np.testing.assert_array_equal(mask.materialize(T, S, **positions), want)
    states = mask.block_map(T, S, 4, 4, **positions)
    assert_sound(states, dict(is_causal=True), {}, T, S, 4, 4, tight=True)


def test_later_masks_narrow():
    a, b = Mask.causal(), Mask.window(2, 1)
    np.testing.assert_array_equal(
        (a & b).materialize(T, S), a.materialize(T, S) & b.materialize(T, S)
    )
    np.testing.assert_array_equal((a & b).materialize(T, S), (b & a).materialize(T, S))
    with pytest.raises(TypeError):
        a & np.ones((T, S), bool)


class TestPytree:
    def test_round_trip(self):
        for mask, _ in MASKS.values():
            leaves, structure = jax.tree.flatten(mask)
            again = jax.tree.unflatten(structure, leaves)
            np.testing.assert_array_equal(again.materialize(T, S), mask.materialize(T, S))

    def test_numbers_are_structure_and_arrays_are_leaves(self):
        assert jax.tree.leaves(Mask.causal(3) & Mask.window(1, 2) & Mask.prefix(4)) == []
        assert jax.tree.structure(Mask.causal(3)) != jax.tree.structure(Mask.causal(4))
        leaves = jax.tree.leaves(Mask.lengths(np.array([1, 2]), 7) & Mask.causal(jnp.int32(1)))
        assert [leaf.dtype for leaf in leaves] == [jnp.int32, jnp.int32]

    def test_jit_argument_and_result(self):
        traces = []

        @jax.jit
        def narrowed(mask):
            traces.append(1)
            return mask & Mask.causal()

        for lengths in ([3, 4], [5, 1]):
            lengths = np.array(lengths)
            got = narrowed(Mask.lengths(kv=lengths)).materialize(T, S)
            want = visible(T, S, is_causal=True, key_value_seq_lengths=lengths)
            np.testing.assert_array_equal(got, want)
        assert len(traces) == 1

    def test_vmap(self):
        masks = (
            Mask.lengths(kv=jnp.array([3, 9])) & Mask.causal(jnp.array([0, 2])) & Mask.window(9, 9)
        )
        got = jax.vmap(lambda mask: mask.materialize(T, S)[0, 0])(masks)
        want = (masks).materialize(T, S)[:, 0]
        np.testing.assert_array_equal(got, want)
        # in_axes as a tree of the same structure
        got = jax.vmap(
            lambda m: m.materialize(T, S)[0, 0], in_axes=(jax.tree.map(lambda _: 0, masks),)
        )(masks)
        np.testing.assert_array_equal(got, want)

    def test_donation(self):
        array = jnp.asarray(DENSE[0, 0])
        flipped = jax.jit(lambda m: jax.tree.map(jnp.logical_not, m), donate_argnums=0)(
            Mask.dense(array)
        )
        np.testing.assert_array_equal(flipped.materialize(T, S)[0, 0], ~DENSE[0, 0])
        assert array.is_deleted()

    def test_scan_carries_a_mask(self):
        def step(mask, _):
            return jax.tree.map(lambda n: n + 1, mask), mask.materialize(2, 5).sum()

        _, counts = jax.lax.scan(step, Mask.lengths(kv=jnp.int32(1)), None, length=3)
        np.testing.assert_array_equal(counts, [2, 4, 6])

    def test_tree_map_to_none_and_back(self):
        # Partitioning a tree (Equinox, NNX) puts placeholders where the arrays were.
        mask = Mask.lengths(kv=np.array([1, 2]))
        placeholders = jax.tree.map(lambda _: None, mask)
        again = jax.tree.map(lambda _, x: x, placeholders, mask, is_leaf=lambda x: x is None)
        np.testing.assert_array_equal(again.materialize(T, S), mask.materialize(T, S))


def test_repr_says_what_it_is():
    text = repr(Mask.causal(2) & Mask.window(3, None))
    for word in ("Mask", "Causal", "2", "Window", "3", "None"):
        assert word in text
    jax.eval_shape(lambda n: repr(Mask.causal(n)) and n, 1)  # also with a traced array inside


def test_equal_masks_are_equal():
    assert Mask.causal() & Mask.window(3, 1) == Mask.causal() & Mask.window(3, 1)
    assert Mask.causal() != Mask.causal(1)
    assert hash(Mask.causal(1)) == hash(Mask.causal(1))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: Mask.window(-1, 0), ValueError, ["left", "-1", ">= 0"]),
        (lambda: Mask.window(0, -2), ValueError, ["right", "-2", ">= 0"]),
        (lambda: Mask.window(1.5, 0), (TypeError, ValueError), ["left", "1.5", "int"]),
        (lambda: Mask.window(True, 0), (TypeError, ValueError), ["left", "True", "int"]),
        (lambda: Mask.causal(1.5), TypeError, ["offset", "1.5", "int"]),
        (lambda: Mask.causal("1"), TypeError, ["offset", "'1'", "int"]),
        (lambda: Mask.causal(np.ones(2)), TypeError, ["offset", "int"]),
        (lambda: Mask.prefix(None), TypeError, ["length", "None", "int"]),
        (lambda: Mask.prefix(np.array([True])), TypeError, ["length", "int"]),
        (lambda: Mask.lengths(q=2.0), TypeError, ["q", "2.0", "int"]),
        (lambda: Mask.lengths(kv=np.ones(3)), TypeError, ["kv", "int"]),
        (lambda: Mask.lengths(kv=np.array([2**31])), ValueError, ["kv", "int32", "2147483648"]),
        (lambda: Mask.segments(np.ones((2, 3))), TypeError, ["q_ids", "float", "integer"]),
        (lambda: Mask.segments(np.int32(3)), TypeError, ["q_ids", "integer"]),
        (lambda: Mask.dense(np.ones((2, 2))), TypeError, ["mask", "boolean", "float"]),
        (lambda: Mask.dense(np.zeros((2, 2), int)), TypeError, ["mask", "boolean", "int"]),
        (lambda: Mask.segments(Q_IDS).materialize(T, S), ValueError, ["kv_ids", str(S)]),
        (lambda: Mask.dense(DENSE).materialize(T, S + 1), ValueError, ["mask", str(S + 1)]),
        (
            lambda: Mask.causal().materialize(T, S, q_positions=jnp.arange(T + 1)),
            ValueError,
            ["q_positions", f"[{T}]", f"({T + 1},)"],
        ),
        (
            lambda: Mask.causal().block_map(T, S, 4, 4, kv_positions=jnp.arange(S - 1)),
            ValueError,
            ["kv_positions", f"[{S}]", f"({S - 1},)"],
        ),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_mask_and_arguments_say_the_same():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 8)).astype(jnp.float32)) for n in (T, S, S))
    lengths = np.array([17, 9])
    by_arguments = axattn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=(4, 1), key_value_seq_lengths=lengths
    )
    mask = Mask.causal() & Mask.window(4, 1) & Mask.lengths(kv=lengths)
    np.testing.assert_array_equal(by_arguments, axattn.dot_product_attention(q, k, v, mask=mask))
