"""Both gradient kernels of a call, and what they need from the forward pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn.kernels import _backward_inputs
from axattn.kernels._hopper import operands
from axattn.kernels._hopper.block_sizes import BackwardTiles
from axattn.kernels._hopper.flash.key_grad import key_grad
from axattn.kernels._hopper.flash.query_grad import query_grad
from axattn.kernels._hopper.operands import Operands
from axattn.kernels._hopper.rows import stored_length
from axattn.kernels._problem import Problem


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
    delta = _backward_inputs.row_deltas(out, dout, dlse)
    problem = Problem.of(call, interpret=interpret)
    given = with_given(call, lse, dout, delta)
    dquery = query_grad(problem, given, tiles.query)
    dkey, dvalue = key_grad(problem, given, tiles.key)
    return dquery, dkey, dvalue, _backward_inputs.of_sinks(call, lse, delta)


def with_given(call: AttentionCall, lse: jax.Array, dout: jax.Array, delta: jax.Array) -> Operands:
    """Operands of the gradient kernels: those of the forward one, and what is given per row.

    Args:
      lse: of the forward pass, float32 ``[B, T, N]``.
      dout: cotangent of the output, ``[B, T, N, h]``.
      delta: rowsum(dout * out) less the cotangent of the LSE, float32 ``[B, T, N]``.
    """
    own, rows = operands.of(call), operands.vector_length(call.q_len)
    given = _backward_inputs.given(call, lse, dout, delta)
    more = {
        "dout": operands.stored_rows(call, given.dout, stored_length(call.q_len)),
        "lse2": _over_rows(given.lse2, rows, jnp.inf),
        "delta": _over_rows(given.delta, rows, 0.0),
    }
    return dataclasses.replace(own, arrays={**own.arrays, **more})


def _over_rows(array: jax.Array, rows: int, fill: float) -> jax.Array:
    """``[B, T, N]`` as ``[B, N, rows]``."""
    array = array.swapaxes(1, 2)
    return jnp.pad(array, ((0, 0), (0, 0), (0, rows - array.shape[2])), constant_values=fill)
