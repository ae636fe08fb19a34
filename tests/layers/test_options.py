"""The layers' options: head layout, kind of norm, what counts as asked for."""

from __future__ import annotations

import numpy as np
import pytest

from axattn.layers.options import head_layout, qk_norm_kind, requested


def test_head_layout():
    assert head_layout(8, None, 64) == (8, 8)
    assert head_layout(8, 2, 64) == (2, 8)
    assert head_layout(np.int64(8), np.int32(1), 64) == (1, 8)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((8, 3, 64), ValueError, "num_heads must be a multiple of num_kv_heads, got 8 and 3"),
        ((2, 4, 64), ValueError, "num_heads must be a multiple of num_kv_heads, got 2 and 4"),
        ((8, 2, 60), ValueError, "qkv_features must be a multiple of num_heads, got 60 and 8"),
        ((0, None, 64), ValueError, "num_heads must be a positive integer, got 0"),
        ((8, -1, 64), ValueError, "num_kv_heads must be a positive integer, got -1"),
        ((8.0, None, 64), TypeError, "num_heads must be an integer, got 8.0"),
        ((True, None, 64), ValueError, "num_heads must be a positive integer, got True"),
    ],
)
def test_head_layout_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        head_layout(*arguments)


def test_qk_norm_kind():
    assert qk_norm_kind(False, None) is None
    assert qk_norm_kind(True, None) == "layer" == qk_norm_kind(True, "layer")
    assert qk_norm_kind(False, "rms") == "rms"
    with pytest.raises(ValueError, match="got 'group'"):
        qk_norm_kind(False, "group")
    with pytest.raises(ValueError, match="contradicts"):
        qk_norm_kind(True, "rms")
    with pytest.raises(ValueError, match="qk_norm_per_head=False takes a qk_norm"):
        qk_norm_kind(False, None, per_head=False)


def test_requested():
    zero = np.zeros(2)
    assert requested(a=None, b=False, c=0, d=zero) == {"c": 0, "d": zero}
