"""Masks of any dtype, and biases given for one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import axattn.linen
import axattn.nnx
from axattn._layers.masking import cast_mask
from axattn.cache import DenseCache

T, E, N = 3, 8, 2
LOW = np.where(np.tri(T, dtype=bool), 0, -1e9)  # what is added to logits


@pytest.mark.parametrize(
    "mask",
    [
        LOW,
        LOW.astype(np.float32),
        jnp.asarray(LOW, jnp.bfloat16),
        np.where(LOW < 0, -np.inf, 0).astype(np.float16),
        LOW.astype(np.int32),
        np.array([0, 1, -1], np.int8),
        np.array([1.0, np.nan]),
        jnp.full((), 0.5),
    ],
)
def test_biases_are_refused(mask):
    with pytest.raises(ValueError, match=f"mask takes booleans.* got {mask.dtype} with .* bias"):
        cast_mask(mask)


@pytest.mark.parametrize("dtype", ["bool", "float32", "bfloat16", "int8", "uint8", "int32"])
@pytest.mark.parametrize("xp", [np, jnp])
def test_zeros_and_ones_of_any_dtype(dtype, xp):
    for mask in (np.tri(T, dtype=bool), np.zeros((T, T), bool)):
        given = xp.asarray(mask).astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(cast_mask(given), mask)
    if dtype in ("int8", "int32"):
        np.testing.assert_array_equal(cast_mask(xp.array([0, 2, 7], dtype)), [False, True, True])


def test_of_flax_and_while_tracing():
    ids = np.array([[1, 1, 0]])
    mask = nn.make_attention_mask(ids, ids)
    assert mask.dtype == jnp.float32
    np.testing.assert_array_equal(cast_mask(mask), mask != 0)
    # A constant of a traced function is still known, an argument is not.
    np.testing.assert_array_equal(jax.jit(cast_mask)(LOW), LOW != 0)
    with pytest.raises(ValueError, match="is a bias"):
        jax.jit(lambda x: cast_mask(LOW) & x)(True)


SIZES = dict(kv_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2)


def test_every_layer_refuses_a_bias():
    x, rngs = jnp.ones((1, T, E)), nnx.Rngs(0)
    latent = axattn.linen.MultiHeadLatentAttention(num_heads=N, **SIZES)
    bound = [
        m.bind(jax.tree.map(jnp.zeros_like, jax.eval_shape(m.init, jax.random.key(0), x)))
        for m in (axattn.linen.MultiHeadAttention(num_heads=N), latent)
    ]
    layers = [
        axattn.nnx.SelfAttention(N, E, decode=False, rngs=rngs),
        axattn.nnx.MultiHeadLatentAttention(N, E, **SIZES, rngs=rngs),
        *bound,
    ]
    caches = [dict(num_kv_heads=N, head_dim=E // N), latent.cache_sizes]
    for i, layer in enumerate(layers):
        cache = DenseCache.create(1, T, **caches[i % 2], dtype="float32")
        for call in (dict(), dict(cache=cache)):
            with pytest.raises(ValueError, match=r"mask=\(bias == 0\)"):
                jax.eval_shape(lambda x, f=layer, c=call: f(x, mask=LOW, **c), x)
    for attend in (axattn.linen.dot_product_attention, axattn.nnx.dot_product_attention):
        qkv = [jnp.ones((1, T, N, 4))] * 3
        with pytest.raises(ValueError, match="bias="):
            attend(*qkv, mask=LOW)
        np.testing.assert_array_equal(attend(*qkv, bias=LOW), attend(*qkv, mask=LOW == 0))
