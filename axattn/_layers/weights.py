"""Attention that writes out all its weights: to look at them, and for einsum hooks.

`axattn.dot_product_attention` never returns weights. Flax's layers can sow them, and can replace
both einsums (quantized training does). Here, too, each key/value head is read once for its group
of query heads, and all options of the function are honoured.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from axattn._arguments import normalize
from axattn._implementations.softmax import compute_softmax
from axattn._implementations.xla import mask_scores
from axattn._options import AttentionOptions
from axattn._typing import Array, Float

Einsum = Callable[..., Array]


def compute_attention_weights(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K h"],
    options: AttentionOptions,
    *,
    einsum: Einsum = jnp.einsum,
) -> Float[Array, "*batch N T S"]:
    """Return the weights that `axattn.dot_product_attention` gives the values.

    Args:
      query, key, value: as there.
      options: as there. With dropout, weights are those after it.
      einsum: ``einsum(subscripts, query, key)`` gives the dot products. The subscripts are Flax's
        where N == K, and otherwise have the query's heads as two axes, K and G.

    Returns:
      ``[..., N, T, S]``, float32 (float64 for float64). Rows with nothing to attend to are zeros.
    """
    call, lead = normalize(query, key, value, options)
    query = call.query.reshape(*lead, *call.query.shape[1:])
    if call.group == 1:
        dots = einsum("...qhd,...khd->...hqk", query, key)
    else:
        query = query.reshape(*query.shape[:-2], call.num_kv_heads, call.group, call.head_dim)
        dots = einsum("...qhgd,...khd->...hgqk", query, key)
    scores_shape = (call.batch, call.num_kv_heads, call.group, call.q_len, call.kv_len)
    masked = mask_scores(call, dots.reshape(scores_shape).astype(call.accumulator_dtype))
    weights = masked.scale_weights(compute_softmax(masked)[0])
    return weights.reshape(*lead, call.num_heads, call.q_len, call.kv_len)


def sum_values(
    weights: Float[Array, "*batch N T S"],
    value: Float[Array, "*batch S K h"],
    *,
    einsum: Einsum = jnp.einsum,
) -> Float[Array, "*batch T N h"]:
    """Sum the values by their weights: ``[..., T, N, h]`` in the dtype of ``einsum``."""
    heads, kv_heads = weights.shape[-3], value.shape[-2]
    if heads == kv_heads:
        return einsum("...hqk,...khd->...qhd", weights, value)
    weights = weights.reshape(*weights.shape[:-3], kv_heads, -1, *weights.shape[-2:])
    out = einsum("...hgqk,...khd->...qhgd", weights, value)
    return out.reshape(*out.shape[:-3], heads, out.shape[-1])
