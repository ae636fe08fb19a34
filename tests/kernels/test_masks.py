"""What kernels know of a mask before they see a value of it."""

from __future__ import annotations

import numpy as np
import pytest

from axattn import Mask
from axattn.kernels import masks
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


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_without_keys_are_expected_where_there_may_be_some(name):
    call = make_call(2, 20, 20, 2, 1, 64, **OPTIONS[name])
    q, kv = call.spans()
    seen = call.mask.tile(q, kv)
    seen = np.ones((1, 1, 20, 20), bool) if seen is None else np.asarray(seen)
    seen = np.broadcast_to(seen, (*seen.shape[:2], 20, 20))
    if call.bias is not None:
        seen = seen & np.isfinite(np.asarray(call.bias))
    expected = masks.may_have_empty_rows(call)
    assert expected == (not seen.any(-1).all())


def test_a_window_over_more_rows_than_keys():
    assert masks.may_have_empty_rows(make_call(1, 40, 20, 2, 1, 64, local_window_size=3))
