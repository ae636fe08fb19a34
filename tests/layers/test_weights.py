"""Attention with its weights written out gives what the function gives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
import axattn.linen
from axattn import Mask
from axattn._layers.weights import compute_attention_weights, sum_values
from axattn._options import AttentionOptions
from tests.tiers import ci

T, S, N, H = 5, 7, 4, 8

OPTIONS = {
    "causal": dict(is_causal=True, q_offset=np.array(2), local_window_size=(1, 2)),
    "scores": dict(
        logits_soft_cap=0.5,
        scale=0.7,
        sinks=np.linspace(-1.0, 1.0, N, dtype=np.float32),
        bias=np.linspace(-1.0, 1.0, N * T * S, dtype=np.float32).reshape(N, T, S),
    ),
    "masks": dict(mask=(np.arange(T * S).reshape(T, S) % 3 > 0) & (np.arange(T) != 2)[:, None]),
    "structured": dict(
        mask=Mask.lengths(kv=3) & Mask.causal(1),
        query_segment_ids=np.array([0, 0, 1, 1, 1]),
        key_value_segment_ids=np.array([0, 0, 0, 1, 1, 1, 1]),
    ),
    "dropout": dict(dropout_rate=0.4, dropout_rng=jax.random.key(0)),
    "broadcast dropout": dict(
        dropout_rate=0.4, dropout_rng=jax.random.key(0), broadcast_dropout=True
    ),
}


def arrays(lead, kv_heads, dtype=jnp.float32):
    shapes = ((T, N, H), (S, kv_heads, H), (S, kv_heads, 6))
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(*lead, *shape)).astype(dtype)) for shape in shapes)


SHAPES = [((), 4), ((2,), 2), ((2, 3), 1)]  # batch dimensions and K


@pytest.mark.parametrize(
    "options, lead, kv_heads",
    [(options, *SHAPES[i % 3]) for i, options in enumerate(OPTIONS.values())],
    ids=OPTIONS,
)
def test_same_as_the_function(options, lead, kv_heads):
    q, k, v = arrays(lead, kv_heads)

    @jax.jit
    def both(q, k, v):
        weights = compute_attention_weights(q, k, v, AttentionOptions(**options))
        want = axattn.dot_product_attention(q, k, v, **options)
        return weights, sum_values(weights, v), want

    weights, got, want = both(q, k, v)
    assert weights.shape == (*lead, N, T, S) and weights.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, *ci((2,))])
def test_einsum_hooks(kv_heads):
    q, k, v = arrays((2,), kv_heads)
    seen = []

    def einsum(subscripts, *operands):
        seen.append((subscripts, [x.shape for x in operands]))
        return jnp.einsum(subscripts, *operands)

    def call(**options):
        attend = functools.partial(axattn.linen.dot_product_attention, mask=np.tri(T, S))
        return jax.jit(functools.partial(attend, logits_soft_cap=2.0, **options))(q, k, v)

    hooks, plain = dict(qk_attn_weights_einsum=einsum, attn_weights_value_einsum=einsum), call()
    np.testing.assert_allclose(call(**hooks), plain, atol=1e-5)
    if kv_heads == N:  # what quantized einsums written for Flax know
        assert [s for s, _ in seen] == ["...qhd,...khd->...hqk", "...hqk,...khd->...qhd"]
    assert all(shapes[1] in (k.shape, v.shape) for _, shapes in seen)
    dropped = dict(dropout_rate=0.5, dropout_rng=jax.random.key(1))
    np.testing.assert_allclose(call(**hooks, **dropped), call(**dropped), atol=1e-5)
    np.testing.assert_allclose(
        call(einsum_dot_general=jax.lax.dot_general, precision="highest"), plain, atol=1e-5
    )


@pytest.mark.parametrize("force", [True, False])
def test_low_precision(force):
    q, k, v = arrays((2,), 2, jnp.bfloat16)
    sown = []

    class Module:
        def sow(self, collection, name, value):
            sown.append((collection, name, value))

    out = axattn.linen.dot_product_attention(q, k, v, module=Module(), force_fp32_for_softmax=force)
    assert out.dtype == jnp.bfloat16
    ((collection, name, weights),) = sown
    assert (collection, name) == ("intermediates", "attention_weights")
    assert weights.dtype == (jnp.float32 if force else jnp.bfloat16)
    np.testing.assert_allclose(weights.astype(jnp.float32).sum(-1), 1, atol=1e-2)


def test_complex_numbers_are_left_to_flax():
    q, k, v = (x.astype(jnp.complex64) for x in arrays((2,), 4))
    assert axattn.linen.dot_product_attention(q, k, v).dtype == jnp.complex64
    with pytest.raises(NotImplementedError, match="complex"):
        axattn.linen.dot_product_attention(q, k, v, scale=1.0)
