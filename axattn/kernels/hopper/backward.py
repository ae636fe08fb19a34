"""Both gradient kernels of a call, and what they need from the forward pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from axattn.call import AttentionCall
from axattn.kernels.hopper import operands
from axattn.kernels.hopper.key_grad import key_grad
from axattn.kernels.hopper.operands import Operands
from axattn.kernels.hopper.problem import LOG2E, Problem
from axattn.kernels.hopper.query_grad import query_grad
from axattn.kernels.hopper.tiles import BackwardTiles
from axattn.mask_parts import Causal, Prefix, Static, Window


def backward(
    call: AttentionCall,
    tiles: BackwardTiles,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of query, key, value and sinks, each in its input's dtype."""
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - dlse
    problem = Problem.of(call, interpret=interpret)
    given = with_given(call, lse, dout, delta)
    dquery = query_grad(problem, given, tiles.query)
    dkey, dvalue = key_grad(problem, given, tiles.key)
    dsinks = None
    if call.sinks is not None:
        empty = lse == -jnp.inf
        share = jnp.exp(call.sinks - jnp.where(empty, 0.0, lse))
        dsinks = -jnp.where(empty, 0.0, share * delta).sum((0, 1)).astype(call.sinks.dtype)
    return dquery, dkey, dvalue, dsinks


def with_given(call: AttentionCall, lse: jax.Array, dout: jax.Array, delta: jax.Array) -> Operands:
    """Operands of the gradient kernels: those of the forward one, and what is given per row.

    Args:
      lse: of the forward pass, float32 ``[B, T, N]``.
      dout: cotangent of the output, ``[B, T, N, h]``.
      delta: rowsum(dout * out) less the cotangent of the LSE, float32 ``[B, T, N]``.
    """
    own, rows = operands.of(call), operands.vector_length(call.q_len)
    stored = Problem.of(call).stored_q_len
    # Rows with nothing to attend to have no gradient, whatever their cotangents are (NaN, where
    # partial results are merged by their LSE). An infinite LSE gives weights of 0: there, and
    # behind the last row.
    empty = lse == -jnp.inf
    dout = dout.astype(call.query.dtype)
    if _may_have_empty_rows(call):
        dout = jnp.where(empty[..., None], jnp.zeros((), dout.dtype), dout)
    more = {
        "dout": operands.stored_rows(call, dout, stored),
        "lse2": _over_rows(jnp.where(empty, jnp.inf, lse * LOG2E), rows, jnp.inf),
        "delta": _over_rows(jnp.where(empty, 0.0, delta), rows, 0.0),
    }
    return dataclasses.replace(own, arrays={**own.arrays, **more})


def _may_have_empty_rows(call: AttentionCall) -> bool:
    """Whether a row may have no keys; False, where the mask's structure rules it out.

    What cannot be ruled out costs a copy of ``dout``.
    """
    if any(x is not None for x in (call.q_positions, call.kv_positions, call.bias)):
        return True
    for part in call.mask.parts:
        if isinstance(part, Causal):
            if not isinstance(part.offset, Static) or part.offset < 0:
                return True
        elif isinstance(part, Window):
            if call.q_len > call.kv_len:
                return True
        elif not isinstance(part, Prefix):
            return True
    return False


def _over_rows(array: jax.Array, rows: int, fill: float) -> jax.Array:
    """``[B, T, N]`` as ``[B, N, rows]``."""
    array = array.swapaxes(1, 2)
    return jnp.pad(array, ((0, 0), (0, 0), (0, rows - array.shape[2])), constant_values=fill)
