"""A call over a mesh: `plan_call` decides while tracing, `run_mesh_plan` makes the program."""

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
from axattn._jax_compat import find_mesh_platform, place_on_mesh, reshard
from axattn._mask_parts import Dense
from axattn._masks import Mask
from axattn._sharded import costs, gather, kv_heads, layouts, ring, ring_step, specs, ulysses
from axattn._sharded.axes import Axes, list_axis_names
from axattn._sharded.combine import Results
from axattn._typing import present


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """How a call runs over a mesh. Static and hashable.

    Attributes:
      axes, mesh: the axes of the mesh that shard the call.
      kv_axes: the part of ``axes.heads`` that shards the key/value heads.
      shards: number of shards of the sequence.
      strategy: one of ``costs.STRATEGIES``; None where the sequence is not sharded.
      layout: the order of the tokens.
      distances: the ring steps, see `layouts.list_ring_distances`.
      implementation: the names that the user gave.
      platform: if not None, the named implementations have to support a shard's call on it.
    """

    axes: Axes
    mesh: Any
    kv_axes: tuple[str, ...]
    shards: int
    strategy: str | None
    layout: str
    distances: tuple[int, ...]
    implementation: tuple[str, ...] | None
    platform: str | None = None


def plan_call(
    call: AttentionCall,
    axes: Axes,
    mesh: Any,
    *,
    strategy: str | None = None,
    layout: str = "contiguous",
    links: costs.Links | None = None,
    implementation: tuple[str, ...] | None = None,
) -> MeshPlan:
    """Check the call and choose its strategy.

    Raises:
      ValueError, NotImplementedError: as `axattn.parallel.attention`.
    """
    axes.check(mesh)
    rows, shards = axes.size(mesh, "batch"), axes.size(mesh, "sequence")
    if call.batch % rows:
        raise ValueError(f"batch takes axes whose size divides {call.batch} rows, got {rows}")
    kv_axes = kv_heads.choose_kv_axes(axes, mesh, call.num_heads, call.num_kv_heads)
    if strategy not in (None, *costs.STRATEGIES):
        raise ValueError(f"strategy takes one of {costs.STRATEGIES} or None, got {strategy!r}")
    layouts.check_layout(layout)
    make_plan = functools.partial(
        MeshPlan, axes, mesh, kv_axes, shards, layout=layout, implementation=implementation
    )
    if shards == 1:
        return make_plan(strategy=None, distances=(0,))
    for length in (call.q_len, call.kv_len):
        layouts.check_length(layout, shards, length)
    distances = layouts.list_ring_distances(
        call.mask, get_known_layout(call, layout), shards, call.q_len, call.kv_len
    )
    if strategy is not None:
        sizes = get_shard_sizes(call, axes, mesh)
        check_strategy(strategy, sizes.num_heads, sizes.num_kv_heads, shards, call, implementation)
        return make_plan(strategy=strategy, distances=distances)
    names = [
        cost.strategy
        for cost in compare_strategies(call, axes, mesh, layout, links, implementation)
        if not cost.refusal
    ]
    for name in names[:-1]:
        plan = make_plan(strategy=name, distances=distances)
        if _is_supported(plan, call):
            return plan
    return make_plan(strategy=names[-1], distances=distances)


def _is_supported(plan: MeshPlan, call: AttentionCall) -> bool:
    """Return whether the named implementations, if any, support the call of a shard."""
    if plan.implementation is None:
        return True
    plan = dataclasses.replace(plan, platform=find_mesh_platform(plan.mesh))
    try:
        jax.eval_shape(functools.partial(run_mesh_plan, plan), call)
    except NotImplementedError:
        return False
    return True


def check_strategy(
    strategy: str, num_heads: int, num_kv_heads: int, shards: int, call, implementation
) -> None:
    """Raise NotImplementedError where the strategy does not support the call.

    ``num_heads`` and ``num_kv_heads`` are those of one shard of the heads.
    """
    refusals = {
        "ring": ring.find_refusal(call, implementation),
        "ulysses": ulysses.find_refusal(num_heads, num_kv_heads, shards),
    }
    if refusals.get(strategy):
        raise NotImplementedError(f'strategy "{strategy}" {refusals[strategy]}')


def get_shard_sizes(call: AttentionCall, axes: Axes, mesh: Any) -> costs.ShardSizes:
    """Return the sizes that the cost model takes."""
    head_shards = axes.size(mesh, "heads")
    return costs.ShardSizes(
        batch=max(1, call.batch // axes.size(mesh, "batch")),
        q_len=call.q_len,
        kv_len=call.kv_len,
        num_heads=call.num_heads // head_shards,
        num_kv_heads=max(1, call.num_kv_heads // head_shards),
        head_dim=call.head_dim,
        value_head_dim=call.value_head_dim,
        itemsize=call.query.dtype.itemsize,
    )


def compare_strategies(call, axes, mesh, layout, links, implementation) -> list[costs.StrategyCost]:
    """Return the cost of every strategy for this call, the cheapest first."""
    ranking = costs.estimate_costs(
        get_shard_sizes(call, axes, mesh),
        call.mask,
        get_known_layout(call, layout),
        axes.size(mesh, "sequence"),
        links or costs.Links(),
    )
    refusal = ring.find_refusal(call, implementation)
    if refusal:
        ranking = [cost for cost in ranking if cost.strategy != "ring"]
        ranking.append(costs.StrategyCost("ring", refusal))
    return ranking


def get_known_layout(call: AttentionCall, layout: str) -> str | None:
    """Return the layout, or None where the call has positions of its own."""
    return layout if call.q_positions is None and call.kv_positions is None else None


def run_mesh_plan(plan: MeshPlan, call: AttentionCall) -> Results:
    """Return output ``[B, T, N, h]`` and LSE ``[B, T, N]``, sharded as the query is."""
    in_specs = specs.make_call_specs(call, plan.axes, plan.kv_axes or None)
    return _run_jitted(plan, place_on_mesh(call, in_specs, plan.mesh))


# Jitted, so that an eager call is compiled as one program.
@functools.partial(jax.jit, static_argnames="plan")
def _run_jitted(plan: MeshPlan, call: AttentionCall) -> Results:
    if call.q_len == plan.shards > 1:
        call = _broadcast_rows(call)
    in_specs = specs.make_call_specs(call, plan.axes, plan.kv_axes or None)
    program = jax.shard_map(
        functools.partial(run_shard, plan),
        mesh=plan.mesh,
        in_specs=(in_specs,),
        out_specs=specs.make_result_specs(plan.axes),
    )
    return program(reshard(call, in_specs, plan.mesh))


def _broadcast_rows(call: AttentionCall) -> AttentionCall:
    """Repeat a bias or mask of one row for every query.

    A shard with one query could not tell such a row from the row of its own query.
    """

    def broadcast(array):
        if array is None or array.shape[2] != 1:
            return array
        return jnp.broadcast_to(array, (*array.shape[:2], call.q_len, array.shape[3]))

    def broadcast_part(part):
        return Dense(broadcast(part.array)) if isinstance(part, Dense) else part

    mask = Mask(tuple(map(broadcast_part, call.mask.parts)))
    return dataclasses.replace(call, bias=broadcast(call.bias), mask=mask)


def run_shard(plan: MeshPlan, call: AttentionCall) -> Results:
    """Run the part of one device, inside ``shard_map``."""
    axes = plan.axes
    call = dataclasses.replace(call, return_residual=True)
    if call.dropout_key is not None:
        call = _mix_dropout_key(plan, call)
    call = kv_heads.select_kv_heads(call, axes, plan.mesh, plan.kv_axes)

    def attend(call: AttentionCall) -> Results:
        choice = registry.make_plan(call, plan.implementation)
        _check_platform(choice, plan.platform)
        out, lse = registry.run_plan(call, choice)
        return out, present(lse)

    if plan.strategy is None:
        return attend(call)
    call, sequence = _add_positions(plan, call), present(axes.sequence)
    if plan.strategy == "gather":
        return gather.run_gather(call, sequence, attend)
    if plan.strategy == "ulysses":
        return ulysses.run_ulysses(call, sequence, plan.shards, attend)
    # Choose by the call of one step: it has only its own columns of a dense mask.
    shard = lax.axis_index(sequence)
    kv = ring_step.get_kv_shard(call)
    step_call = ring_step.make_step_call(call, kv, shard, shard, first=True)
    choice = _plan_flash(step_call, plan.implementation)
    _check_platform(choice, plan.platform)
    backends = flash.make_backends(step_call, choice.names, choice.refusal, whole=False)
    return ring.run_ring(ring.RingSchedule(sequence, plan.shards, plan.distances, backends), call)


def _add_positions(plan: MeshPlan, call: AttentionCall) -> AttentionCall:
    """Add the positions of the tokens where slots, counted from 0, would be wrong ones."""
    if not layouts.uses_positions(call.mask) and call.alibi_slopes is None:
        return call
    sequence = present(plan.axes.sequence)
    shard = lax.axis_index(sequence)
    changes: dict[str, Any] = {}
    for name, size in (("q_positions", call.q_len), ("kv_positions", call.kv_len)):
        # Whether the strategy brings these tokens of all shards together.
        gathers = plan.strategy == "ulysses" or (plan.strategy, name) == ("gather", "kv_positions")
        positions, length = getattr(call, name), size * plan.shards
        if positions is not None:
            changes[name] = gather.gather_shards(positions, sequence) if gathers else positions
        elif not gathers:
            slots = shard * size + jnp.arange(size, dtype=jnp.int32)
            changes[name] = layouts.compute_positions(plan.layout, slots, plan.shards, length)[None]
        elif plan.layout != "contiguous":
            slots = jnp.arange(length, dtype=jnp.int32)
            changes[name] = layouts.compute_positions(plan.layout, slots, plan.shards, length)[None]
    return dataclasses.replace(call, **changes)


def _plan_flash(call: AttentionCall, implementation) -> registry.ImplementationPlan:
    """Choose among the implementations of `flash`, whose results the ring can combine."""
    if implementation is None:
        return registry.ImplementationPlan(
            tuple(
                (platform, tuple(n if n in flash.NAMES else "xla_chunked" for n in names))
                for platform, names in registry.make_plan(call, None).names
            )
        )
    names = tuple(n for n in implementation if n in ("mosaic", *flash.NAMES))
    return registry.make_plan(call, names)


def _check_platform(choice: registry.ImplementationPlan, platform: str | None) -> None:
    if platform is not None and platform not in dict(choice.names):
        raise NotImplementedError(choice.refusal)


def _mix_dropout_key(plan: MeshPlan, call: AttentionCall) -> AttentionCall:
    """Give each device other dropout bits: all of them count rows, heads and slots from 0.

    With one pattern for all rows and heads (``broadcast_dropout``) only slots matter. The ring
    mixes in the shards of its steps itself.
    """
    axes = plan.axes
    names = list(list_axis_names("sequence", axes.sequence))
    if not call.broadcast_dropout:
        for dimension in ("batch", "heads"):
            names += list_axis_names(dimension, getattr(axes, dimension))
    elif plan.strategy != "gather":
        names = []
    if not names:
        return call
    index = lax.axis_index(tuple(names)).astype(jnp.uint32)
    mixed = index * np.uint32(0x85EBCA6B)
    dropout_key = present(call.dropout_key) ^ jnp.stack([mixed, index])
    return dataclasses.replace(call, dropout_key=dropout_key)
