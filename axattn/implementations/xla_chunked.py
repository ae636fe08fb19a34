"""``"xla_chunked"``: flash attention in plain XLA, O(T + S) memory, empty blocks never computed.

The forward and backward passes are in ``chunked_forward`` and ``chunked_backward``; here they are
joined into one differentiable function. The derivative is a custom VJP: forward mode (``jax.jvp``)
raises JAX's error for custom VJPs, second derivatives one of ours. Both are for ``"xla"``.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from axattn._jax_compat import vary_over, varying_axes
from axattn.call import AttentionCall
from axattn.implementations import blocks
from axattn.implementations.chunked_backward import Gradients, backward
from axattn.implementations.chunked_forward import forward

# What has a gradient: the fields of the call that the VJP answers for.
_INPUTS = Gradients._fields


def attend(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]`` float32."""
    # Inside shard_map all inputs of the custom VJP must vary alike: marking them here, outside,
    # lets JAX sum the gradients of those that are shared.
    call = vary_over(call, varying_axes(*jax.tree.leaves(call)))
    if call.stored is not None:
        out, lse = _over_cache(call)
        return out, lse.astype(jnp.float32)
    inputs = Gradients(*(getattr(call, name) for name in _INPUTS))
    out, lse = _flash(inputs, _without_inputs(call))
    return out, lse.astype(jnp.float32)


@jax.custom_jvp
def _over_cache(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    return _per_platform(forward, call)


@_over_cache.defjvp
def _no_derivative(primals, tangents):
    raise NotImplementedError(
        'implementation "xla_chunked" has no derivative over a cache: "xla" has, for the query'
    )


@jax.custom_vjp
def _flash(inputs: Gradients, rest: AttentionCall) -> tuple[jax.Array, jax.Array]:
    return _per_platform(forward, _with_inputs(rest, inputs))


def _flash_forward(inputs: Gradients, rest: AttentionCall):
    out, lse = _flash(inputs, rest)
    return (out, lse), (inputs, rest, out, lse)


def _flash_backward(residuals, cotangents):
    inputs, rest, out, lse = residuals
    return _gradients(_with_inputs(rest, inputs), out, lse, *cotangents), None


@jax.custom_jvp
def _gradients(call: AttentionCall, *arrays: jax.Array) -> Gradients:
    return _per_platform(backward, call, *arrays)


@_gradients.defjvp
def _no_second_derivative(primals, tangents):
    raise NotImplementedError(
        'implementation "xla_chunked" has no second derivative and no forward mode: ask for "xla"'
    )


_flash.defvjp(_flash_forward, _flash_backward)


def _per_platform(function, call: AttentionCall, *arrays: jax.Array):
    """``function(call, blocks, *arrays)`` with the blocks of the platform it is lowered for."""
    sizes = {platform: blocks.choose(call, platform) for platform in ("cpu", "tpu", "cuda")}
    if len(set(sizes.values())) == 1:
        return function(call, sizes["cpu"], *arrays)
    by_platform = {
        platform: functools.partial(_reordered, function, chosen)
        for platform, chosen in sizes.items()
    }
    return lax.platform_dependent(
        call, *arrays, cpu=by_platform["cpu"], tpu=by_platform["tpu"], default=by_platform["cuda"]
    )


def _reordered(function, chosen: blocks.Blocks, call: AttentionCall, *arrays: jax.Array):
    return function(call, chosen, *arrays)


def _without_inputs(call: AttentionCall) -> AttentionCall:
    return dataclasses.replace(call, **dict.fromkeys(_INPUTS))


def _with_inputs(rest: AttentionCall, inputs: Gradients) -> AttentionCall:
    return dataclasses.replace(rest, **inputs._asdict())
