"""One matrix product for the projections of one input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from axattn._typing import Array, Float


def project_fused(
    inputs: Sequence[Float[Array, "*batch T E"]],
    kernels: Sequence[Float[Array, "E heads H"]],
    biases: Sequence[Float[Array, "heads H"]] | None,
    *,
    promote: Callable[..., Sequence[Any]],
    dot_general: Callable[..., Array] | None = None,
    **dot_general_kwargs,
) -> tuple[Float[Array, "*batch T heads H"], ...]:
    """Project each of ``inputs`` with its kernel, in one product per distinct input.

    The kernels stay separate parameters; those of one input are joined here, along their heads.

    Args:
      inputs: each ``[..., T, E]``. Those that are one object share a product.
      kernels: one per input, each ``[E, heads, H]``; the numbers of heads may differ.
      biases: one per input, each ``[heads, H]``; or None.
      promote: ``promote(input, kernel, bias)`` brings the three (bias may be None) to one dtype.
      dot_general: in place of `jax.lax.dot_general`; ``dot_general_kwargs`` go to it.

    Returns:
      ``[..., T, heads, H]`` for each input.
    """
    groups: dict[int, list[int]] = {}
    for i, x in enumerate(inputs):
        groups.setdefault(id(x), []).append(i)

    outputs: dict[int, Array] = {}
    for group in groups.values():
        kernel = jnp.concatenate([kernels[i] for i in group], axis=-2)
        bias = None if biases is None else jnp.concatenate([biases[i] for i in group], axis=-2)
        x, kernel, bias = promote(inputs[group[0]], kernel, bias)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        out = (dot_general or lax.dot_general)(x, kernel, contract, **dot_general_kwargs)
        if bias is not None:
            out = out + bias.reshape((1,) * (out.ndim - bias.ndim) + bias.shape)
        first = 0
        for i in group:
            heads = kernels[i].shape[-2]
            outputs[i] = lax.slice_in_dim(out, first, first + heads, axis=out.ndim - 2)
            first += heads
    return tuple(outputs[i] for i in range(len(inputs)))
