"""The inputs of every backward kernel, and the gradient of sinks, which needs no kernel."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn.kernels._masks import may_have_empty_rows
from axattn.kernels._problem import LOG2E


class BackwardInputs(NamedTuple):
    """What a backward kernel reads per query row."""

    dout: jax.Array  # [B, T, N, h], in the query's dtype
    lse2: jax.Array  # float32 [B, T, N]: LSE in units of log2; infinite for empty rows
    delta: jax.Array  # float32 [B, T, N]


def compute_delta(out: jax.Array, dout: jax.Array, dlse: jax.Array) -> jax.Array:
    """Compute rowsum(dout * out) less the cotangent of the LSE, float32 ``[B, T, N]``."""
    return (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - dlse


def make_backward_inputs(
    call: AttentionCall, lse: jax.Array, dout: jax.Array, delta: jax.Array
) -> BackwardInputs:
    """Make the inputs from the LSE ``[B, T, N]``, the output's cotangent, and delta."""
    # Empty rows have no gradient, even where their cotangents are NaN (from combining partial
    # results by LSE). An infinite LSE gives weights of 0.
    empty = lse == -jnp.inf
    dout = dout.astype(call.query.dtype)
    if may_have_empty_rows(call):
        dout = jnp.where(empty[..., None], jnp.zeros((), dout.dtype), dout)
    return BackwardInputs(
        dout, jnp.where(empty, jnp.inf, lse * LOG2E), jnp.where(empty, 0.0, delta)
    )


def compute_sinks_gradient(
    call: AttentionCall, lse: jax.Array, delta: jax.Array
) -> jax.Array | None:
    """Compute the gradient of the sinks ``[N]``, or None where the call has none."""
    if call.sinks is None:
        return None
    empty = lse == -jnp.inf
    share = jnp.exp(call.sinks[None, None] - jnp.where(empty, 0.0, lse))
    return -jnp.where(empty, 0.0, share * delta).sum((0, 1)).astype(call.sinks.dtype)
