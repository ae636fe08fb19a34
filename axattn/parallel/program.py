"""How a call runs over a mesh: what is decided while tracing, `plan`, and the program, `run`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from axattn._jax_compat import resharded
from axattn.call import AttentionCall
from axattn.implementations import flash, registry
from axattn.parallel import costs, gather, heads, layouts, ring, specs, ulysses
from axattn.parallel.axes import Axes, names_of

Results = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts; hashable.

    Attributes:
      axes, mesh: what is shared out over what.
      kv_axes: those of ``axes.heads`` that share out the key/value heads.
      shards: of the sequence.
      strategy: one of ``costs.STRATEGIES``; None where the sequence is whole.
      hops: at which distances shards need each other's keys.
      implementation: of what one device does, as the user asked for it.
    """

    axes: Axes
    mesh: Any
    kv_axes: tuple[str, ...]
    shards: int
    strategy: str | None
    hops: tuple[int, ...]
    implementation: tuple[str, ...] | None


def plan(
    call: AttentionCall,
    axes: Axes,
    mesh: Any,
    *,
    strategy: str | None = None,
    layout: str = "contiguous",
    links: costs.Links | None = None,
    implementation: tuple[str, ...] | None = None,
) -> Plan:
    """Decides, and raises what `axattn.parallel.attention` says it raises."""
    axes.check(mesh)
    rows, shards = axes.size(mesh, "batch"), axes.size(mesh, "sequence")
    if call.batch % rows:
        raise ValueError(f"batch takes axes whose size divides {call.batch} rows, got {rows}")
    taken = heads.kv_axes(axes, mesh, call.num_heads, call.num_kv_heads)
    if strategy not in (None, *costs.STRATEGIES):
        raise ValueError(f"strategy takes one of {costs.STRATEGIES} or None, got {strategy!r}")
    hops: tuple[int, ...] = (0,)
    if shards == 1:
        strategy = None
    else:
        for length in (call.q_len, call.kv_len):
            layouts.runs(layout, shards, length)  # the check
        by_cost = costs_of(call, axes, mesh, layout, links, implementation)
        refusals = {cost.strategy: cost.refusal for cost in by_cost}
        strategy = strategy or by_cost[0].strategy
        if refusals[strategy]:
            raise NotImplementedError(f'strategy "{strategy}" {refusals[strategy]}')
        hops = layouts.hops(call.mask, known(call, layout), shards, call.q_len, call.kv_len)
    return Plan(axes, mesh, taken, shards, strategy, hops, implementation)


def costs_of(call, axes, mesh, layout, links, implementation) -> list[costs.Cost]:
    """Of every strategy for this call, the cheapest first."""
    shards, ways = axes.size(mesh, "sequence"), axes.size(mesh, "heads")
    problem = costs.Problem(
        batch=max(1, call.batch // axes.size(mesh, "batch")),
        q_len=call.q_len,
        kv_len=call.kv_len,
        num_heads=call.num_heads // ways,
        num_kv_heads=max(1, call.num_kv_heads // ways),
        head_dim=call.head_dim,
        value_head_dim=call.value_head_dim,
        itemsize=call.query.dtype.itemsize,
    )
    found = costs.costs(problem, call.mask, known(call, layout), shards, links or costs.Links())
    refusal = ring_refuses(implementation)
    if refusal:
        found = [cost for cost in found if cost.strategy != "ring"]
        found.append(costs.Cost("ring", refusal))
    return found


def known(call: AttentionCall, layout: str) -> str | None:
    """The layout, unless the call says by itself where its tokens are."""
    return layout if call.q_positions is None and call.kv_positions is None else None


def ring_refuses(implementation: tuple[str, ...] | None) -> str | None:
    """Why the ring cannot be done with what the user asked for."""
    names = ("mosaic", *flash.NAMES)
    if implementation is None or any(name in names for name in implementation):
        return None
    return f"merges and rings with implementations {', '.join(names)}, got {implementation}"


@functools.partial(jax.jit, static_argnames=("plan", "layout"))
def run(plan: Plan, call: AttentionCall, layout: str) -> Results:
    """Output ``[B, T, N, h]`` and LSE ``[B, T, N]``, shared out as the query is."""
    if plan.shards > 1:
        call = _with_positions(call, layout, plan.shards)
    in_specs = specs.of_call(call, plan.axes, plan.kv_axes or None)
    program = jax.shard_map(
        functools.partial(local, plan),
        mesh=plan.mesh,
        in_specs=(in_specs,),
        out_specs=specs.of_results(plan.axes),
    )
    return program(resharded(call, in_specs, plan.mesh))


def _with_positions(call: AttentionCall, layout: str, shards: int) -> AttentionCall:
    """Says where tokens are, which a shard does not know by their slots."""
    if not layouts.speaks_of_positions(call.mask) and call.alibi_slopes is None:
        return call
    changes = {}
    for name, length in (("q_positions", call.q_len), ("kv_positions", call.kv_len)):
        if getattr(call, name) is None:
            changes[name] = jnp.asarray(layouts.positions(layout, shards, length))[None]
    return dataclasses.replace(call, **changes)


def local(plan: Plan, call: AttentionCall) -> Results:
    """What one device does, inside ``shard_map``."""
    axes = plan.axes
    call = dataclasses.replace(call, return_residual=True)
    if call.dropout_key is not None:
        call = _with_own_bits(call, axes)
    call = heads.own(call, axes, plan.mesh, plan.kv_axes)

    def attend(call: AttentionCall) -> Results:
        return registry.attend(call, registry.plan(call, plan.implementation))

    if plan.strategy is None:
        return attend(call)
    if plan.strategy == "gather":
        return gather.attend(call, axes.sequence, attend)
    if plan.strategy == "ulysses":
        return ulysses.attend(call, axes.sequence, plan.shards, attend)
    ways = flash.ways(call, _flash_plan(call, plan.implementation))
    return ring.attend(ring.Ring(axes.sequence, plan.shards, plan.hops, ways), call)


def _flash_plan(call: AttentionCall, implementation) -> tuple[tuple[str, str], ...]:
    """The ring needs forward and backward passes that it can merge itself: those of `flash`."""
    if implementation is None:
        chosen = registry.plan(call, None)
        return tuple((p, name if name in flash.NAMES else "xla_chunked") for p, name in chosen)
    names = tuple(n for n in implementation if n in ("mosaic", *flash.NAMES))
    return registry.plan(call, names)


def _with_own_bits(call: AttentionCall, axes: Axes) -> AttentionCall:
    """Dropout's bits belong to rows, heads and slots, which every device counts from 0."""
    names = [n for what in ("batch", "heads") for n in names_of(what, getattr(axes, what))]
    names += names_of("sequence", axes.sequence)
    if call.broadcast_dropout or not names:
        return call
    index = lax.axis_index(tuple(names)).astype(jnp.uint32)
    mixed = index * np.uint32(0x85EBCA6B)
    return dataclasses.replace(call, dropout_key=call.dropout_key ^ jnp.stack([mixed, index]))
