"""Random shapes and options against the reference (hypothesis)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import axattn
from axattn import Mask
from tests import cases, precision
from tests.cases import Shape
from tests.precision import Call

QUICK = settings(
    max_examples=8,
    phases=[Phase.explicit, Phase.generate],  # shrinking would compile a hundred programs
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
THOROUGH = settings(QUICK, max_examples=60)


@st.composite
def calls(draw, dtypes=(jnp.float32, jnp.bfloat16, jnp.float16)):
    """A call with any mix of features: shape and static options vary, and so do the arrays."""
    groups, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shape = Shape(
        B=draw(st.sampled_from([1, 2, 3, (), (2, 2)])),
        T=draw(st.integers(1, 40)),
        S=draw(st.integers(1, 60)),
        N=groups * kv_heads,
        K=kv_heads,
        H=draw(st.sampled_from([1, 3, 8, 16])),
        h=draw(st.sampled_from([1, 4, 16])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    call = Call(cases.arrays(rng, shape, draw(st.sampled_from(dtypes)), outliers=True))
    dtype = call.inputs["query"].dtype
    lead, some = shape.lead, lambda: draw(st.integers(0, 3)) == 0
    full = (*lead, shape.N, shape.T, shape.S)

    def broadcast_shape():
        return tuple(n if draw(st.booleans()) else 1 for n in full)

    def per_row(low, high):
        return rng.integers(low, high + 1, lead)

    options = call.options
    if draw(st.booleans()):
        options["is_causal"] = True
    if some():
        sides = st.none() | st.integers(0, 50)
        options["local_window_size"] = draw(st.tuples(sides, sides))
    if some():
        options["key_value_seq_lengths"] = per_row(0, shape.S)
    if some():
        options["query_seq_lengths"] = per_row(0, shape.T)
    if some():
        options["query_segment_ids"] = rng.integers(0, 3, (*lead, shape.T))
        options["key_value_segment_ids"] = np.sort(rng.integers(0, 3, (*lead, shape.S)))
    if some():
        options["mask"] = rng.random(broadcast_shape()) < 0.7
    if some():
        options["q_offset"] = draw(st.just(7) | st.just(per_row(-20, 60)))
    elif some():
        options["q_positions"] = rng.integers(0, 70, (*lead, shape.T))
        options["kv_positions"] = rng.permutation(shape.S)
    if some():
        options["logits_soft_cap"] = draw(st.sampled_from([0.5, 5.0, 50.0]))
    if some():
        options["scale"] = draw(st.sampled_from([0.0, -0.3, 1.0, np.float32(0.2)]))
    if some():
        size = (*draw(st.sampled_from([(), lead])), shape.N)
        options["alibi_slopes"] = rng.random(size, np.float32)
    if some():
        options["dropout_rate"] = draw(st.sampled_from([0.1, 0.9]))
        options["dropout_rng"] = jax.random.key(draw(st.integers(0, 100)))
        options["broadcast_dropout"] = draw(st.booleans())
    if some():
        call.inputs["bias"] = jnp.asarray(rng.normal(size=broadcast_shape()).astype(dtype))
    if some():
        call.inputs["sinks"] = jnp.asarray(rng.normal(size=shape.N).astype(dtype))
    return call


@pytest.mark.ci
@QUICK
@given(call=calls())
def test_any_call(small_blocks, call):
    precision.check(call)


@pytest.mark.exhaustive
@THOROUGH
@given(
    call=calls(),
    blocks=st.sampled_from([(8, 8), (5, 7), (32, 16)]),
)
def test_any_call_in_any_blocks(force_blocks, call, blocks):
    force_blocks(*blocks)
    precision.check(call)


@settings(QUICK, max_examples=6)
@given(data=st.data())
def test_permuting_keys_changes_nothing(data):
    """Softmax attention is a function of the set of (key, value, position) triples."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    q, k, v = cases.arrays(rng, Shape(2, 9, 14, 4, 2, 8, 8), jnp.float32).values()
    order = rng.permutation(14)
    positions = np.arange(14)

    def attend(k, v, positions):
        return axattn.dot_product_attention(
            q, k, v, is_causal=True, q_offset=5, kv_positions=positions
        )

    np.testing.assert_allclose(
        attend(k[:, order], v[:, order], positions[order]), attend(k, v, positions), atol=1e-5
    )


@settings(QUICK, max_examples=6)
@given(data=st.data())
def test_parts_of_the_keys_combine_by_their_lse(data):
    """Attention over two halves, joined by LSE, is attention over the whole (split-K, rings)."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    q, k, v = cases.arrays(rng, Shape(2, 9, 14, 4, 2, 8, 8), jnp.float32).values()
    lengths = rng.integers(0, 15, 2)
    whole = axattn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)
    parts = [
        axattn.dot_product_attention(
            q,
            k[:, s],
            v[:, s],
            mask=Mask.lengths(kv=np.clip(lengths - s.start, 0, 7)),
            return_residual=True,
        )
        for s in (slice(0, 7), slice(7, 14))
    ]
    outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
    top = np.where(np.isneginf(lses.max(0)), 0, lses.max(0))
    shares = np.exp(lses - top)
    total = shares.sum(0)
    joined = (shares[..., None] * outs).sum(0) / np.where(total == 0, 1, total)[..., None]
    np.testing.assert_allclose(joined, whole, atol=1e-5)


@settings(QUICK, max_examples=6)
@given(data=st.data())
def test_constants_on_all_keys_shift_the_lse_alone(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    q, k, v = cases.arrays(rng, Shape(2, 9, 14, 4, 2, 8, 8), jnp.float32).values()
    constant = rng.normal(size=(2, 4, 9, 1)).astype(np.float32) * 10
    out, lse = axattn.dot_product_attention(q, k, v, constant, return_residual=True)
    plain, plain_lse = axattn.dot_product_attention(q, k, v, return_residual=True)
    np.testing.assert_allclose(out, plain, atol=1e-5)
    np.testing.assert_allclose(lse, plain_lse + constant[..., 0].swapaxes(1, 2), atol=1e-5)


def test_the_strategy_reaches_every_option():
    """A property test that never draws a feature proves nothing about it."""
    seen, found = set(), []

    @settings(QUICK, max_examples=120)
    @given(call=calls())
    def draw(call):
        seen.update(call.options)
        seen.update(call.inputs)
        found.append(call.inputs["query"].shape)

    draw()
    assert seen >= {
        *("is_causal", "local_window_size", "key_value_seq_lengths", "query_seq_lengths"),
        *("query_segment_ids", "mask", "q_offset", "q_positions", "logits_soft_cap", "scale"),
        *("alibi_slopes", "dropout_rate", "broadcast_dropout", "bias", "sinks"),
    }
    assert {len(shape) for shape in found} == {3, 4, 5}
