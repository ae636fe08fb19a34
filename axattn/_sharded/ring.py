"""Ring attention: keys and values travel, queries stay (Liu et al., arXiv:2310.01889).

Inside ``shard_map``. At every hop a shard attends to the keys that it has, while the next ones are
on their way; partial results are merged by their LSE. The backward pass rings as well: gradients of
keys and values travel with them and come home. Hops that no shard needs are left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn._call import AttentionCall
from axattn._implementations import flash
from axattn._implementations.chunked import block_sizes, forward
from axattn._implementations.chunked.backward import Gradients
from axattn._jax_compat import vary_over, varying_axes
from axattn._sharded import ring_step
from axattn._sharded.combine import merged
from axattn._typing import present


class Ring(NamedTuple):
    """Static facts; hashable."""

    axis: str
    shards: int
    hops: tuple[int, ...]  # distances, 0 first
    backends: flash.Backends

    @property
    def uniform(self) -> bool:
        """Whether all distances are there: then a loop does them, and the program stays short."""
        return self.hops == tuple(range(self.shards)) and self.shards > 2


def attend(ring: Ring, call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, t, N, h]`` in the query's dtype and LSE ``[B, t, N]`` of this shard."""
    axes = varying_axes(*jax.tree.leaves(call)) | {ring.axis}
    call = vary_over(call, axes)
    inputs = Gradients(*(getattr(call, name) for name in Gradients._fields))
    absent: dict[str, Any] = dict.fromkeys(Gradients._fields)
    rest = dataclasses.replace(call, **absent)
    return _ring(ring, inputs, rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: Ring, inputs: Gradients, rest: AttentionCall) -> tuple[jax.Array, jax.Array]:
    call = dataclasses.replace(rest, **inputs._asdict())
    out, lse = _merged_hops(ring, call, lambda hop_call: flash.attend(hop_call, ring.backends))
    return out.astype(call.query.dtype), lse


def _exact(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """A hop with weights and output that are not rounded to 16 bits."""
    return forward.forward(call, block_sizes.choose_chunk_sizes(call, "cpu"), rounded=False)


def _merged_hops(ring: Ring, call: AttentionCall, attend: Callable) -> tuple[jax.Array, jax.Array]:
    """Output and LSE, float32, of all hops, each of which is ``attend(its call)``."""
    here = lax.axis_index(ring.axis)

    def one(keys: ring_step.Moving, distance, first: bool):
        source = (here - distance) % ring.shards
        out, lse = attend(ring_step.call_of(call, keys, here, source, first=first))
        return out.astype(jnp.float32), lse

    keys = ring_step.moving(call)
    upcoming = _next(ring, keys, 0)
    result = one(keys, 0, True)
    if ring.uniform:

        def step(carry, distance):
            keys, result = carry
            upcoming = ring_step.shifted(keys, ring.axis, ring.shards, 1)
            return (upcoming, merged(result, one(keys, distance, False))), None

        distances = jnp.arange(1, ring.shards - 1)
        (upcoming, result), _ = lax.scan(step, (upcoming, result), distances)
        result = merged(result, one(upcoming, ring.shards - 1, False))
    else:
        for i, distance in enumerate(ring.hops[1:], 1):
            keys, upcoming = upcoming, _next(ring, upcoming, i)
            result = merged(result, one(keys, distance, False))
    return result


def _next(ring: Ring, tree: Any, i: int) -> Any:
    """``tree`` from where hop ``i`` has it to where the next one wants it."""
    if i + 1 == len(ring.hops):
        return tree
    return ring_step.shifted(tree, ring.axis, ring.shards, ring.hops[i + 1] - ring.hops[i])


def _forward(ring: Ring, inputs: Gradients, rest: AttentionCall):
    out, lse = _ring(ring, inputs, rest)
    return (out, lse), (inputs, rest, out, lse)


class _Sums(NamedTuple):
    """Float32 gradients of what stays, and of what travels (key and value)."""

    query: jax.Array
    bias: jax.Array | None
    scale: jax.Array | None
    key: jax.Array
    value: jax.Array


def _backward(ring: Ring, residuals, cotangents):
    inputs, rest, out, lse = residuals
    call = dataclasses.replace(rest, **inputs._asdict())
    here = lax.axis_index(ring.axis)
    dout, dlse = cotangents
    if call.bias is not None:  # whose gradients, of its dtype, are summed up over the hops
        call = dataclasses.replace(call, bias=call.bias.astype(jnp.float32))
    if call.bias is not None and out.dtype != jnp.float32:
        # As in `chunked_backward.backward`: the gradient of a bias sums up what rounding leaves.
        # What the cotangents of the output and of the LSE say together is then exact.
        exact, _ = _merged_hops(ring, call, _exact)
        rounding = out.astype(jnp.float32) - exact
        dlse = dlse + (dout.astype(jnp.float32) * rounding).sum(-1)

    def one(keys: ring_step.Moving, sums: _Sums, distance, first: bool):
        source = (here - distance) % ring.shards
        local = ring_step.call_of(call, keys, here, source, first=first)
        found = flash.compute_gradients(ring.backends, local, out, lse, dout, dlse)
        return _added(sums, found, source * keys.key.shape[1]), found.sinks

    key, value = present(call.key), present(call.value)
    sums = _Sums(call.query, call.bias, call.traced_scale, key, value)
    sums = jax.tree.map(functools.partial(jnp.zeros_like, dtype=jnp.float32), sums)
    sums = vary_over(sums, varying_axes(*jax.tree.leaves(call)))
    keys = ring_step.moving(call)
    sums, sinks = one(keys, sums, 0, True)

    def moved(tree, distance):
        return ring_step.shifted(tree, ring.axis, ring.shards, distance)

    def with_keys(sums, distance):
        key, value = moved((sums.key, sums.value), distance)
        return sums._replace(key=key, value=value)

    if ring.uniform:

        def step(carry, distance):
            keys, sums = carry
            keys, sums = moved(keys, 1), with_keys(sums, 1)
            return (keys, one(keys, sums, distance, False)[0]), None

        (_, sums), _ = lax.scan(step, (keys, sums), jnp.arange(1, ring.shards))
    else:
        for before, distance in zip(ring.hops, ring.hops[1:], strict=False):
            keys, sums = moved(keys, distance - before), with_keys(sums, distance - before)
            sums, _ = one(keys, sums, distance, False)
    sums = with_keys(sums, -ring.hops[-1])
    found = Gradients(sums.query, sums.key, sums.value, sums.bias, sinks, sums.scale)
    cast: Any = (
        None if x is None else x.astype(like.dtype) for x, like in zip(found, inputs, strict=True)
    )
    return Gradients(*cast), None


def _added(sums: _Sums, found: Gradients, kv_first: jax.Array) -> _Sums:
    bias = sums.bias
    if bias is not None:
        part = present(found.bias).astype(jnp.float32)
        if bias.shape[-1] != 1:
            part += ring_step.columns(bias, kv_first, part.shape[-1])
            bias = lax.dynamic_update_slice_in_dim(bias, part, kv_first, bias.ndim - 1)
        else:
            bias = bias + part
    return _Sums(
        sums.query + found.query.astype(jnp.float32),
        bias,
        None if sums.scale is None else sums.scale + present(found.traced_scale),
        sums.key + found.key.astype(jnp.float32),
        sums.value + found.value.astype(jnp.float32),
    )


_ring.defvjp(_forward, _backward)
