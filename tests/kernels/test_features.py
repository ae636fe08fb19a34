"""Every feature through the kernels, forward and backward, under the numeric rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import cases, precision
from tests.kernels.calls import with_layout
from tests.kernels.conftest import HOPPER, TPU
from tests.precision import Call
from tests.tiers import ci, exhaustive

DTYPES = {TPU: (jnp.bfloat16, jnp.float32), HOPPER: (jnp.bfloat16, jnp.float16)}

# With a reason: masks per head and key, and head sizes that are no multiple of 16.
REFUSED = {
    TPU: {"mask_of_keys"},
    HOPPER: {"mask_of_keys", "small_head", "decode_three", "three_batch_dimensions"},
}

# Calls whose programs differ by which arrays there are, and by sizes. What else a call may say is
# data, or an option of `test_all_at_once`. TPU kernels have others in small blocks
# (`tpu/test_blocks.py`).
BOTH = {"alibi_causal_rows", "bias_infinite", "head_192_128", "segments_unsorted"}
SIGNATURES = {
    TPU: BOTH | {"mask_TS", "small_head"},
    HOPPER: BOTH | {"dropout", "lengths_zero", "positions"},
}


def calls():
    for family, refused in REFUSED.items():
        assert set(cases.CASES) >= SIGNATURES[family]
        for i, name in enumerate(sorted(set(cases.CASES) - refused)):
            marks = [pytest.mark.ci if name in SIGNATURES[family] else pytest.mark.exhaustive]
            marks += [pytest.mark.hopper] if family == HOPPER else []
            yield pytest.param(family, ("tokens", "heads")[i % 2], name, marks=marks)


@pytest.mark.parametrize(
    "family", [TPU, pytest.param(HOPPER, marks=[pytest.mark.hopper, pytest.mark.ci])]
)
def test_all_at_once(interpreted, family):
    """The everyday call: every array and option that there is, in two tiles of rows and of keys."""
    rng, shape = np.random.default_rng(4), cases.Shape(B=2, T=72, S=104, H=32, h=16)
    inputs = cases.arrays(rng, shape, jnp.bfloat16)
    inputs["bias"] = jnp.asarray(rng.normal(size=(2, 1, 72, 104)).astype(jnp.bfloat16))
    inputs["sinks"] = jnp.asarray(rng.normal(size=4).astype(jnp.bfloat16))
    lengths = np.array([101, 60])
    options = dict(
        mask=rng.random((2, 4, 72, 104)) < 0.8,
        scale=0.4,
        is_causal=True,
        local_window_size=(50, 7),
        key_value_seq_lengths=lengths,
        logits_soft_cap=4.0,
        query_segment_ids=np.repeat([0, 1], [40, 32]),
        key_value_segment_ids=np.repeat([0, 1], [60, 44]),
        dropout_rate=0.1,
        dropout_rng=jax.random.key(3),
        alibi_slopes=np.linspace(0.01, 0.2, 4).astype(np.float32),
        q_offset=np.array([30, 20]),
    )
    behind = cases.behind(104, lengths)
    call = Call(inputs, options, poison=dict(key=behind, value=behind))
    precision.check(call, (family,))


@pytest.mark.parametrize("family, layout, name", list(calls()), indirect=["family"])
def test_features(interpreted, family, layout, name):
    call = with_layout(cases.make(name, DTYPES[family][len(name) % 2]), layout)
    precision.check(call, (family,))


@pytest.mark.parametrize(
    "dtype",
    [*exhaustive(0), *ci(1)],
    ids=["bfloat16", "other"],
)
def test_outliers(interpreted, family, dtype):
    call = cases.make("causal_offset", DTYPES[family][dtype], outliers=True)
    precision.check(call, (family,))
