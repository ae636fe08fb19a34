"""Every block that the mask does not empty is visited once, and only full ones without the mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import Mask
from axattn._mask_parts import EMPTY, FULL
from axattn._stored import UNUSED_POSITION
from axattn.kernels import _block_map, _masks
from tests.kernels.calls import make_call

T, S, Q, KV = 200, 300, 32, 48


def walk(plan, batch, tile):
    """(block, is full) in the order of the visits, as a kernel would find them."""
    spans, order = plan
    row = min(batch, spans.shape[0] - 1)
    first, before, full, total = (jnp.int32(x) for x in spans[row, tile])
    one = _block_map.TileBlocks(
        first, before, full, total, None if order is None else order[row, tile]
    )
    return [(int(one.block(jnp.int32(n))), n < int(full)) for n in range(int(total))]


def states(array, kv_positions, block_q):
    array = array.any(1) if array.shape[1] == 1 else array
    if array.ndim == 4:
        some, every = array.any(1), array.all(1)
    else:
        some = every = array
    if kv_positions is not None:
        far = kv_positions >= UNUSED_POSITION
        some, every = some & ~far[:, None], every & ~far[:, None]

    def blocks(x, combine):
        rows = [combine(x[:, i : i + block_q], 1, keepdims=True) for i in range(0, T, block_q)]
        x = np.concatenate(rows, 1)
        return np.concatenate(
            [combine(x[:, :, j : j + KV], 2, keepdims=True) for j in range(0, S, KV)], 2
        )

    return np.where(blocks(some, np.any), np.where(blocks(every, np.all), FULL, 1), EMPTY)


RNG = np.random.default_rng(0)
MASKS = {
    "none": dict(),
    "causal": dict(is_causal=True),
    "offset": dict(is_causal=True, q_offset=np.array([-50, 60])),
    "window": dict(local_window_size=(70, 40)),
    "narrow": dict(local_window_size=(3, 0), q_offset=20),
    "lengths": dict(query_seq_lengths=np.array([0, 150]), key_value_seq_lengths=np.array([299, 5])),
    "prefix": dict(mask=Mask.prefix(100)),
    "packed": dict(query_segment_ids=np.arange(T) // 64, key_value_segment_ids=np.arange(S) // 90),
    "unsorted": dict(
        query_segment_ids=RNG.integers(0, 3, (2, T)), key_value_segment_ids=RNG.integers(0, 3, S)
    ),
    "dense": dict(mask=RNG.random((2, 4, T, S)) < 0.0005),
    "keys": dict(mask=(np.arange(S) // 60 % 2 == 0)[None, None, None]),
    "rows": dict(mask=(np.arange(T) // 50 % 2 == 0)[None, None, :, None]),
    "ring": dict(kv_positions=(np.arange(S) + 130) % S, is_causal=True, q_offset=60),
}


def of_few_rows(call, block_q, block_kv):
    assert block_q == T
    return _block_map.BlockMap(
        _block_map.span_few_rows(call, _masks.compute_row_bounds(call), block_kv), None
    )


# Masks for which few rows get no list: blocks that are empty between others are visited.
LISTED = ("packed", "unsorted", "dense", "keys", "rows", "ring")


@pytest.mark.parametrize(
    "plan_of", [_block_map.map_key_blocks, _block_map.map_query_blocks, of_few_rows]
)
@pytest.mark.parametrize("name", MASKS)
def test_visits(name, plan_of):
    by_keys, few = plan_of is _block_map.map_query_blocks, plan_of is of_few_rows
    block_q = T if few else Q

    @jax.jit
    def both():
        call = _masks.fold_key_masks(make_call(2, T, S, 4, 2, 64, **MASKS[name]))
        given = dict(q_positions=call.q_positions, kv_positions=call.kv_positions)
        return plan_of(call, block_q, KV), call.mask.materialize(T, S, **given), call.kv_positions

    plan, *mask = jax.tree.map(np.asarray, both())
    want = states(*mask, block_q)
    want = want.swapaxes(1, 2) if by_keys else want
    for batch in range(2):
        for tile in range(want.shape[1]):
            row = want[min(batch, len(want) - 1), tile]
            visited = walk(plan, batch, tile)
            blocks = [block for block, _ in visited]
            assert len(set(blocks)) == len(blocks)
            assert set(blocks) >= set(np.flatnonzero(row != EMPTY))
            assert all(row[block] == FULL for block, full in visited if full)
            if name not in (LISTED if few else ("unsorted", "ring")):
                # Nothing empty is visited, and the mask is evaluated where it must be: the ranges
                # of unsorted ids and positions cannot tell.
                assert set(blocks) == set(np.flatnonzero(row != EMPTY))
                tail = not by_keys and S % KV
                unmasked = {block for block, full in visited if full}
                assert unmasked == set(np.flatnonzero(row[: len(row) - bool(tail)] == FULL))


def test_the_last_keys_are_never_full():
    """Slots behind the end of the keys are zeros in shared memory, not keys."""
    call = make_call(1, T, S, 2, 2, 64)
    plan = _block_map.map_key_blocks(call, Q, KV)
    assert S % KV
    assert (plan.spans[:, :, 2] == S // KV).all() and (plan.spans[:, :, 3] == S // KV + 1).all()


def test_structured_masks_list_no_blocks():
    """O(T / block) memory, where a list would be O(T S / block^2)."""
    call = make_call(1, T, S, 2, 2, 64, is_causal=True, local_window_size=(50, 0))
    assert _block_map.map_key_blocks(call, Q, KV).order is None
