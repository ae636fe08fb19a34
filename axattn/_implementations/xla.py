"""``"xla"``: grouped einsums in plain XLA, with the full logits.

The group is a dimension of the query alone, so each key/value head enters the matrix products as
it is stored, forward and backward. Shazeer, arXiv 1911.02150; Ainslie et al., arXiv 2305.13245.
Forward and reverse mode; the average has a derivative of its own (`softmax`).
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
from axattn._implementations.softmax import MaskedScores
from axattn._masks import allows_every_row, find_kv_lengths, find_q_lengths, zero_unused


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
    out, lse = read.average_values(mask_scores(call, read.multiply_keys(kv)), kv)
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


def mask_scores(call: AttentionCall, dots: jax.Array) -> MaskedScores:
    """Return the softmax's inputs from the dot products ``[B, K, G, T, S]``."""
    q, kv = call.spans()
    scores, sinks, factor = compute_scores(call, dots, q, kv), None, None
    allowed = compute_mask(call, q, kv)
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    if call.sinks is not None:
        sinks = split_heads(call.sinks[None, :, None, None].astype(scores.dtype), call)
    if call.dropout_key is not None:
        kept = compute_keep_tile(call, q, kv)
        factor = jnp.where(kept, jnp.asarray(1.0 / (1.0 - call.dropout_rate), scores.dtype), 0.0)
    return MaskedScores(scores, sinks, factor, may_be_empty=_may_have_empty_rows(call))


def _may_have_empty_rows(call: AttentionCall) -> bool:
    """Return whether a query may have nothing to attend to, as far as it is known while tracing."""
    if call.may_be_empty or call.bias is not None:  # which may be -inf
        return True
    positions = call.q_positions, call.kv_positions
    return positions != (None, None) or not allows_every_row(call.mask, call.q_len, call.kv_len)
