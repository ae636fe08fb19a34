"""One differentiable function over all flash implementations, one of them per platform.

They share their derivative: forward passes with the same results (output and LSE), backward passes
from the same residuals (the inputs and these results). So a call that takes a kernel on one
platform and the chunked path on the others keeps one set of residuals, whatever it is lowered for.

Where several platforms have ways of their own, none of them is traced before the program is lowered
for one. So it costs nothing that a call may be lowered for chips that are not there.

Forward mode (``jax.jvp``), also of gradients (Hessians), differentiates the loops of the chunked
path, whatever the ways are. Gradients of gradients are refused, when they are lowered: ask for
``"xla"``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from axattn._call import AttentionCall
from axattn._implementations import mosaic_gpu, mosaic_tpu, xla
from axattn._implementations.chunked import backward, block_sizes
from axattn._implementations.chunked import forward as chunked_forward
from axattn._implementations.chunked.backward import Gradients
from axattn._jax_compat import vary_over, varying_axes
from axattn._primitives import linear, staged
from axattn._typing import present

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

_KERNELS = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}

# The fields of a call that have a gradient.
_INPUTS = Gradients._fields


@dataclasses.dataclass(frozen=True)
class Way:
    """A backend of both passes: an implementation, and what its code depends on.

    ``otherwise`` is the way where the device, which may be known only when the program is lowered
    for it, does not take the kernels.
    """

    name: str
    blocks: block_sizes.Blocks | None = None
    interpret: bool = False
    whole: bool = True  # the backward pass gets the output over all keys of the call
    otherwise: Way | None = None

    def forward(self, call: AttentionCall):
        way = self._on_device(call)
        if way.name in _KERNELS:
            return _KERNELS[way.name].forward(call, interpret=way.interpret)
        if way.name == "xla":
            out, lse = xla.attend(call)
            return out, lse.astype(call.accumulator_dtype)
        return chunked_forward.forward(call, present(way.blocks))

    def backward(self, call: AttentionCall, *arrays: jax.Array) -> Gradients:
        way = self._on_device(call)
        if way.name in _KERNELS:
            return _KERNELS[way.name].backward(
                call, *arrays, interpret=way.interpret, whole=way.whole
            )
        if way.name == "xla":
            return _xla_backward(call, *arrays)
        return backward.backward(call, present(way.blocks), *arrays, whole=way.whole)

    def _on_device(self, call: AttentionCall) -> Way:
        """Return this backend or its fallback, by the device; NotImplementedError without one."""
        if self.name not in _KERNELS or self.interpret:
            return self
        reason = _KERNELS[self.name].device_refusal(call, strict=self.otherwise is not None)
        if reason is None:
            return self
        if self.otherwise is None:
            raise NotImplementedError(f'implementation "{self.name}" {reason}')
        return self.otherwise


def _xla_backward(call: AttentionCall, out, lse, dout, dlse) -> Gradients:
    """Compute gradients of a call that may take a kernel, from the residuals of kernels."""
    inputs = Gradients(*(getattr(call, name) for name in _INPUTS))
    _, pull = jax.vjp(lambda inputs: xla.attend(_with_inputs(call, inputs)), inputs)
    return pull((dout.astype(out.dtype), dlse.astype(jnp.float32)))[0]


# The implementations that are backends of this function.
NAMES = ("xla_chunked", *_KERNELS)


@dataclasses.dataclass(frozen=True)
class Ways:
    """The backend of each platform that the call may be lowered for; hashable."""

    per_platform: tuple[tuple[str, Way], ...]
    refusal: str = ""


def ways(
    call: AttentionCall,
    names: tuple[tuple[str, tuple[str, ...]], ...],
    refusal: str = "",
    *,
    whole: bool = True,
) -> Ways:
    """Make the backends of ``names``, the implementations that each platform may take."""

    def way(platform, name, *others):
        cut = block_sizes.choose(call, platform) if name == "xla_chunked" else None
        return Way(name, cut, whole=whole, otherwise=way(platform, *others) if others else None)

    return Ways(tuple((platform, way(platform, *own)) for platform, own in names), refusal)


def attend(call: AttentionCall, ways: Ways) -> tuple[jax.Array, jax.Array]:
    """Return output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32."""
    # Inside shard_map all inputs of the derivative must vary over the same axes. They are marked
    # here, outside of it, so that JAX sums the gradients of shared inputs.
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _flash(ways: Ways, inputs: Gradients, rest: AttentionCall) -> tuple[jax.Array, jax.Array]:
    return _per_platform(ways, "forward", _with_inputs(rest, inputs))


@functools.partial(_flash.defjvp, symbolic_zeros=True)
def _flash_tangents(ways: Ways, primals, tangents):
    inputs, rest = primals
    results = _flash(ways, inputs, rest)
    varied = {
        name: tangent
        for name, tangent in zip(_INPUTS, tangents[0], strict=True)
        if not (tangent is None or isinstance(tangent, SymbolicZero))
    }
    if not varied:
        return results, jax.tree.map(jnp.zeros_like, results)
    residuals = (_with_inputs(rest, inputs), *results)
    forward, transpose = _Forward(tuple(varied)), _Transpose(ways, tuple(varied))
    refusal = _no_second_gradient(ways)
    return results, linear(forward, transpose, results, residuals, varied, refusal=refusal)


@dataclasses.dataclass(frozen=True)
class _Forward:
    """Maps tangents of the named inputs to those of the results, by the chunked path."""

    names: tuple[str, ...]

    def __call__(self, residuals, tangents) -> tuple[jax.Array, jax.Array]:
        call, *_ = residuals

        def results(inputs):
            changed = dataclasses.replace(call, **inputs)
            return chunked_forward.forward(changed, block_sizes.choose(call, "cpu"))

        inputs = {name: getattr(call, name) for name in self.names}
        return jax.jvp(results, (inputs,), (tangents,))[1]


@dataclasses.dataclass(frozen=True)
class _Transpose:
    """Maps cotangents of the results to those of the named inputs."""

    ways: Ways
    names: tuple[str, ...]

    def __call__(self, residuals, cotangents) -> dict[str, jax.Array]:
        found = gradients(self.ways, *residuals, *cotangents)
        return {name: getattr(found, name) for name in self.names}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def gradients(ways: Ways, call: AttentionCall, *arrays: jax.Array) -> Gradients:
    """Compute the gradients of a call from ``arrays``: output, LSE and their cotangents.

    The output and the LSE may be those of more keys than the call has: these keys' share is found.
    """
    return _per_platform(ways, "backward", call, *arrays)


@functools.partial(gradients.defjvp, symbolic_zeros=True)
def _second_tangents(ways: Ways, primals, tangents):
    results = gradients(ways, *primals)
    found = jax.tree.leaves(tangents)  # symbolic zeros are leaves, too
    varied = {i: x for i, x in enumerate(found) if not isinstance(x, SymbolicZero)}
    whole = all(way.whole for _, way in ways.per_platform)
    forward = _ForwardOfGradients(tuple(varied), whole)
    refusal = _no_second_gradient(ways)
    return results, linear(forward, None, results, primals, varied, refusal=refusal)


@dataclasses.dataclass(frozen=True)
class _ForwardOfGradients:
    """Maps tangents of the named leaves to those of the gradients, by the chunked path."""

    varied: tuple[int, ...]
    whole: bool

    def __call__(self, residuals, tangents) -> Gradients:
        leaves, structure = jax.tree.flatten(residuals)

        def results(some):
            changed = [some.get(i, x) for i, x in enumerate(leaves)]
            call, *arrays = jax.tree.unflatten(structure, changed)
            cut = block_sizes.choose(call, "cpu")
            return backward.backward(call, cut, *arrays, whole=self.whole)

        some = {i: leaves[i] for i in self.varied}
        return jax.jvp(results, (some,), (tangents,))[1]


def _no_second_gradient(ways: Ways) -> str:
    return (
        f"implementation {_names(ways)} has no gradient of gradients (forward mode of gradients it "
        'has, as in jax.hessian): ask for "xla"'
    )


def _names(ways: Ways) -> str:
    return " or ".join(dict.fromkeys(f'"{way.name}"' for _, way in ways.per_platform))


def _per_platform(ways: Ways, method: str, call: AttentionCall, *arrays: jax.Array):
    """Call a method of the backend of the platform that this is lowered for."""
    different = {way for _, way in ways.per_platform}
    if len(ways.per_platform) == len(PLATFORMS) and len(different) == 1:
        return getattr(different.pop(), method)(call, *arrays)
    return staged(
        tuple((platform, _Pass(way, method)) for platform, way in ways.per_platform),
        _results(call) if method == "forward" else _gradients_like(call),
        call,
        *arrays,
        refusal=ways.refusal,
    )


@dataclasses.dataclass(frozen=True)
class _Pass:
    """A method of a backend, as a function that can be compared."""

    way: Way
    method: str

    def __call__(self, *args):
        return getattr(self.way, self.method)(*args)


def _results(call: AttentionCall) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    rows = call.query.shape[:3]
    return (
        jax.ShapeDtypeStruct((*rows, call.value_head_dim), call.query.dtype),
        jax.ShapeDtypeStruct(rows, call.accumulator_dtype),
    )


def _gradients_like(call: AttentionCall) -> Gradients:
    return Gradients(*(getattr(call, name) for name in _INPUTS))


def _without_inputs(call: AttentionCall) -> AttentionCall:
    absent: dict[str, Any] = dict.fromkeys(_INPUTS)
    return dataclasses.replace(call, **absent)


def _with_inputs(rest: AttentionCall, inputs: Gradients) -> AttentionCall:
    return dataclasses.replace(rest, **inputs._asdict())
