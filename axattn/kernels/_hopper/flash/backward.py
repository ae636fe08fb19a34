"""Both gradient kernels of a call, and what they need from the forward pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn.kernels import _backward_inputs
from axattn.kernels._hopper.block_sizes import BackwardBlockSizes
from axattn.kernels._hopper.flash.key_grad import key_grad
from axattn.kernels._hopper.flash.query_grad import query_grad
from axattn.kernels._hopper.operands import (
    HopperOperands,
    gather_operands,
    get_vector_length,
    pad_rows,
)
from axattn.kernels._hopper.primitives import round_up_length
from axattn.kernels._problem import Problem


def backward(
    call: AttentionCall,
    sizes: BackwardBlockSizes,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return the gradients of query, key, value and sinks, each in its input's dtype."""
    delta = _backward_inputs.compute_delta(out, dout, dlse)
    problem = Problem.from_call(call, interpret=interpret)
    operands = gather_backward_operands(call, lse, dout, delta)
    dquery = query_grad(problem, operands, sizes.query)
    dkey, dvalue = key_grad(problem, operands, sizes.key)
    return dquery, dkey, dvalue, _backward_inputs.compute_sinks_gradient(call, lse, delta)


def gather_backward_operands(
    call: AttentionCall, lse: jax.Array, dout: jax.Array, delta: jax.Array
) -> HopperOperands:
    """Return the operands of the gradient kernels: the forward kernel's, and three per query row.

    Args:
      call: the call.
      lse: from the forward pass, float32 ``[B, T, N]``.
      dout: cotangent of the output, ``[B, T, N, h]``.
      delta: rowsum(dout * out) less the cotangent of the LSE, float32 ``[B, T, N]``.
    """
    operands, rows = gather_operands(call), get_vector_length(call.q_len)
    inputs = _backward_inputs.make_backward_inputs(call, lse, dout, delta)
    more = {
        "dout": pad_rows(call, inputs.dout, round_up_length(call.q_len)),
        "lse2": _pad_vector(inputs.lse2, rows, jnp.inf),
        "delta": _pad_vector(inputs.delta, rows, 0.0),
    }
    return dataclasses.replace(operands, arrays={**operands.arrays, **more})


def _pad_vector(array: jax.Array, rows: int, fill: float) -> jax.Array:
    """Return ``[B, T, N]`` as ``[B, N, rows]``."""
    array = array.swapaxes(1, 2)
    return jnp.pad(array, ((0, 0), (0, 0), (0, rows - array.shape[2])), constant_values=fill)
