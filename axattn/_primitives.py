"""Two primitives for the derivatives in `axattn._implementations.flash`.

`call_per_platform` traces a function only for the platform that a program is lowered for.
`make_linear` is a linear function of tangents, with a transpose that its caller gives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from axattn._jax_compat import (
    apply_primitive,
    find_lowering_device,
    find_varying_axes,
    list_lowering_platforms,
    lower_per_platform,
    vary_over,
)


def call_per_platform(branches, results, *args, refusal: str):
    """Call the function of the platform that the program is lowered for.

    ``lax.platform_dependent`` traces the functions of all platforms. Here only one is traced, when
    it is lowered, in the context of its device if JAX knows it (`use_abstract_device`). JAX knows
    no derivative of it: callers define one.

    Args:
      branches: (platform, function) pairs; the functions are compared and hashed.
      results: a tree of arrays or ShapeDtypeStructs, whose shapes and dtypes the results have.
      *args: trees of arrays.
      refusal: the message of the NotImplementedError for other platforms.
    """
    args = vary_over(args, find_varying_axes(*jax.tree.leaves(args)))
    leaves, structure = jax.tree.flatten(args)
    shapes, results_structure = jax.tree.flatten(results)
    found = _staged.bind(
        *leaves,
        branches=tuple(
            (platform, _FlatFunction(function, structure)) for platform, function in branches
        ),
        results=tuple((x.shape, jnp.dtype(x.dtype)) for x in shapes),
        refusal=refusal,
    )
    return jax.tree.unflatten(results_structure, found)


def make_linear(
    forward: Callable, transpose: Callable | None, results, residuals, tangents, *, refusal: str
):
    """Return tangents like ``results``: ``forward(residuals, tangents)``, linear in ``tangents``.

    Both are trees of arrays. In reverse mode, ``transpose(residuals, cotangents)`` gives the
    cotangents of ``tangents``. If it is None, lowering raises NotImplementedError with ``refusal``.
    The functions are compared and hashed. Tangents of tangents differentiate ``forward``.
    """
    args = vary_over(
        (residuals, tangents), find_varying_axes(*jax.tree.leaves((residuals, tangents)))
    )
    leaves, structure = jax.tree.flatten(args)
    shapes, results_structure = jax.tree.flatten(results)
    residuals_structure: Any = jax.tree.structure(args[0])
    if transpose is not None:
        transpose = _FlatTranspose(transpose, residuals_structure, results_structure)
    found = _linear.bind(
        *leaves,
        forward=_FlatFunction(forward, structure),
        transpose=transpose,
        num_residuals=residuals_structure.num_leaves,
        results=tuple((x.shape, jnp.dtype(x.dtype)) for x in shapes),
        refusal=refusal,
    )
    return jax.tree.unflatten(results_structure, found)


@dataclasses.dataclass(frozen=True)
class _FlatFunction:
    """A function of trees, as a function of their leaves."""

    function: Callable
    structure: Any

    def __call__(self, *leaves):
        return jax.tree.leaves(self.function(*jax.tree.unflatten(self.structure, leaves)))


@dataclasses.dataclass(frozen=True)
class _FlatTranspose:
    """The function ``function(residuals, cotangents)`` of the leaves of both."""

    function: Callable
    residuals: Any
    cotangents: Any

    def __call__(self, residuals, cotangents):
        given = jax.tree.unflatten(self.residuals, residuals)
        return jax.tree.leaves(
            self.function(given, jax.tree.unflatten(self.cotangents, cotangents))
        )


@dataclasses.dataclass(frozen=True)
class _BatchedFunction:
    """``function`` under ``vmap``; ``axes`` of its arguments."""

    function: Callable
    axes: tuple

    def __call__(self, *args):
        return jax.vmap(self.function, in_axes=self.axes)(*args)


@dataclasses.dataclass(frozen=True)
class _FunctionTangents:
    """The tangents of ``function``; its arguments are followed by those of the ``varied`` ones."""

    function: Callable
    varied: tuple[int, ...]

    def __call__(self, *args):
        count = len(args) - len(self.varied)
        primals, tangents = args[:count], args[count:]

        def along(*some):
            replaced = dict(zip(self.varied, some, strict=True))
            return self.function(*(replaced.get(i, x) for i, x in enumerate(primals)))

        some = tuple(primals[i] for i in self.varied)
        return jax.jvp(along, some, tuple(tangents))[1]


_staged = jex_core.Primitive("axattn_staged")
_linear = jex_core.Primitive("axattn_linear")


def _type_results(*avals, results, **_):
    # All arguments vary over the same manual mesh axes, and so do the results.
    mesh, kind = avals[0].sharding.mesh, avals[0].manual_axis_type

    def result(shape, dtype):
        spec = jax.sharding.PartitionSpec(*(None,) * len(shape))
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.core.ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=kind)

    return [result(*each) for each in results]


for _primitive in (_staged, _linear):
    _primitive.multiple_results = True
    _primitive.def_abstract_eval(_type_results)
    _primitive.def_impl(functools.partial(apply_primitive, _primitive))


def _lower_staged(ctx, *values, branches, results, refusal):
    functions = dict(branches)
    rules: dict[str, Any] = {}
    for platform in list_lowering_platforms(ctx):
        # A plugin's platform takes the CPU's function, if all known platforms have one.
        function = functions.get(platform, functions.get("cpu") if len(functions) > 1 else None)
        if function is None:
            raise NotImplementedError(f"{refusal} (lowered for {platform})")
        device = find_lowering_device(ctx.module_context.backend, platform)
        rules[platform] = functools.partial(_lower_for, device, function)
    # lax.platform_dependent would lower the kernels of all platforms.
    return lower_per_platform(ctx, "axattn_staged", rules, *values)


def _lower_for(device, function: Callable, ctx, *values):
    """Lower ``function``, traced in the context of a device (or None)."""
    if device is None:
        return mlir.lower_fun(function, multiple_results=True)(ctx, *values)
    # Inside shard_map the mesh keeps its axes.
    there = jax.sharding.get_abstract_mesh()
    mesh = there.update(abstract_device=device)

    def moved(aval):
        if there.empty or aval.sharding.mesh.axis_names != there.axis_names:
            return aval
        types = aval.sharding.mesh.update(abstract_device=device)
        return aval.update(sharding=jax.sharding.NamedSharding(types, aval.sharding.spec))

    ctx = ctx.replace(avals_in=[moved(aval) for aval in ctx.avals_in])
    with jax.sharding.use_abstract_mesh(mesh):
        return mlir.lower_fun(function, multiple_results=True)(ctx, *values)


mlir.register_lowering(_staged, _lower_staged)


def _batch_staged(args, axes, *, branches, results, refusal):
    size = _find_batch_size(args, axes)
    found = _staged.bind(
        *args,
        branches=tuple((platform, _BatchedFunction(f, tuple(axes))) for platform, f in branches),
        results=tuple(((size, *shape), dtype) for shape, dtype in results),
        refusal=refusal,
    )
    return found, (0,) * len(found)


batching.primitive_batchers[_staged] = _batch_staged


def _transpose_staged(*_, **__):
    # Attention is linear in its values, but `jax.linear_transpose` of it is rare.
    raise NotImplementedError(
        "no linear transpose where an implementation is chosen per platform: ask for "
        'implementation="xla"'
    )


ad.primitive_transposes[_staged] = _transpose_staged


def _find_batch_size(args, axes) -> int:
    return next(x.shape[i] for x, i in zip(args, axes, strict=True) if i is not None)


def _lower_linear(ctx, *values, forward, refusal, **_):
    if forward is None:
        raise NotImplementedError(refusal)
    return mlir.lower_fun(forward, multiple_results=True)(ctx, *values)


mlir.register_lowering(_linear, _lower_linear)


def _batch_linear(args, axes, *, forward, transpose, num_residuals, results, refusal):
    size = _find_batch_size(args, axes)

    def batched(x, i):
        return jnp.broadcast_to(x, (size, *jnp.shape(x))) if i is None else jnp.moveaxis(x, i, 0)

    residuals, own = args[:num_residuals], tuple(axes[:num_residuals])
    tangents = map(batched, args[num_residuals:], axes[num_residuals:])
    found = _linear.bind(
        *residuals,
        *tangents,
        forward=forward and _BatchedFunction(forward, (*own, *(0 for _ in args[num_residuals:]))),
        transpose=transpose and _BatchedFunction(transpose, (own, 0)),
        num_residuals=num_residuals,
        results=tuple(((size, *shape), dtype) for shape, dtype in results),
        refusal=refusal,
    )
    return found, (0,) * len(found)


batching.primitive_batchers[_linear] = _batch_linear


def _jvp_linear(primals, tangents, *, forward, num_residuals, transpose, **params):
    given = dict(forward=forward, transpose=transpose, num_residuals=num_residuals, **params)
    results = _linear.bind(*primals, **given)
    if all(isinstance(x, ad.Zero) for x in tangents[:num_residuals]):
        own = map(ad.instantiate_zeros, tangents[num_residuals:])
        return results, _linear.bind(*primals[:num_residuals], *own, **given)
    varied = tuple(i for i, x in enumerate(tangents) if not isinstance(x, ad.Zero))
    found = _linear.bind(
        *primals,
        *(tangents[i] for i in varied),
        forward=forward and _FunctionTangents(forward, varied),
        transpose=None,
        num_residuals=len(primals),
        **params,
    )
    return results, found


ad.primitive_jvps[_linear] = _jvp_linear


def _transpose_linear(cotangents, *args, forward, num_residuals, transpose, refusal, **_):
    residuals, tangents = args[:num_residuals], args[num_residuals:]
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]
    if transpose is None:
        found = _linear.bind(
            *cotangents,
            forward=None,
            transpose=None,
            num_residuals=0,
            results=tuple((x.shape, x.dtype) for x in map(_type_tangent, tangents)),
            refusal=refusal,
        )
    else:
        found = transpose(tuple(residuals), tuple(cotangents))
    wanted = zip(tangents, found, strict=True)
    own = [x if ad.is_undefined_primal(tangent) else None for tangent, x in wanted]
    return [None] * num_residuals + own


def _type_tangent(tangent):
    return tangent.aval if ad.is_undefined_primal(tangent) else jax.typeof(tangent)


ad.primitive_transposes[_linear] = _transpose_linear
