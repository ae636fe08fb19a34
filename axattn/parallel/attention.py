"""Attention over a mesh, `attention`, and over the shards of a sequence, `local_attention`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from axattn._typing import Array, ArrayLike
from axattn.arguments import normalize
from axattn.attention import dot_product_attention
from axattn.call import AttentionCall
from axattn.implementations import flash, registry
from axattn.mask_parts import Dense
from axattn.parallel import costs, gather, heads, layouts, ring, specs, ulysses
from axattn.parallel.axes import Axes, mesh_or_current, names_of

_SIGNATURE = inspect.signature(dot_product_attention)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call runs over a mesh; hashable."""

    axes: Axes
    mesh: Any
    kv_axes: tuple[str, ...]
    shards: int  # of the sequence
    strategy: str | None  # None: the sequence is whole
    hops: tuple[int, ...]
    implementation: str | tuple[str, ...] | None


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: Any = None,
    *,
    axes: Axes,
    mesh: Any = None,
    strategy: str | None = None,
    layout: str = "contiguous",
    links: costs.Links | None = None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """`axattn.dot_product_attention` of arrays that are shared out over a mesh.

    Each device runs its own part, kernels too: the partitioner never sees them whole.

    Args:
      query, key, value, bias, mask: as there, ``[B, T, N, H]``, ``[B, S, K, H]``, ``[B, S, K, h]``.
      axes: which axes of the mesh share out what. Where the heads' are more than K, keys and values
        are shared out over as many as go into K, and the same on the others.
      mesh: by default that of the context (``jax.set_mesh``).
      strategy: where a sequence is shared out: "ring" (keys and values travel), "gather" (all get
        them) or "ulysses" (shards of tokens become shards of heads); None: the cheapest by
        arithmetic, see `explain`.
      layout: where the tokens are: "contiguous", or "zigzag" (the order of `positions`), which
        leaves every device the same work under causal masks. Masks, windows and ALiBi know.
        Lengths, segment ids, biases and dense masks speak of slots, as they lie.
      links: what `explain` reckons with.
      **options: as there. Dropout draws other bits than on one device.

    Returns:
      As there, shared out as the query is.

    Raises:
      ValueError: as there; an axis that the mesh does not have, sizes that the axes do not divide.
      NotImplementedError: a strategy or an implementation that does not take the call.
    """
    mesh = mesh_or_current(mesh)
    call, implementation = _call(query, key, value, bias, mask, options)
    plan, call = _plan(call, axes, mesh, strategy, layout, links, implementation)
    in_specs = specs.of_call(call, axes, plan.kv_axes or None)
    run = jax.shard_map(
        functools.partial(_local, plan),
        mesh=mesh,
        in_specs=(in_specs,),
        out_specs=specs.of_results(axes),
    )
    out, lse = run(call)
    return (out, lse) if call.return_residual else out


def explain(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    axes: Axes,
    mesh: Any = None,
    layout: str = "contiguous",
    links: costs.Links | None = None,
    **options: Any,
) -> list[costs.Cost]:
    """What each strategy would cost, the cheapest first; print them.

    Takes the arguments of `attention`, arrays or ``jax.ShapeDtypeStruct``.
    """
    mesh, found = mesh_or_current(mesh), []

    def look(*arrays):
        call, _ = _call(*arrays, bias, mask, options)
        found.extend(_costs(call, axes, mesh, layout, links or costs.Links()))

    jax.eval_shape(look, query, key, value)
    return found


def local_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: Any = None,
    *,
    axis: str,
    strategy: str = "ring",
    layout: str = "contiguous",
    **options: Any,
) -> Array | tuple[Array, Array]:
    """The same inside a ``jax.shard_map``, of this shard's tokens with those of all shards.

    Args:
      query, key, value: ``[B, t, N, H]``, ``[B, s, K, H]``, ``[B, s, K, h]`` of this shard.
      axis: the mesh axis that shares out the sequence.
      others: as in `attention`; segment ids and positions are this shard's, lengths those of the
        whole sequence, and there are no biases and dense masks.

    Raises:
      ValueError, NotImplementedError: as `attention`; and a bias or a dense mask.
    """
    call, implementation = _call(query, key, value, bias, mask, options)
    dense = any(isinstance(part, Dense) for part in call.mask.parts)
    if call.bias is not None or dense:
        raise NotImplementedError("bias and dense masks are for parallel.attention, not for this")
    shards = lax.axis_size(axis)
    lengths = {"q_positions": call.q_len, "kv_positions": call.kv_len}
    known = layout if all(getattr(call, name) is None for name in lengths) else None
    here = lax.axis_index(axis)
    changes = {}
    for name, own in lengths.items():
        whole = jnp.asarray(layouts.positions(layout, shards, own * shards))
        if getattr(call, name) is None:
            changes[name] = lax.dynamic_slice_in_dim(whole, here * own, own)[None]
    if strategy not in costs.STRATEGIES:
        raise ValueError(f"strategy takes one of {costs.STRATEGIES}, got {strategy!r}")
    refusal = ulysses.refuses(call.num_heads, call.num_kv_heads, shards)
    if strategy == "ulysses" and refusal:
        raise NotImplementedError(f'strategy "ulysses" {refusal}')
    sizes = (n * shards for n in lengths.values())
    hops = layouts.hops(call.mask, known, shards, *sizes)
    plan = Plan(Axes(sequence=axis), None, (), shards, strategy, hops, implementation)
    out, lse = _local(plan, dataclasses.replace(call, **changes))
    return (out, lse) if call.return_residual else out


def _call(query, key, value, bias, mask, options) -> tuple[AttentionCall, Any]:
    bound = _SIGNATURE.bind(query, key, value, bias, mask, **options)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    implementation = registry.check_names(arguments.pop("implementation"))
    call, lead = normalize(**arguments)
    if call.stored is not None:
        raise ValueError("key takes an array, got a cache: attend to it within shard_map")
    if len(lead) != 1:
        raise ValueError(f"query takes [B, T, N, H], got batch dimensions {lead}")
    return call, implementation


def _problem(call: AttentionCall, axes: Axes, mesh: Any) -> costs.Problem:
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


def _costs(call, axes, mesh, layout, links) -> list[costs.Cost]:
    shards = axes.size(mesh, "sequence")
    known = None if call.q_positions is not None or call.kv_positions is not None else layout
    return costs.costs(_problem(call, axes, mesh), call.mask, known, shards, links)


def _plan(
    call: AttentionCall, axes: Axes, mesh, strategy, layout, links, implementation
) -> tuple[Plan, AttentionCall]:
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
        known = layout if call.q_positions is None and call.kv_positions is None else None
        by_cost = _costs(call, axes, mesh, layout, links or costs.Links())
        refusals = {cost.strategy: cost.refusal for cost in by_cost}
        if strategy is None:
            strategy = by_cost[0].strategy
        if refusals[strategy]:
            raise NotImplementedError(f'strategy "{strategy}" {refusals[strategy]}')
        hops = layouts.hops(call.mask, known, shards, call.q_len, call.kv_len)
        call = _with_positions(call, layout, shards)
    return Plan(axes, mesh, taken, shards, strategy, hops, implementation), call


def _with_positions(call: AttentionCall, layout: str, shards: int) -> AttentionCall:
    """Says where tokens are, which a shard does not know by their slots."""
    if not layouts.speaks_of_positions(call.mask) and call.alibi_slopes is None:
        return call
    changes = {}
    for name, length in (("q_positions", call.q_len), ("kv_positions", call.kv_len)):
        if getattr(call, name) is None:
            changes[name] = jnp.asarray(layouts.positions(layout, shards, length))[None]
    return dataclasses.replace(call, **changes)


def _local(plan: Plan, call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """What one device does."""
    axes = plan.axes
    call = dataclasses.replace(call, return_residual=True)
    if call.dropout_key is not None:
        call = _with_own_bits(call, axes)
    call = heads.own(call, axes, plan.mesh, plan.kv_axes)

    def run(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
        out, lse = registry.attend(call, registry.plan(call, plan.implementation))
        if lse is None:
            raise NotImplementedError("this implementation has no LSE")
        return out, lse

    if plan.strategy is None:
        return run(call)
    if plan.strategy == "gather":
        return gather.attend(call, axes.sequence, run)
    if plan.strategy == "ulysses":
        return ulysses.attend(call, axes.sequence, plan.shards, run)
    chosen = registry.plan(call, plan.implementation)
    chosen = tuple((p, name if name in flash.NAMES else "xla_chunked") for p, name in chosen)
    ways = flash.ways(call, chosen)
    return ring.attend(ring.Ring(axes.sequence, plan.shards, plan.hops, ways), call)


def _with_own_bits(call: AttentionCall, axes: Axes) -> AttentionCall:
    """Dropout's bits belong to rows, heads and slots, which every device counts from 0."""
    names = [n for what in ("batch", "heads") for n in names_of(what, getattr(axes, what))]
    names += names_of("sequence", axes.sequence)
    if call.broadcast_dropout or not names:
        return call
    index = lax.axis_index(tuple(names)).astype(jnp.uint32)
    mixed = index * np.uint32(0x85EBCA6B)
    return dataclasses.replace(call, dropout_key=call.dropout_key ^ jnp.stack([mixed, index]))
