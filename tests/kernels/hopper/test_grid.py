"""How the kernels divide a call: every row of every head belongs to one warpgroup."""

from __future__ import annotations

import collections

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.calls import call_of, make_call

flash = pytest.importorskip("axattn.kernels._hopper.flash.grid", exc_type=ImportError)


def make_grid(call, warpgroups=2, packing=True):
    from axattn.kernels._hopper.operands import gather_operands
    from axattn.kernels._problem import Problem

    operands = gather_operands(call)
    return flash.FlashGrid.create(
        Problem.from_call(call), operands, 64, warpgroups, packing=packing
    )


def work_tiles(grid):
    for program in range(grid.programs):
        for warpgroup in range(grid.warpgroups):
            yield grid.locate(jnp.int32(program), jnp.int32(warpgroup))


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
    grid = make_grid(make_call(B, T, 70, N, K, 64), warpgroups)
    assert grid.pack == pack
    seen = collections.Counter()
    for tile in work_tiles(grid):
        if not tile.has_rows:
            continue
        assert int(tile.rows.head) // (N // K) == int(tile.kv_head)
        for member in range(grid.pack):
            for slot in range(grid.slots):
                row = int(tile.rows.slot) + slot
                if row < T:
                    seen[int(tile.rows.batch), int(tile.rows.head) + member, row] += 1
    assert set(seen) == {(b, n, t) for b in range(B) for n in range(N) for t in range(T)}
    assert set(seen.values()) == {1}


def test_heads_that_share_keys_run_together_and_long_rows_first():
    grid = make_grid(make_call(1, 600, 600, 8, 2, 64), packing=False)
    tiles = list(work_tiles(grid))[::2]
    blocks = [int(tile.block) for tile in tiles]
    assert blocks == sorted(blocks, reverse=True)
    heads = [int(tile.kv_head) for tile in tiles if tile.block == blocks[0]]
    assert heads == sorted(heads)  # the G heads of one before those of the next


def test_few_key_heads_at_a_time_where_their_keys_fill_the_cache():
    q, kv = (jnp.zeros((1, length, 4, 256), jnp.bfloat16) for length in (64, 2**16))
    assert make_grid(call_of(q, kv, kv)).concurrent_kv_heads == 1
    assert make_grid(make_call(2, 64, 512, 4, 4, 64)).concurrent_kv_heads == 8


def test_packed_vectors():
    """Vectors over rows in the order of the tiles' rows: all slots of one head, then the next's."""
    from axattn.kernels._hopper.operands import gather_operands

    call = make_call(1, 20, 70, 4, 2, 64, is_causal=True)
    grid = make_grid(call)
    assert (grid.pack, grid.slots, grid.num_q) == (2, 32, 1)
    packed = np.asarray(grid.pack_vector(gather_operands(call).arrays["high"]))
    assert packed.shape == (1, 64)
    np.testing.assert_array_equal(packed[0, :20], np.arange(1, 21))
    np.testing.assert_array_equal(packed[0, 32:52], np.arange(1, 21))
    assert (packed[0, 20:32] <= 0).all() and (packed[0, 52:] <= 0).all()
