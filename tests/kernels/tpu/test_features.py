"""Every feature through the kernels, forward and backward, under the numeric rule."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from tests import cases, precision

# Refused, with a reason: masks per head and key.
REFUSED = {"mask_of_keys"}

DTYPES = (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("name", sorted(set(cases.CASES) - REFUSED))
def test_features(interpreted, name):
    dtype = DTYPES[len(name) % 2]
    precision.check(cases.make(name, dtype), ("mosaic_tpu",))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])
def test_outliers(interpreted, dtype):
    call = cases.make("causal_offset", dtype, outliers=True)
    precision.check(call, ("mosaic_tpu",))
