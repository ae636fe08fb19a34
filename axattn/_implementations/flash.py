"""One differentiable function over all flash implementations, one of them per platform.

They share one derivative: all forward passes give output and LSE, and all backward passes take the
inputs and these two. So a call keeps one set of residuals, though one platform takes a kernel and
others the chunked path.

Where platforms have different backends, one is traced when the program is lowered for its platform.
So it costs nothing that a call may be lowered for chips that are not there.

Forward mode (``jax.jvp``), also of gradients (Hessians), differentiates the loops of the chunked
path, for every backend. Gradients of gradients are refused when lowered: ask for ``"xla"``.
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
from axattn._jax_compat import find_varying_axes, vary_over
from axattn._primitives import call_per_platform, make_linear
from axattn._typing import present

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

_KERNELS = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}

# The fields of a call that have a gradient.
_INPUTS = Gradients._fields


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend of both passes: an implementation, and what its code depends on.

    ``fallback`` is taken where the device does not take the kernels; the device may be known only
    when the program is lowered for it.
    """

    name: str
    blocks: block_sizes.ChunkSizes | None = None  # of "xla_chunked"
    backward_blocks: block_sizes.ChunkSizes | None = None
    interpret: bool = False
    whole: bool = True  # the backward pass gets the output over all keys of the call
    fallback: Backend | None = None

    def forward(self, call: AttentionCall):
        backend = self._resolve_device(call)
        if backend.name in _KERNELS:
            return _KERNELS[backend.name].forward(call, interpret=backend.interpret)
        if backend.name == "xla":
            out, lse = xla.attend(call)
            return out, lse.astype(call.accumulator_dtype)
        return chunked_forward.forward(call, present(backend.blocks))

    def backward(self, call: AttentionCall, *arrays: jax.Array) -> Gradients:
        backend = self._resolve_device(call)
        if backend.name in _KERNELS:
            return _KERNELS[backend.name].backward(
                call, *arrays, interpret=backend.interpret, whole=backend.whole
            )
        if backend.name == "xla":
            return _backward_by_xla(call, *arrays)
        blocks = present(backend.backward_blocks)
        return backward.backward(call, blocks, *arrays, whole=backend.whole)

    def _resolve_device(self, call: AttentionCall) -> Backend:
        """Return this backend or its fallback, by the device; NotImplementedError without one."""
        if self.name not in _KERNELS or self.interpret:
            return self
        reason = _KERNELS[self.name].find_device_refusal(call, strict=self.fallback is not None)
        if reason is None:
            return self
        if self.fallback is None:
            raise NotImplementedError(f'implementation "{self.name}" {reason}')
        return self.fallback


def _backward_by_xla(call: AttentionCall, out, lse, dout, dlse) -> Gradients:
    """Compute gradients of a call that may take a kernel, from the residuals of kernels."""
    inputs = Gradients(*(getattr(call, name) for name in _INPUTS))
    _, pull = jax.vjp(lambda inputs: xla.attend(_insert_inputs(call, inputs)), inputs)
    return pull((dout.astype(out.dtype), dlse.astype(jnp.float32)))[0]


# The implementations that are backends of this function.
NAMES = ("xla_chunked", *_KERNELS)


@dataclasses.dataclass(frozen=True)
class Backends:
    """The backend of each platform that the call may be lowered for; hashable."""

    per_platform: tuple[tuple[str, Backend], ...]
    refusal: str = ""


def make_backends(
    call: AttentionCall,
    names: tuple[tuple[str, tuple[str, ...]], ...],
    refusal: str = "",
    *,
    whole: bool = True,
) -> Backends:
    """Make the backends of ``names``, the implementations that each platform may take."""

    def make(platform, name, *others):
        forward = backward = None
        if name == "xla_chunked":
            forward = block_sizes.choose_chunk_sizes(call, platform)
            backward = block_sizes.choose_chunk_sizes(call, platform, backward=True)
        fallback = make(platform, *others) if others else None
        return Backend(name, forward, backward, whole=whole, fallback=fallback)

    return Backends(tuple((platform, make(platform, *own)) for platform, own in names), refusal)


def attend(call: AttentionCall, backends: Backends) -> tuple[jax.Array, jax.Array]:
    """Return output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32."""
    # Inside shard_map all inputs of the derivative must vary over the same axes. They are marked
    # here, outside of it, so that JAX sums the gradients of shared inputs.
    call = vary_over(call, find_varying_axes(*jax.tree.leaves(call)))
    if call.stored is not None:
        out, lse = _attend_cache(backends, call)
    else:
        inputs = Gradients(*(getattr(call, name) for name in _INPUTS))
        out, lse = _attend_arrays(backends, inputs, _drop_inputs(call))
    return out, lse.astype(jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_cache(backends: Backends, call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    return _call_per_platform(backends, "forward", call)


@_attend_cache.defjvp
def _refuse_cache_derivative(backends, primals, tangents):
    raise NotImplementedError(
        f"implementation {_join_names(backends)} has no derivative over a cache: "
        '"xla" has, for the query'
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_arrays(
    backends: Backends, inputs: Gradients, rest: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    return _call_per_platform(backends, "forward", _insert_inputs(rest, inputs))


@functools.partial(_attend_arrays.defjvp, symbolic_zeros=True)
def _attend_arrays_jvp(backends: Backends, primals, tangents):
    inputs, rest = primals
    results = _attend_arrays(backends, inputs, rest)
    varied = {
        name: tangent
        for name, tangent in zip(_INPUTS, tangents[0], strict=True)
        if not (tangent is None or isinstance(tangent, SymbolicZero))
    }
    if not varied:
        return results, jax.tree.map(jnp.zeros_like, results)
    residuals = (_insert_inputs(rest, inputs), *results)
    forward, transpose = _ForwardTangents(tuple(varied)), _InputCotangents(backends, tuple(varied))
    refusal = _say_no_second_gradient(backends)
    return results, make_linear(forward, transpose, results, residuals, varied, refusal=refusal)


@dataclasses.dataclass(frozen=True)
class _ForwardTangents:
    """Maps tangents of the named inputs to those of the results, by the chunked path."""

    names: tuple[str, ...]

    def __call__(self, residuals, tangents) -> tuple[jax.Array, jax.Array]:
        call, *_ = residuals

        def results(inputs):
            changed = dataclasses.replace(call, **inputs)
            return chunked_forward.forward(changed, block_sizes.choose_chunk_sizes(call, "cpu"))

        inputs = {name: getattr(call, name) for name in self.names}
        return jax.jvp(results, (inputs,), (tangents,))[1]


@dataclasses.dataclass(frozen=True)
class _InputCotangents:
    """Maps cotangents of the results to those of the named inputs."""

    backends: Backends
    names: tuple[str, ...]

    def __call__(self, residuals, cotangents) -> dict[str, jax.Array]:
        found = compute_gradients(self.backends, *residuals, *cotangents)
        return {name: getattr(found, name) for name in self.names}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def compute_gradients(backends: Backends, call: AttentionCall, *arrays: jax.Array) -> Gradients:
    """Compute the gradients of a call from ``arrays``: output, LSE and their cotangents.

    Output and LSE may be over more keys than the call has; the result is the share of these keys.
    """
    return _call_per_platform(backends, "backward", call, *arrays)


@functools.partial(compute_gradients.defjvp, symbolic_zeros=True)
def _compute_gradients_jvp(backends: Backends, primals, tangents):
    results = compute_gradients(backends, *primals)
    found = jax.tree.leaves(tangents)  # symbolic zeros are leaves, too
    varied = {i: x for i, x in enumerate(found) if not isinstance(x, SymbolicZero)}
    whole = all(backend.whole for _, backend in backends.per_platform)
    forward = _GradientTangents(tuple(varied), whole)
    refusal = _say_no_second_gradient(backends)
    return results, make_linear(forward, None, results, primals, varied, refusal=refusal)


@dataclasses.dataclass(frozen=True)
class _GradientTangents:
    """Maps tangents of the named leaves to those of the gradients, by the chunked path."""

    varied: tuple[int, ...]
    whole: bool

    def __call__(self, residuals, tangents) -> Gradients:
        leaves, structure = jax.tree.flatten(residuals)

        def results(some):
            changed = [some.get(i, x) for i, x in enumerate(leaves)]
            call, *arrays = jax.tree.unflatten(structure, changed)
            sizes = block_sizes.choose_chunk_sizes(call, "cpu", backward=True)
            return backward.backward(call, sizes, *arrays, whole=self.whole)

        some = {i: leaves[i] for i in self.varied}
        return jax.jvp(results, (some,), (tangents,))[1]


def _say_no_second_gradient(backends: Backends) -> str:
    return (
        f"implementation {_join_names(backends)} has no gradient of gradients (forward mode of "
        'gradients it has, as in jax.hessian): ask for "xla"'
    )


def _join_names(backends: Backends) -> str:
    return " or ".join(dict.fromkeys(f'"{backend.name}"' for _, backend in backends.per_platform))


def _call_per_platform(backends: Backends, method: str, call: AttentionCall, *arrays: jax.Array):
    """Call a method of the backend of the platform that this is lowered for."""
    different = {backend for _, backend in backends.per_platform}
    if len(backends.per_platform) == len(PLATFORMS) and len(different) == 1:
        return getattr(different.pop(), method)(call, *arrays)
    return call_per_platform(
        tuple(
            (platform, _BackendMethod(backend, method))
            for platform, backend in backends.per_platform
        ),
        _make_result_shapes(call) if method == "forward" else _take_inputs(call),
        call,
        *arrays,
        refusal=backends.refusal,
    )


@dataclasses.dataclass(frozen=True)
class _BackendMethod:
    """A method of a backend, as a function that can be compared."""

    backend: Backend
    method: str

    def __call__(self, *args):
        return getattr(self.backend, self.method)(*args)


def _make_result_shapes(call: AttentionCall) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    rows = call.query.shape[:3]
    return (
        jax.ShapeDtypeStruct((*rows, call.value_head_dim), call.query.dtype),
        jax.ShapeDtypeStruct(rows, call.accumulator_dtype),
    )


def _take_inputs(call: AttentionCall) -> Gradients:
    return Gradients(*(getattr(call, name) for name in _INPUTS))


def _drop_inputs(call: AttentionCall) -> AttentionCall:
    absent: dict[str, Any] = dict.fromkeys(_INPUTS)
    return dataclasses.replace(call, **absent)


def _insert_inputs(rest: AttentionCall, inputs: Gradients) -> AttentionCall:
    return dataclasses.replace(rest, **inputs._asdict())
