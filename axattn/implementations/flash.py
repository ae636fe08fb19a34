"""One differentiable function over all flash implementations, one of them per platform.

They share a custom VJP: forward passes with the same results (output and LSE), backward passes from
the same residuals (the inputs and these results). So a call that takes a kernel on one platform and
the chunked path on the others keeps one set of residuals, whatever it is lowered for.

Forward mode (``jax.jvp``) raises JAX's error for custom VJPs, second derivatives one of ours: both
are for ``"xla"``.
"""

from __future__ import annotations

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from axattn._jax_compat import vary_over, varying_axes
from axattn.call import AttentionCall
from axattn.implementations import (
    blocks,
    chunked_backward,
    chunked_forward,
    mosaic_gpu,
    mosaic_tpu,
)
from axattn.implementations.chunked_backward import Gradients

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

_KERNELS = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}

# What has a gradient: the fields of the call that the VJP answers for.
_INPUTS = Gradients._fields


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute both passes: an implementation, and what its code depends on."""

    name: str
    blocks: blocks.Blocks | None = None
    interpret: bool = False
    whole: bool = True  # the backward pass is given the output of all keys that the call has

    def forward(self, call: AttentionCall):
        if self.name in _KERNELS:
            return _KERNELS[self.name].forward(call, interpret=self.interpret)
        return chunked_forward.forward(call, self.blocks)

    def backward(self, call: AttentionCall, *arrays: jax.Array) -> Gradients:
        if self.name in _KERNELS:
            return _KERNELS[self.name].backward(
                call, *arrays, interpret=self.interpret, whole=self.whole
            )
        return chunked_backward.backward(call, self.blocks, *arrays, whole=self.whole)


# The implementations that are ways of this function.
NAMES = ("xla_chunked", *_KERNELS)

# (platform, way) for each platform that the call may be lowered for; hashable.
Ways = tuple[tuple[str, Way], ...]


def ways(call: AttentionCall, plan: tuple[tuple[str, str], ...], *, whole: bool = True) -> Ways:
    """How ``plan``, (platform, implementation name) pairs, is carried out."""

    def way(platform, name):
        cut = blocks.choose(call, platform) if name == "xla_chunked" else None
        return Way(name, cut, whole=whole)

    return tuple((platform, way(platform, name)) for platform, name in plan)


def attend(call: AttentionCall, ways: Ways) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]`` float32."""
    # Inside shard_map all inputs of the custom VJP must vary alike: marking them here, outside,
    # lets JAX sum the gradients of those that are shared.
    call = vary_over(call, varying_axes(*jax.tree.leaves(call)))
    if call.stored is not None:
        out, lse = _over_cache(ways, call)
    else:
        inputs = Gradients(*(getattr(call, name) for name in _INPUTS))
        out, lse = _flash(ways, inputs, _without_inputs(call))
    return out, lse.astype(jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _over_cache(ways: Ways, call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    return _per_platform(ways, "forward", call)


@_over_cache.defjvp
def _no_derivative(ways, primals, tangents):
    raise NotImplementedError(
        f'implementation {_names(ways)} has no derivative over a cache: "xla" has, for the query'
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(ways: Ways, inputs: Gradients, rest: AttentionCall) -> tuple[jax.Array, jax.Array]:
    return _per_platform(ways, "forward", _with_inputs(rest, inputs))


def _flash_forward(ways: Ways, inputs: Gradients, rest: AttentionCall):
    out, lse = _flash(ways, inputs, rest)
    return (out, lse), (inputs, rest, out, lse)


def _flash_backward(ways: Ways, residuals, cotangents):
    inputs, rest, out, lse = residuals
    return gradients(ways, _with_inputs(rest, inputs), out, lse, *cotangents), None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def gradients(ways: Ways, call: AttentionCall, *arrays: jax.Array) -> Gradients:
    """Of a call with the output, LSE and their cotangents ``arrays``.

    The output and the LSE may be those of more keys than the call has: these keys' share is found.
    """
    return _per_platform(ways, "backward", call, *arrays)


@gradients.defjvp
def _no_second_derivative(ways, primals, tangents):
    raise NotImplementedError(
        f'implementation {_names(ways)} has no second derivative and no forward mode: ask for "xla"'
    )


_flash.defvjp(_flash_forward, _flash_backward)


def _names(ways: Ways) -> str:
    return " or ".join(dict.fromkeys(f'"{way.name}"' for _, way in ways))


def _per_platform(ways: Ways, method: str, *arrays):
    """``way.method(*arrays)`` with the way of the platform that this is lowered for."""
    methods = {platform: getattr(way, method) for platform, way in ways}
    if len(ways) == len(PLATFORMS):
        # A way that several platforms share is traced once.
        count = collections.Counter(way for _, way in ways)
        common = max(count, key=count.__getitem__)
        methods = {platform: getattr(way, method) for platform, way in ways if way != common}
        methods["default"] = getattr(common, method)
        if len(methods) == 1:
            return methods["default"](*arrays)
    return lax.platform_dependent(*arrays, **methods)


def _without_inputs(call: AttentionCall) -> AttentionCall:
    return dataclasses.replace(call, **dict.fromkeys(_INPUTS))


def _with_inputs(rest: AttentionCall, inputs: Gradients) -> AttentionCall:
    return dataclasses.replace(rest, **inputs._asdict())
