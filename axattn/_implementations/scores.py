"""Scores of a tile from its dot products: everything between Q K^T and the softmax.

The order is fixed for every implementation:

    scores = soft_cap(scale * q.k) + bias + alibi, then the mask

The bias comes after the cap, so that an additive mask (a bias of -1e9 or -inf) stays a mask.
Tiles are ``[B, K, G, q, kv]``: a query head is (key/value head, member of its group).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn._mask_parts import Span
from axattn._masks import compute_mask_tile


def split_heads(array: jax.Array, call: AttentionCall) -> jax.Array:
    """Reshape ``[B or 1, N or 1, ...]`` to ``[B or 1, K or 1, G or 1, ...]``, n = k * G + g."""
    batch, heads, *rest = array.shape
    if heads == 1:
        return array[:, :, None]
    return array.reshape(batch, call.num_kv_heads, call.group, *rest)


def compute_bias(call: AttentionCall, q: Span, kv: Span) -> jax.Array | None:
    """Compute what is added to the scores, bias and ALiBi, broadcastable to the tile, or None."""
    dtype = call.accumulator_dtype
    total = None
    if call.bias is not None:
        total = split_heads(kv.take(q.take(call.bias, 2), 3), call).astype(dtype)
    if call.alibi_slopes is not None:
        # Press et al., arXiv 2108.12409, symmetric for non-causal use: -slope * |i - j|.
        distance = jnp.abs(q.positions[:, :, None] - kv.positions[:, None, :]).astype(dtype)
        slopes = split_heads(call.alibi_slopes[:, :, None, None].astype(dtype), call)
        alibi = -slopes * distance[:, None, None]
        total = alibi if total is None else total + alibi
    return total


def cap_scores(call: AttentionCall, dots: jax.Array) -> jax.Array:
    """Compute ``soft_cap(scale * dots)``."""
    scores = dots * jnp.asarray(call.scale, dots.dtype)
    if call.traced_scale is not None:
        scores = scores * call.traced_scale.astype(dots.dtype)
    if call.logits_soft_cap is not None:
        scores = call.logits_soft_cap * jnp.tanh(scores / call.logits_soft_cap)
    return scores


def compute_scores(call: AttentionCall, dots: jax.Array, q: Span, kv: Span) -> jax.Array:
    """Compute the scores before the mask from ``dots [B, K, G, q, kv]``."""
    scores = cap_scores(call, dots)
    bias = compute_bias(call, q, kv)
    return scores if bias is None else scores + bias


def compute_mask(call: AttentionCall, q: Span, kv: Span) -> jax.Array | None:
    """Compute the mask, broadcastable to ``[B, K, G, q, kv]``, or None for all True."""
    allowed = compute_mask_tile(call.mask, q, kv)
    return None if allowed is None else split_heads(allowed, call)
