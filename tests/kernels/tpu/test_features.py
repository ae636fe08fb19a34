"""Every feature through the kernels, forward and backward, under the numeric rule."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from tests import cases, precision

# Refused, with a reason: masks per head and key.
REFUSED = {"mask_of_keys"}

DTYPES = (jnp.bfloat16, jnp.float32)

# Others are slow; tests of several blocks have what is particular of them.
QUICK = {
    "alibi_causal_rows",
    "bias_BNTS",
    "bias_infinite",
    "causal",
    "dropout",
    "everything",
    "head_192_128",
    "lengths_zero",
    "mask_TS",
    "mqa_16",
    "positions",
    "prefix",
    "segments_unsorted",
    "sinks_empty_rows",
    "small_head",
    "soft_cap",
}


LAYOUTS = ("tokens", "heads")


def names():
    for i, name in enumerate(sorted(set(cases.CASES) - REFUSED)):
        marks = () if name in QUICK else pytest.mark.ci
        yield pytest.param(LAYOUTS[i % 2], name, marks=marks)


@pytest.mark.parametrize("layout, name", list(names()), indirect=["layout"])
def test_features(interpreted, layout, name):
    dtype = DTYPES[len(name) % 2]
    precision.check(cases.make(name, dtype), ("mosaic_tpu",))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])
def test_outliers(interpreted, dtype):
    call = cases.make("causal_offset", dtype, outliers=True)
    precision.check(call, ("mosaic_tpu",))
