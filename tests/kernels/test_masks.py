"""What kernels know of a mask before they see a value of it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from axattn import Mask
from axattn._masks import compute_mask_tile
from axattn.kernels import _masks
from tests.kernels.calls import make_call

OPTIONS = {
    "none": {},
    "causal": dict(is_causal=True),
    "window": dict(local_window_size=(3, 0)),
    "prefix": dict(mask=Mask.prefix(np.array([2, 7]))),
    "before": dict(mask=Mask.causal(-2)),
    "offset": dict(is_causal=True, q_offset=-3),
    "lengths": dict(query_seq_lengths=np.array([3, 20])),
    "segments": dict(query_segment_ids=np.zeros(20, int), key_value_segment_ids=np.ones(20, int)),
    "array": dict(mask=np.zeros((20, 20), bool)),
    "bias": dict(bias=np.full((20, 20), -np.inf)),
}


BOUNDED = {name: OPTIONS[name] for name in ("causal", "prefix", "offset", "lengths")} | {
    "window": dict(local_window_size=(3, 2)),
    "rows": dict(mask=(np.arange(40).reshape(2, 1, 20, 1) % 3 > 0)),
    "keys": dict(mask=(np.arange(20) % 3 > 0)[None, None, None], is_causal=True),
    "positions": dict(
        kv_positions=(np.arange(20) + 7) % 20,
        q_positions=np.arange(20)[::-1],
        key_value_seq_lengths=np.array([5, 19]),
        local_window_size=(9, 0),
    ),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_of_rows_and_positions_of_keys_are_the_mask(name):
    @jax.jit
    def both():
        call = make_call(2, 20, 20, 2, 1, 64, **BOUNDED[name])
        given = dict(q_positions=call.q_positions, kv_positions=call.kv_positions)
        want = call.mask.materialize(20, 20, **given)
        call = _masks.fold_key_masks(call)
        low, high = _masks.compute_row_bounds(call)
        positions = call.spans()[1].positions[:, None]
        found = positions < high[..., None]
        return found if low is None else found & (positions >= low[..., None]), want

    found, want = (np.asarray(x) for x in both())
    np.testing.assert_array_equal(
        np.broadcast_to(found, (2, 20, 20)), np.broadcast_to(want[:, 0], (2, 20, 20))
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_without_keys_are_expected_where_there_may_be_some(name):
    call = make_call(2, 20, 20, 2, 1, 64, **OPTIONS[name])
    q, kv = call.spans()
    seen = compute_mask_tile(call.mask, q, kv)
    seen = np.ones((1, 1, 20, 20), bool) if seen is None else np.asarray(seen)
    seen = np.broadcast_to(seen, (*seen.shape[:2], 20, 20))
    if call.bias is not None:
        seen = seen & np.isfinite(np.asarray(call.bias))
    expected = _masks.may_have_empty_rows(call)
    assert expected == (not seen.any(-1).all())


def test_a_window_over_more_rows_than_keys():
    assert _masks.may_have_empty_rows(make_call(1, 40, 20, 2, 1, 64, local_window_size=3))
