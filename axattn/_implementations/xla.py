"""``"xla"``: grouped einsums in plain XLA, with the full logits.

The group is a dimension of the query alone, so each key/value head enters the matrix products as
it is stored, forward and backward. Shazeer, arXiv 1911.02150; Ainslie et al., arXiv 2305.13245.
Derivatives are JAX's own, forward and reverse mode.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from axattn._call import AttentionCall
from axattn._dropout import compute_keep_tile
from axattn._implementations.kv_products import make_kv_products
from axattn._implementations.scores import compute_mask, compute_scores, split_heads
from axattn._masks import find_kv_lengths, find_q_lengths, zero_unused


def attend(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """Return output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32."""
    if call.stored is None and call.is_decode_step:
        # TPUs tile the two minor dimensions: merging heads and features would copy the cache.
        return lax.platform_dependent(
            call,
            tpu=functools.partial(_attend_einsum, folded=False),
            default=functools.partial(_attend_einsum, folded=True),
        )
    return _attend_einsum(call, folded=False)


def _attend_einsum(call: AttentionCall, folded: bool) -> tuple[jax.Array, jax.Array]:
    call = zero_unused_inputs(call)
    read, (_, kv) = make_kv_products(call, call.query, folded=folded), call.spans()
    weights, total, lse = compute_softmax(call, read.multiply_keys(kv))
    out = read.average_values(weights, total, kv)
    out = out.transpose(0, 3, 1, 2, 4).reshape(
        call.batch, call.q_len, call.num_heads, call.value_head_dim
    )
    lse = lse.transpose(0, 3, 1, 2).reshape(call.batch, call.q_len, call.num_heads)
    return out.astype(call.query.dtype), lse.astype(jnp.float32)


def zero_unused_inputs(call: AttentionCall) -> AttentionCall:
    """Set queries and keys at and after the call's lengths to zero, whatever they held.

    Values, and caches, are cleaned where they are read.
    """
    q, kv = call.spans()
    key = call.key
    if key is not None:
        key = zero_unused(key, kv.slots, find_kv_lengths(call.mask))
    query = zero_unused(call.query, q.slots, find_q_lengths(call.mask))
    return dataclasses.replace(call, query=query, key=key)


def compute_softmax(call: AttentionCall, dots: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return unnormalized weights ``[B, K, G, T, S]``, sums ``[..., T, 1]`` and LSE ``[..., T]``.

    Dropout is in the weights and not in the sums. An empty row has weights 0, sum 1, LSE -inf.
    """
    q, kv = call.spans()
    scores = compute_scores(call, dots, q, kv)
    allowed = compute_mask(call, q, kv)
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    top = scores.max(-1, keepdims=True, initial=-jnp.inf)  # initial: for no keys
    sinks = None
    if call.sinks is not None:
        sinks = split_heads(call.sinks[None, :, None, None].astype(scores.dtype), call)
        top = jnp.maximum(top, sinks)
    # The maximum only shifts: it has no derivative. An empty row's -inf must not shift.
    top = lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, jnp.log(total) + top)[..., 0]
    if call.dropout_key is not None:
        kept = compute_keep_tile(call, q, kv)
        weights = jnp.where(kept, weights / (1.0 - call.dropout_rate), 0.0)
    return weights, total, lse
