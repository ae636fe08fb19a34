"""Attention over a mesh, `attention`, and over the shards of a sequence, `local_attention`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax

from axattn._arguments import normalize, trace_shapes
from axattn._call import AttentionCall
from axattn._implementations import registry
from axattn._mask_parts import Dense
from axattn._masks import Mask
from axattn._options import AttentionOptions
from axattn._sharded import costs, layouts, program
from axattn._sharded.axes import Axes, find_mesh
from axattn._typing import Array, ArrayLike, Layout, Strategy, present


@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | Mask | None = ...,
    *,
    axes: Axes,
    mesh: Any = ...,
    strategy: Strategy | None = ...,
    layout: Layout = ...,
    links: costs.Links | None = ...,
    return_residual: Literal[False] = ...,
    **options: Any,
) -> Array: ...


@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | Mask | None = ...,
    *,
    axes: Axes,
    mesh: Any = ...,
    strategy: Strategy | None = ...,
    layout: Layout = ...,
    links: costs.Links | None = ...,
    return_residual: Literal[True],
    **options: Any,
) -> tuple[Array, Array]: ...


@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | Mask | None = ...,
    *,
    axes: Axes,
    mesh: Any = ...,
    strategy: Strategy | None = ...,
    layout: Layout = ...,
    links: costs.Links | None = ...,
    return_residual: bool,
    **options: Any,
) -> Array | tuple[Array, Array]: ...


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | Mask | None = None,
    *,
    axes: Axes,
    mesh: Any = None,
    strategy: Strategy | None = None,
    layout: Layout = "contiguous",
    links: costs.Links | None = None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """`axattn.dot_product_attention` of arrays that are shared out over a mesh.

    Each device runs its own part, kernels too: the partitioner never sees them whole.
    Differentiable as there.

    Args:
      query, key, value: as there: ``[..., T, N, H]``, ``[..., S, K, H]``, ``[..., S, K, h]``, all
        of them; shared out already or not.
      bias: broadcastable to ``[..., N, T, S]``.
      mask: an `axattn.Mask`, or an array broadcastable to ``[..., N, T, S]``.
      axes: which axes of the mesh share out what. Where the heads' are more than K, keys and values
        are shared out over as many as go into K, and the same on the others.
      mesh: by default that of the context (``jax.set_mesh``).
      strategy: where a sequence is shared out: "ring" (keys and values travel,
        https://arxiv.org/abs/2310.01889), "gather" (all get them) or "ulysses" (shards of tokens
        become shards of heads, https://arxiv.org/abs/2309.14509); None: the cheapest by arithmetic,
        see `explain`.
      layout: where the tokens are: "contiguous", or "zigzag" (the order of `positions`), which
        leaves every device the same work under causal masks. Masks, windows and ALiBi know.
        Lengths, segment ids, biases and dense masks speak of slots, as they lie.
      links: what `explain` reckons with; a TPU v5p's by default.
      **options: as there. Dropout draws other bits than on one device.

    Returns:
      ``[..., T, N, h]``, with ``return_residual`` also the LSE ``[..., T, N]``, as there; shared
      out as the query is.

    Raises:
      ValueError: as there; an axis that the mesh does not have, sizes that the axes do not divide,
        no mesh.
      TypeError: as there.
      NotImplementedError: a strategy or an implementation that does not take the call.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn import parallel
      >>> auto = (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((jax.device_count(),), ("context",), axis_types=auto)
      >>> axes = parallel.Axes(sequence="context")
      >>> query, key = jnp.ones((1, 64, 4, 16)), jnp.ones((1, 64, 2, 16))
      >>> out = parallel.attention(query, key, key, axes=axes, mesh=mesh, is_causal=True)
      >>> out.shape  # each device has its part of the 64 tokens
      (1, 64, 4, 16)
    """
    mesh = find_mesh(mesh)
    axes.check(mesh)
    where = _Where(layout, axes.size(mesh, "sequence"))
    given = AttentionOptions.parse("attention", bias=bias, mask=mask, **options)
    call, lead, implementation = _call(query, key, value, given, where)
    plan = program.plan_call(
        call,
        axes,
        mesh,
        strategy=strategy,
        layout=layout,
        links=links,
        implementation=implementation,
    )
    return _results(call, lead, *program.run_mesh_plan(plan, call))


def explain(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    axes: Axes,
    mesh: Any = None,
    layout: Layout = "contiguous",
    links: costs.Links | None = None,
    **options: Any,
) -> list[costs.StrategyCost]:
    """What each strategy would cost, the cheapest first; print them.

    Nothing is computed.

    Args:
      query, key, value, bias, mask: as in `attention`, arrays or ``jax.ShapeDtypeStruct``.
      axes, mesh, layout: as in `attention`.
      links: rates of the devices; a TPU v5p's by default.
      **options: as in `attention`.

    Returns:
      A cost for each strategy, of one device, forward. It has ``strategy``, ``refusal`` (why it
      does not take the call, or None), ``sent`` and ``held`` bytes, ``flops``, and ``seconds`` by
      arithmetic.

    Raises:
      ValueError, TypeError: what `attention` would raise for these arguments.

    Example:
      >>> import jax
      >>> from axattn import parallel
      >>> mesh = jax.sharding.AbstractMesh((8,), ("context",))
      >>> q, kv = (jax.ShapeDtypeStruct((1, 65536, n, 128), "bfloat16") for n in (32, 4))
      >>> costs = parallel.explain(
      ...     q, kv, kv, axes=parallel.Axes(sequence="context"), mesh=mesh, is_causal=True
      ... )
      >>> {cost.strategy: round(cost.sent / 2**20) for cost in costs}  # MiB that a device sends
      {'ulysses': 140, 'ring': 112, 'gather': 112}
    """
    mesh, found = find_mesh(mesh), []
    axes.check(mesh)
    where = _Where(layout, axes.size(mesh, "sequence"))
    given = dict(query=query, key=key, value=value, bias=bias, mask=mask, **options)

    def look(query, key, value, **options):
        asked = AttentionOptions.parse("explain", **options)
        call, _, implementation = _call(query, key, value, asked, where)
        found.extend(program.compare_strategies(call, axes, mesh, layout, links, implementation))

    trace_shapes(look, given)
    return found


@overload
def local_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: Mask | None = ...,
    *,
    axis: str,
    strategy: Strategy = ...,
    layout: Layout = ...,
    return_residual: Literal[False] = ...,
    **options: Any,
) -> Array: ...


@overload
def local_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: Mask | None = ...,
    *,
    axis: str,
    strategy: Strategy = ...,
    layout: Layout = ...,
    return_residual: Literal[True],
    **options: Any,
) -> tuple[Array, Array]: ...


@overload
def local_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: Mask | None = ...,
    *,
    axis: str,
    strategy: Strategy = ...,
    layout: Layout = ...,
    return_residual: bool,
    **options: Any,
) -> Array | tuple[Array, Array]: ...


def local_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: Mask | None = None,
    *,
    axis: str,
    strategy: Strategy = "ring",
    layout: Layout = "contiguous",
    **options: Any,
) -> Array | tuple[Array, Array]:
    """`attention` inside a ``jax.shard_map``: this shard's tokens with those of all shards.

    Args:
      query, key, value: ``[B, t, N, H]``, ``[B, s, K, H]``, ``[B, s, K, h]`` of this shard.
      bias: None: one of the scores, ``[..., N, T, S]``, is for `attention`.
      mask: an `axattn.Mask` without a dense part.
      axis: the mesh axis that shares out the sequence.
      strategy: "ring" (https://arxiv.org/abs/2310.01889), "gather" or "ulysses"
        (https://arxiv.org/abs/2309.14509).
      layout: as in `attention`.
      **options: as in `axattn.dot_product_attention`; segment ids and positions are this shard's,
        lengths those of the whole sequence.

    Returns:
      ``[B, t, N, h]`` of this shard, with ``return_residual`` also the LSE ``[B, t, N]``.

    Raises:
      ValueError, TypeError: as `attention`; another strategy.
      NotImplementedError: as `attention`; and a bias or a dense mask.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec
      >>> from axattn import parallel
      >>> auto = (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((jax.device_count(),), ("context",), axis_types=auto)
      >>> attend = functools.partial(parallel.local_attention, axis="context", is_causal=True)
      >>> tokens = PartitionSpec(None, "context")
      >>> program = jax.shard_map(attend, mesh=mesh, in_specs=(tokens,) * 3, out_specs=tokens)
      >>> query, key = jnp.ones((1, 64, 4, 16)), jnp.ones((1, 64, 2, 16))
      >>> jax.jit(program)(query, key, key).shape
      (1, 64, 4, 16)
    """
    shards = lax.axis_size(axis)
    where = _Where(layout, shards, lax.axis_index(axis))
    given = AttentionOptions.parse("local_attention", bias=bias, mask=mask, **options)
    call, lead, implementation = _call(query, key, value, given, where)
    dense = any(isinstance(part, Dense) for part in call.mask.parts)
    if call.bias is not None or dense:
        raise NotImplementedError("bias and dense masks are for parallel.attention, not for this")
    if strategy not in costs.STRATEGIES:
        raise ValueError(f"strategy takes one of {costs.STRATEGIES}, got {strategy!r}")
    program.check_strategy(
        strategy, call.num_heads, call.num_kv_heads, shards, call, implementation
    )
    sizes = (call.q_len * shards, call.kv_len * shards)
    known_layout = program.get_known_layout(call, layout)
    distances = layouts.list_ring_distances(call.mask, known_layout, shards, *sizes)
    plan = program.MeshPlan(
        Axes(sequence=axis), None, (), shards, strategy, layout, distances, implementation
    )
    return _results(call, lead, *program.run_shard(plan, call))


class _Where(NamedTuple):
    """Where the tokens of a call are; ``shard``: it has those of this one, not of all."""

    layout: str
    shards: int
    shard: jax.Array | None = None

    def positions(self, length: int) -> jax.Array:
        """Of the call's ``length`` tokens."""
        whole = length if self.shard is None else length * self.shards
        if self.shards > 1:
            layouts.check_length(self.layout, self.shards, whole)
        first = 0 if self.shard is None else self.shard * length
        slots = first + jnp.arange(length, dtype=jnp.int32)
        return layouts.compute_positions(self.layout, slots, self.shards, whole)


def _results(call: AttentionCall, lead: tuple[int, ...], out: Array, lse: Array) -> Any:
    out = out.reshape(*lead, *out.shape[1:])
    return (out, lse.reshape(*lead, *lse.shape[1:])) if call.return_residual else out


def _call(
    query: Any, key: Any, value: Any, options: AttentionOptions, where: _Where
) -> tuple[AttentionCall, tuple[int, ...], tuple[str, ...] | None]:
    implementation = registry.check_names(options.implementation)
    call, lead = normalize(query, key, value, options)
    if options.q_offset is not None:
        # It counts from where the tokens are, not from their slots.
        further = where.positions(call.q_len) - jnp.arange(call.q_len, dtype=jnp.int32)
        call = dataclasses.replace(call, q_positions=present(call.q_positions) + further[None])
    return call, lead, implementation
