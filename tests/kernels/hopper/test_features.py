"""Every feature through the kernels, forward and backward, under the numeric rule."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from tests import cases, precision

# Refused, with a reason: head sizes that are no multiple of 16, and masks per head and key.
REFUSED = {"small_head", "decode_three", "three_batch_dimensions", "mask_of_keys"}

DTYPES = (jnp.bfloat16, jnp.float16)

# The interpreter needs seconds for each. These do what others do, with less of it.
LESS = {
    *("nothing", "scale", "precision", "mha", "no_batch", "two_batch_dimensions", "one_key"),
    *("window_left_only", "window_self", "window_open_left", "window_open_right", "causal_window"),
    *("causal_before_all_keys", "lengths", "segments_sorted", "prefix_number", "mask_object"),
    *("mask_NTS", "mask_B1TS", "mask_of_rows", "bias_NTS", "bias_B11S", "bias_TS"),
    *("sinks", "alibi", "dropout_broadcast"),
}


def names():
    assert set(cases.CASES) >= LESS
    for name in sorted(set(cases.CASES) - REFUSED):
        yield pytest.param(name, marks=pytest.mark.exhaustive if name in LESS else ())


@pytest.mark.parametrize("name", list(names()))
def test_features(interpreted, name):
    dtype = DTYPES[len(name) % 2]
    precision.check(cases.make(name, dtype), ("mosaic_gpu",))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_outliers(interpreted, dtype):
    call = cases.make("causal_offset", dtype, outliers=True)
    precision.check(call, ("mosaic_gpu",))
