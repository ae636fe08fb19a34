"""Ring attention: keys and values travel, queries stay (Liu et al., arXiv:2310.01889).

Inside ``shard_map``. At every ring step a shard attends to the keys that it has, while the next
ones are being sent; the results are combined by their LSE. In the backward pass the gradients of
keys and values travel with them, and back to their shard in the end. Steps that the mask empties
are left out.
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
from axattn._jax_compat import find_varying_axes, vary_over
from axattn._sharded import ring_step
from axattn._sharded.combine import Results, combine_pair
from axattn._typing import present


class RingSchedule(NamedTuple):
    """The steps of a ring over a mesh axis, and who attends in them. Static and hashable."""

    axis: str
    shards: int
    distances: tuple[int, ...]  # one per step, 0 first; see `layouts.list_ring_distances`
    backends: flash.Backends

    @property
    def has_all_distances(self) -> bool:
        """Whether no step is left out: then a loop keeps the program short."""
        return self.distances == tuple(range(self.shards)) and self.shards > 2


def find_refusal(call: AttentionCall, implementation: tuple[str, ...] | None) -> str | None:
    """Return why the ring cannot run with the dtype or the named implementations, or None."""
    if call.query.dtype == jnp.float64:
        return "merges in float32, got float64"
    names = ("mosaic", *flash.NAMES)
    if implementation is None or any(name in names for name in implementation):
        return None
    return f"merges and rings with implementations {', '.join(names)}, got {implementation}"


def run_ring(schedule: RingSchedule, call: AttentionCall) -> Results:
    """Return output ``[B, t, N, h]`` in the query's dtype and LSE ``[B, t, N]`` of this shard."""
    axes = find_varying_axes(*jax.tree.leaves(call)) | {schedule.axis}
    call = vary_over(call, axes)
    inputs = Gradients(*(getattr(call, name) for name in Gradients._fields))
    absent: dict[str, Any] = dict.fromkeys(Gradients._fields)
    rest = dataclasses.replace(call, **absent)
    return _attend_ring(schedule, inputs, rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_ring(schedule: RingSchedule, inputs: Gradients, rest: AttentionCall) -> Results:
    call = dataclasses.replace(rest, **inputs._asdict())

    def attend(step_call: AttentionCall) -> Any:
        return flash.attend(step_call, schedule.backends)

    out, lse = _combine_steps(schedule, call, attend)
    return out.astype(call.query.dtype), lse


def _attend_unrounded(call: AttentionCall) -> Results:
    """Attend in one step without rounding weights and output to 16 bits."""
    return forward.forward(call, block_sizes.choose_chunk_sizes(call, "cpu"), rounded=False)


def _combine_steps(schedule: RingSchedule, call: AttentionCall, attend: Callable) -> Results:
    """Call ``attend`` in every step; return output and LSE of all steps, float32."""
    shard = lax.axis_index(schedule.axis)

    def attend_step(kv: ring_step.KVShard, distance, first: bool):
        source = (shard - distance) % schedule.shards
        out, lse = attend(ring_step.make_step_call(call, kv, shard, source, first=first))
        return out.astype(jnp.float32), lse

    kv = ring_step.get_kv_shard(call)
    upcoming = _fetch_next(schedule, kv, 0)
    result = attend_step(kv, 0, True)
    if schedule.has_all_distances:

        def combine_step(carry, distance):
            kv, result = carry
            upcoming = ring_step.shift_shards(kv, schedule.axis, schedule.shards, 1)
            return (upcoming, combine_pair(result, attend_step(kv, distance, False))), None

        distances = jnp.arange(1, schedule.shards - 1)
        (upcoming, result), _ = lax.scan(combine_step, (upcoming, result), distances)
        result = combine_pair(result, attend_step(upcoming, schedule.shards - 1, False))
    else:
        for i, distance in enumerate(schedule.distances[1:], 1):
            kv, upcoming = upcoming, _fetch_next(schedule, upcoming, i)
            result = combine_pair(result, attend_step(kv, distance, False))
    return result


def _fetch_next(schedule: RingSchedule, kv: ring_step.KVShard, i: int) -> ring_step.KVShard:
    """Send the keys of step ``i`` to where the next step needs them."""
    if i + 1 == len(schedule.distances):
        return kv
    distance = schedule.distances[i + 1] - schedule.distances[i]
    return ring_step.shift_shards(kv, schedule.axis, schedule.shards, distance)


def _forward_ring(schedule: RingSchedule, inputs: Gradients, rest: AttentionCall):
    out, lse = _attend_ring(schedule, inputs, rest)
    return (out, lse), (inputs, rest, out, lse)


class _RingGradients(NamedTuple):
    """Float32 sums over the steps. Those of key and value travel with them."""

    query: jax.Array
    bias: jax.Array | None
    scale: jax.Array | None
    key: jax.Array
    value: jax.Array


def _backward_ring(schedule: RingSchedule, residuals, cotangents):
    inputs, rest, out, lse = residuals
    call = dataclasses.replace(rest, **inputs._asdict())
    shard = lax.axis_index(schedule.axis)
    dout, dlse = cotangents
    if call.bias is not None:  # a step returns the gradient in its dtype: add up in float32
        call = dataclasses.replace(call, bias=call.bias.astype(jnp.float32))
    if call.bias is not None and out.dtype != jnp.float32:
        # The gradient of a bias sums up rounding errors of the output (see `chunked.backward`).
        # Moving the error to the cotangent of the LSE makes the sum of both exact.
        exact, _ = _combine_steps(schedule, call, _attend_unrounded)
        rounding = out.astype(jnp.float32) - exact
        dlse = dlse + (dout.astype(jnp.float32) * rounding).sum(-1)

    def add_step(kv: ring_step.KVShard, sums: _RingGradients, distance, first: bool):
        source = (shard - distance) % schedule.shards
        step_call = ring_step.make_step_call(call, kv, shard, source, first=first)
        step = flash.compute_gradients(schedule.backends, step_call, out, lse, dout, dlse)
        return _add_gradients(sums, step, source * kv.key.shape[1]), step.sinks

    key, value = present(call.key), present(call.value)
    sums = _RingGradients(call.query, call.bias, call.traced_scale, key, value)
    sums = jax.tree.map(functools.partial(jnp.zeros_like, dtype=jnp.float32), sums)
    sums = vary_over(sums, find_varying_axes(*jax.tree.leaves(call)))
    kv = ring_step.get_kv_shard(call)
    sums, sinks = add_step(kv, sums, 0, True)

    def shift(tree, distance):
        return ring_step.shift_shards(tree, schedule.axis, schedule.shards, distance)

    def shift_kv_gradients(sums, distance):
        key, value = shift((sums.key, sums.value), distance)
        return sums._replace(key=key, value=value)

    if schedule.has_all_distances:

        def add_next_step(carry, distance):
            kv, sums = carry
            kv, sums = shift(kv, 1), shift_kv_gradients(sums, 1)
            return (kv, add_step(kv, sums, distance, False)[0]), None

        (_, sums), _ = lax.scan(add_next_step, (kv, sums), jnp.arange(1, schedule.shards))
    else:
        for before, distance in zip(schedule.distances, schedule.distances[1:], strict=False):
            kv = shift(kv, distance - before)
            sums = shift_kv_gradients(sums, distance - before)
            sums, _ = add_step(kv, sums, distance, False)
    sums = shift_kv_gradients(sums, -schedule.distances[-1])
    gradients = Gradients(sums.query, sums.key, sums.value, sums.bias, sinks, sums.scale)
    pairs = zip(gradients, inputs, strict=True)
    cast: Any = (None if x is None else x.astype(like.dtype) for x, like in pairs)
    return Gradients(*cast), None


def _add_gradients(sums: _RingGradients, step: Gradients, kv_first: jax.Array) -> _RingGradients:
    """Add the gradients of a step over the keys from slot ``kv_first`` on."""
    bias = sums.bias
    if bias is not None:
        part = present(step.bias).astype(jnp.float32)
        if bias.shape[-1] != 1:
            part += ring_step.slice_key_slots(bias, kv_first, part.shape[-1])
            bias = lax.dynamic_update_slice_in_dim(bias, part, kv_first, bias.ndim - 1)
        else:
            bias = bias + part
    return _RingGradients(
        sums.query + step.query.astype(jnp.float32),
        bias,
        None if sums.scale is None else sums.scale + present(step.traced_scale),
        sums.key + step.key.astype(jnp.float32),
        sums.value + step.value.astype(jnp.float32),
    )


_attend_ring.defvjp(_forward_ring, _backward_ring)
