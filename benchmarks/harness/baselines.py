"""What axattn is measured against, as ``attention_fn`` of its Flax layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def repeat_kv(query, key, value, mask=None, *, is_causal: bool = False):
    """Copies every key/value head for each of its query heads, then plain multi-head attention.

    What most code does. Query [B, T, N, H], key and value [B, S, K, H]; softmax in float32.
    """
    group = query.shape[-2] // key.shape[-2]
    key = jnp.repeat(key, group, axis=-2)
    value = jnp.repeat(value, group, axis=-2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if is_causal:
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        mask = causal if mask is None else jnp.logical_and(mask, causal)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


def jax_nn(query, key, value, mask=None, *, is_causal: bool = False):
    """``jax.nn.dot_product_attention`` as it comes."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)


BASELINES = {"repeat_kv": repeat_kv, "jax_nn": jax_nn}
