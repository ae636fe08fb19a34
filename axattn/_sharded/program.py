"""How a call runs over a mesh: what is decided while tracing, `plan`, and the program, `run`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from axattn._call import AttentionCall
from axattn._implementations import flash, registry
from axattn._jax_compat import placed, platform_of_mesh, resharded
from axattn._mask_parts import Dense
from axattn._masks import Mask
from axattn._sharded import costs, gather, kv_heads, layouts, ring, ring_step, specs, ulysses
from axattn._sharded.axes import Axes, names_of
from axattn._typing import present

Results = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts; hashable.

    Attributes:
      axes, mesh: what is shared out over what.
      kv_axes: those of ``axes.heads`` that share out the key/value heads.
      shards: of the sequence.
      strategy: one of ``costs.STRATEGIES``; None where the sequence is whole.
      layout: where tokens are.
      hops: at which distances shards need each other's keys.
      implementation: of what one device does, as the user asked for it.
      platform: where one of these must take what one device does; None where that is not asked.
    """

    axes: Axes
    mesh: Any
    kv_axes: tuple[str, ...]
    shards: int
    strategy: str | None
    layout: str
    hops: tuple[int, ...]
    implementation: tuple[str, ...] | None
    platform: str | None = None


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
    taken = kv_heads.kv_axes(axes, mesh, call.num_heads, call.num_kv_heads)
    if strategy not in (None, *costs.STRATEGIES):
        raise ValueError(f"strategy takes one of {costs.STRATEGIES} or None, got {strategy!r}")
    layouts.check(layout)
    made = functools.partial(
        Plan, axes, mesh, taken, shards, layout=layout, implementation=implementation
    )
    if shards == 1:
        return made(strategy=None, hops=(0,))
    for length in (call.q_len, call.kv_len):
        layouts.runs(layout, shards, length)  # the check
    hops = layouts.hops(call.mask, known(call, layout), shards, call.q_len, call.kv_len)
    if strategy is not None:
        problem = problem_of(call, axes, mesh)
        check_strategy(
            strategy, problem.num_heads, problem.num_kv_heads, shards, call, implementation
        )
        return made(strategy=strategy, hops=hops)
    names = [
        c.strategy
        for c in costs_of(call, axes, mesh, layout, links, implementation)
        if not c.refusal
    ]
    for name in names[:-1]:
        if _takes(made(strategy=name, hops=hops), call):
            return made(strategy=name, hops=hops)
    return made(strategy=names[-1], hops=hops)


def _takes(plan: Plan, call: AttentionCall) -> bool:
    """Whether the implementations that were named, if any, take what one device does."""
    if plan.implementation is None:
        return True
    plan = dataclasses.replace(plan, platform=platform_of_mesh(plan.mesh))
    try:
        jax.eval_shape(functools.partial(run, plan), call)
    except NotImplementedError:
        return False
    return True


def check_strategy(
    strategy: str, num_heads: int, num_kv_heads: int, shards: int, call, implementation
) -> None:
    """NotImplementedError where it cannot be done, by the heads of one shard of them."""
    refusals = {
        "ring": ring_refuses(call, implementation),
        "ulysses": ulysses.refuses(num_heads, num_kv_heads, shards),
    }
    if refusals.get(strategy):
        raise NotImplementedError(f'strategy "{strategy}" {refusals[strategy]}')


def problem_of(call: AttentionCall, axes: Axes, mesh: Any) -> costs.Problem:
    """A call as the cost model sees it."""
    ways = axes.size(mesh, "heads")
    return costs.Problem(
        batch=max(1, call.batch // axes.size(mesh, "batch")),
        q_len=call.q_len,
        kv_len=call.kv_len,
        num_heads=call.num_heads // ways,
        num_kv_heads=max(1, call.num_kv_heads // ways),
        head_dim=call.head_dim,
        value_head_dim=call.value_head_dim,
        itemsize=call.query.dtype.itemsize,
    )


def costs_of(call, axes, mesh, layout, links, implementation) -> list[costs.Cost]:
    """Of every strategy for this call, the cheapest first."""
    found = costs.costs(
        problem_of(call, axes, mesh),
        call.mask,
        known(call, layout),
        axes.size(mesh, "sequence"),
        links or costs.Links(),
    )
    refusal = ring_refuses(call, implementation)
    if refusal:
        found = [cost for cost in found if cost.strategy != "ring"]
        found.append(costs.Cost("ring", refusal))
    return found


def known(call: AttentionCall, layout: str) -> str | None:
    """The layout, unless the call says by itself where its tokens are."""
    return layout if call.q_positions is None and call.kv_positions is None else None


def ring_refuses(call: AttentionCall, implementation: tuple[str, ...] | None) -> str | None:
    """Why the ring cannot be done with what the user asked for."""
    if call.query.dtype == jnp.float64:
        return "merges in float32, got float64"
    names = ("mosaic", *flash.NAMES)
    if implementation is None or any(name in names for name in implementation):
        return None
    return f"merges and rings with implementations {', '.join(names)}, got {implementation}"


def run(plan: Plan, call: AttentionCall) -> Results:
    """Output ``[B, T, N, h]`` and LSE ``[B, T, N]``, shared out as the query is."""
    in_specs = specs.of_call(call, plan.axes, plan.kv_axes or None)
    return _run(plan, placed(call, in_specs, plan.mesh))


@functools.partial(jax.jit, static_argnames="plan")
def _run(plan: Plan, call: AttentionCall) -> Results:
    # Compiled as one unit also when called eagerly.
    if call.q_len == plan.shards > 1:
        call = _with_all_rows(call)
    in_specs = specs.of_call(call, plan.axes, plan.kv_axes or None)
    program = jax.shard_map(
        functools.partial(local, plan),
        mesh=plan.mesh,
        in_specs=(in_specs,),
        out_specs=specs.of_results(plan.axes),
    )
    return program(resharded(call, in_specs, plan.mesh))


def _with_all_rows(call: AttentionCall) -> AttentionCall:
    """Where a shard has one query, an array of one row would look like one for all queries."""

    def rows(array):
        if array is None or array.shape[2] != 1:
            return array
        return jnp.broadcast_to(array, (*array.shape[:2], call.q_len, array.shape[3]))

    def part(one):
        return Dense(rows(one.array)) if isinstance(one, Dense) else one

    mask = Mask(tuple(map(part, call.mask.parts)))
    return dataclasses.replace(call, bias=rows(call.bias), mask=mask)


def local(plan: Plan, call: AttentionCall) -> Results:
    """What one device does, inside ``shard_map``."""
    axes = plan.axes
    call = dataclasses.replace(call, return_residual=True)
    if call.dropout_key is not None:
        call = _with_own_bits(plan, call)
    call = kv_heads.own(call, axes, plan.mesh, plan.kv_axes)

    def attend(call: AttentionCall) -> Results:
        chosen = registry.make_plan(call, plan.implementation)
        _check_platform(chosen, plan.platform)
        out, lse = registry.run_plan(call, chosen)
        return out, present(lse)

    if plan.strategy is None:
        return attend(call)
    call, sequence = _with_positions(plan, call), present(axes.sequence)
    if plan.strategy == "gather":
        return gather.attend(call, sequence, attend)
    if plan.strategy == "ulysses":
        return ulysses.attend(call, sequence, plan.shards, attend)
    # Of one hop: a dense mask has the columns of all shards, and a hop is given its own.
    here = lax.axis_index(sequence)
    hop_call = ring_step.call_of(call, ring_step.moving(call), here, here, first=True)
    chosen = _flash_plan(hop_call, plan.implementation)
    _check_platform(chosen, plan.platform)
    backends = flash.make_backends(hop_call, chosen.names, chosen.refusal, whole=False)
    return ring.attend(ring.Ring(sequence, plan.shards, plan.hops, backends), call)


def _with_positions(plan: Plan, call: AttentionCall) -> AttentionCall:
    """Says where tokens are, where slots do not: `xla_chunked` and kernels count from 0."""
    if not layouts.speaks_of_positions(call.mask) and call.alibi_slopes is None:
        return call
    sequence = present(plan.axes.sequence)
    here = lax.axis_index(sequence)
    changes: dict[str, Any] = {}
    for name, own in (("q_positions", call.q_len), ("kv_positions", call.kv_len)):
        # A shard's own, or those of all shards where they will be together.
        together = plan.strategy == "ulysses" or (plan.strategy, name) == ("gather", "kv_positions")
        given, length = getattr(call, name), own * plan.shards
        if given is not None:
            changes[name] = gather.whole(given, sequence) if together else given
        elif not together:
            slots = here * own + jnp.arange(own, dtype=jnp.int32)
            changes[name] = layouts.of_slots(plan.layout, slots, plan.shards, length)[None]
        elif plan.layout != "contiguous":
            slots = jnp.arange(length, dtype=jnp.int32)
            changes[name] = layouts.of_slots(plan.layout, slots, plan.shards, length)[None]
    return dataclasses.replace(call, **changes)


def _flash_plan(call: AttentionCall, implementation) -> registry.ImplementationPlan:
    """The ring needs forward and backward passes that it can merge itself: those of `flash`."""
    if implementation is None:
        return registry.ImplementationPlan(
            tuple(
                (platform, tuple(n if n in flash.NAMES else "xla_chunked" for n in chosen))
                for platform, chosen in registry.make_plan(call, None).names
            )
        )
    names = tuple(n for n in implementation if n in ("mosaic", *flash.NAMES))
    return registry.make_plan(call, names)


def _check_platform(chosen: registry.ImplementationPlan, platform: str | None) -> None:
    if platform is not None and platform not in dict(chosen.names):
        raise NotImplementedError(chosen.refusal)


def _with_own_bits(plan: Plan, call: AttentionCall) -> AttentionCall:
    """Dropout's bits belong to rows, heads and slots, which every device counts from 0.

    One pattern for all rows and heads differs by the slots alone, and a ring says which.
    """
    axes = plan.axes
    names = list(names_of("sequence", axes.sequence))
    if not call.broadcast_dropout:
        names += [n for what in ("batch", "heads") for n in names_of(what, getattr(axes, what))]
    elif plan.strategy != "gather":
        names = []
    if not names:
        return call
    index = lax.axis_index(tuple(names)).astype(jnp.uint32)
    mixed = index * np.uint32(0x85EBCA6B)
    dropout_key = present(call.dropout_key) ^ jnp.stack([mixed, index])
    return dataclasses.replace(call, dropout_key=dropout_key)
