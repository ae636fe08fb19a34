"""How the kernels cut a call: every row of every head belongs to one warpgroup."""

from __future__ import annotations

import collections

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.calls import call_of, make_call

work = pytest.importorskip("axattn.kernels._hopper.flash.grid", exc_type=ImportError)


def cut_of(call, warpgroups=2, packing=True):
    from axattn.kernels._hopper import operands
    from axattn.kernels._problem import Problem

    given = operands.of(call)
    return work.Cut.of(Problem.of(call), given, 64, warpgroups, packing=packing)


def items(cut):
    for index in range(cut.work):
        for warpgroup in range(cut.warpgroups):
            yield index, cut.item(jnp.int32(index), jnp.int32(warpgroup))


@pytest.mark.parametrize(
    "B, T, N, K, warpgroups, pack",
    [
        (2, 200, 4, 2, 2, 1),
        (1, 64, 6, 1, 3, 1),
        (2, 5, 8, 2, 2, 4),
        (1, 1, 16, 1, 2, 8),
        (1, 20, 12, 2, 2, 2),
        (3, 9, 6, 2, 1, 1),
    ],
)
def test_each_row_once(B, T, N, K, warpgroups, pack):
    cut = cut_of(make_call(B, T, 70, N, K, 64), warpgroups)
    assert cut.pack == pack
    seen = collections.Counter()
    for _, item in items(cut):
        if not item.real:
            continue
        assert int(item.rows.head) // (N // K) == int(item.kv_head)
        for member in range(cut.pack):
            for slot in range(cut.slots):
                row = int(item.rows.slot) + slot
                if row < T:
                    seen[int(item.rows.batch), int(item.rows.head) + member, row] += 1
    assert set(seen) == {(b, n, t) for b in range(B) for n in range(N) for t in range(T)}
    assert set(seen.values()) == {1}


def test_heads_that_share_keys_run_together_and_long_rows_first():
    cut = cut_of(make_call(1, 600, 600, 8, 2, 64), packing=False)
    order = [(int(item.tile), int(item.kv_head), int(item.rows.head)) for _, item in items(cut)][
        ::2
    ]
    tiles = [tile for tile, _, _ in order]
    assert tiles == sorted(tiles, reverse=True)
    heads = [kv_head for tile, kv_head, _ in order if tile == tiles[0]]
    assert heads == sorted(heads)  # the G heads of one before those of the next


def test_few_key_heads_at_a_time_where_their_keys_fill_the_cache():
    q, kv = (jnp.zeros((1, length, 4, 256), jnp.bfloat16) for length in (64, 2**16))
    assert cut_of(call_of(q, kv, kv)).together == 1
    assert cut_of(make_call(2, 64, 512, 4, 4, 64)).together == 8


def test_packed_vectors():
    """Vectors over rows in the order of the tiles' rows: all slots of one head, then the next's."""
    from axattn.kernels._hopper import operands

    call = make_call(1, 20, 70, 4, 2, 64, is_causal=True)
    cut = cut_of(call)
    assert (cut.pack, cut.slots, cut.num_q) == (2, 32, 1)
    packed = np.asarray(cut.packed(operands.of(call).arrays["high"]))
    assert packed.shape == (1, 64)
    np.testing.assert_array_equal(packed[0, :20], np.arange(1, 21))
    np.testing.assert_array_equal(packed[0, 32:52], np.arange(1, 21))
    assert (packed[0, 20:32] <= 0).all() and (packed[0, 52:] <= 0).all()
