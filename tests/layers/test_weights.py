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
from axattn.layers.weights import attention_weights, weighted_sum

T, S, N, H = 5, 7, 4, 8

OPTIONS = {
    "plain": dict(),
    "causal": dict(is_causal=True, q_offset=jnp.array(2)),
    "window": dict(local_window_size=(1, 2)),
    "cap": dict(logits_soft_cap=0.5, scale=0.7),
    "sinks": dict(sinks=jnp.linspace(-1.0, 1.0, N)),
    "bias": dict(bias=jnp.linspace(-1.0, 1.0, N * T * S).reshape(N, T, S)),
    "dense mask": dict(mask=jnp.arange(T * S).reshape(T, S) % 3 > 0),
    "empty rows": dict(mask=(jnp.arange(T) != 2)[:, None]),
    "structured": dict(mask=Mask.lengths(kv=3) & Mask.causal(1)),
    "segments": dict(
        query_segment_ids=jnp.array([0, 0, 1, 1, 1]),
        key_value_segment_ids=jnp.array([0, 0, 0, 1, 1, 1, 1]),
    ),
    "dropout": dict(dropout_rate=0.4, dropout_rng=jax.random.key(0)),
    "broadcast dropout": dict(
        dropout_rate=0.4, dropout_rng=jax.random.key(0), broadcast_dropout=True
    ),
}


def arrays(lead, kv_heads, dtype=jnp.float32):
    shapes = ((T, N, H), (S, kv_heads, H), (S, kv_heads, 6))
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(k, (*lead, *shape), dtype) for k, shape in zip(keys, shapes, strict=True)
    )


SHAPES = [((), 4), ((2,), 2), ((2, 3), 1)]  # batch dimensions and K


@pytest.mark.parametrize(
    "options, lead, kv_heads",
    [(options, *SHAPES[i % 3]) for i, options in enumerate(OPTIONS.values())],
    ids=OPTIONS,
)
def test_same_as_the_function(options, lead, kv_heads):
    q, k, v = arrays(lead, kv_heads)
    weights = attention_weights(q, k, v, **options)
    assert weights.shape == (*lead, N, T, S) and weights.dtype == jnp.float32
    np.testing.assert_allclose(
        weighted_sum(weights, v), axattn.dot_product_attention(q, k, v, **options), atol=1e-5
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_einsum_hooks(kv_heads):
    q, k, v = arrays((2,), kv_heads)
    seen = []

    def einsum(subscripts, *operands):
        seen.append((subscripts, [x.shape for x in operands]))
        return jnp.einsum(subscripts, *operands)

    call = functools.partial(
        axattn.linen.dot_product_attention, q, k, v, mask=jnp.tri(T, S), logits_soft_cap=2.0
    )
    hooks = dict(qk_attn_weights_einsum=einsum, attn_weights_value_einsum=einsum)
    np.testing.assert_allclose(call(**hooks), call(), atol=1e-5)
    if kv_heads == N:  # what quantized einsums written for Flax know
        assert [s for s, _ in seen] == ["...qhd,...khd->...hqk", "...hqk,...khd->...qhd"]
    assert all(shapes[1] in (k.shape, v.shape) for _, shapes in seen)
    dropped = dict(dropout_rate=0.5, dropout_rng=jax.random.key(1))
    np.testing.assert_allclose(call(**hooks, **dropped), call(**dropped), atol=1e-5)
    np.testing.assert_allclose(
        call(einsum_dot_general=jax.lax.dot_general, precision="highest"), call(), atol=1e-5
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
