"""Every feature through the kernels, forward and backward, under the numeric rule."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from tests import cases, precision
from tests.kernels.conftest import HOPPER, TPU

DTYPES = {TPU: (jnp.bfloat16, jnp.float32), HOPPER: (jnp.bfloat16, jnp.float16)}

# With a reason: masks per head and key, and head sizes that are no multiple of 16.
REFUSED = {
    TPU: {"mask_of_keys"},
    HOPPER: {"mask_of_keys", "small_head", "decode_three", "three_batch_dimensions"},
}

# A call for each way in which programs differ: which arrays there are, and which sizes. All else
# that a call may say is data, or options that these have, too. TPU kernels have others of them in
# small blocks (`tpu/test_blocks.py`).
BOTH = {
    "alibi_causal_rows",
    "bias_infinite",
    "dropout",
    "head_192_128",
    "mask_TS",
    "segments_unsorted",
    "soft_cap",
}
SIGNATURES = {TPU: BOTH | {"small_head"}, HOPPER: BOTH | {"lengths_zero", "positions"}}
EVERYDAY = {"everything"}


def calls():
    for family, refused in REFUSED.items():
        assert set(cases.CASES) >= SIGNATURES[family] | EVERYDAY
        for i, name in enumerate(sorted(set(cases.CASES) - refused)):
            marks = [pytest.mark.hopper] if family == HOPPER else []
            if name not in EVERYDAY:
                own = name in SIGNATURES[family]
                marks.append(pytest.mark.ci if own else pytest.mark.exhaustive)
            yield pytest.param(family, ("tokens", "heads")[i % 2], name, marks=marks)


@pytest.mark.parametrize("family, layout, name", list(calls()), indirect=["family", "layout"])
def test_features(interpreted, family, layout, name):
    precision.check(cases.make(name, DTYPES[family][len(name) % 2]), (family,))


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(0, marks=pytest.mark.exhaustive), pytest.param(1, marks=pytest.mark.ci)],
    ids=["bfloat16", "other"],
)
def test_outliers(interpreted, family, dtype):
    call = cases.make("causal_offset", DTYPES[family][dtype], outliers=True)
    precision.check(call, (family,))
