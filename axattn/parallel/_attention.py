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
    """Compute `axattn.dot_product_attention` on the devices of a mesh.

    Each device runs its own part, kernels too: the partitioner does not see it. Differentiable like
    that function.

    Args:
      query, key, value: ``[..., T, N, H]``, ``[..., S, K, H]``, ``[..., S, K, h]``: the whole
        arrays, sharded already or not.
      bias: broadcastable to ``[..., N, T, S]``.
      mask: an `axattn.Mask`, or an array broadcastable to ``[..., N, T, S]``.
      axes: the axes of the mesh that shard the call. Where those of the heads have more shards than
        K, the leading ones that divide K shard keys and values, which are the same on the others.
      mesh: by default that of the context (``jax.set_mesh``).
      strategy: for a sharded sequence "ring" (keys and values travel,
        https://arxiv.org/abs/2310.01889), "gather" (every device gets them) or "ulysses" (shards of
        tokens become shards of heads, https://arxiv.org/abs/2309.14509). None takes the cheapest
        by a cost model, see `explain`.
      layout: the order of the tokens: "contiguous", or "zigzag" (see `positions`), which gives
        every device the same work under causal masks. Causal masks, windows, prefixes and ALiBi go
        by the positions of the tokens; lengths, segment ids, biases and dense masks by their slots.
      links: rates for the cost model; a TPU v5p's by default.
      **options: as in `axattn.dot_product_attention`. Dropout draws other bits than on one device.

    Returns:
      ``[..., T, N, h]``, with ``return_residual`` also the LSE ``[..., T, N]``; sharded as the
      query is.

    Raises:
      ValueError: as `axattn.dot_product_attention`; an axis that the mesh does not have, sizes that
        the axes do not divide, or no mesh.
      TypeError: as `axattn.dot_product_attention`.
      NotImplementedError: the strategy or the implementation does not support the call.

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
    tokens = _TokenLayout(layout, axes.size(mesh, "sequence"))
    parsed = AttentionOptions.parse("attention", bias=bias, mask=mask, **options)
    call, lead, implementation = _make_call(query, key, value, parsed, tokens)
    plan = program.plan_call(
        call,
        axes,
        mesh,
        strategy=strategy,
        layout=layout,
        links=links,
        implementation=implementation,
    )
    return _restore_batch(call, lead, *program.run_mesh_plan(plan, call))


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
    """Estimate what each strategy would cost, the cheapest first. Each prints as one line.

    Nothing is computed.

    Args:
      query, key, value, bias, mask: as in `attention`, arrays or ``jax.ShapeDtypeStruct``.
      axes, mesh, layout: as in `attention`.
      links: rates of the devices; a TPU v5p's by default.
      **options: as in `attention`.

    Returns:
      The forward cost of each strategy on one device. It has ``strategy``, ``refusal`` (why it does
      not support the call, or None), ``flops``, the bytes that are ``sent`` and that are ``held``
      of other devices' keys and values, and ``seconds`` by arithmetic.

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
    mesh, ranking = find_mesh(mesh), []
    axes.check(mesh)
    tokens = _TokenLayout(layout, axes.size(mesh, "sequence"))
    arguments = dict(query=query, key=key, value=value, bias=bias, mask=mask, **options)

    def compare(query, key, value, **options):
        parsed = AttentionOptions.parse("explain", **options)
        call, _, implementation = _make_call(query, key, value, parsed, tokens)
        ranking.extend(program.compare_strategies(call, axes, mesh, layout, links, implementation))

    trace_shapes(compare, arguments)
    return ranking


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
    """Compute `attention` inside a ``jax.shard_map``, from this shard's tokens to all tokens.

    Args:
      query, key, value: ``[B, t, N, H]``, ``[B, s, K, H]``, ``[B, s, K, h]`` of this shard.
      bias: takes None only; for one, ``[..., N, T, S]``, use `attention`.
      mask: an `axattn.Mask` without a dense part.
      axis: the mesh axis that shards the sequence.
      strategy: "ring" (https://arxiv.org/abs/2310.01889), "gather" or "ulysses"
        (https://arxiv.org/abs/2309.14509).
      layout: as in `attention`.
      **options: as in `axattn.dot_product_attention`. Segment ids and positions are those of this
        shard, lengths those of the whole sequence.

    Returns:
      ``[B, t, N, h]`` of this shard, with ``return_residual`` also the LSE ``[B, t, N]``.

    Raises:
      ValueError, TypeError: as `attention`; an unknown strategy.
      NotImplementedError: as `attention`; a bias or a dense mask.

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
    tokens = _TokenLayout(layout, shards, lax.axis_index(axis))
    parsed = AttentionOptions.parse("local_attention", bias=bias, mask=mask, **options)
    call, lead, implementation = _make_call(query, key, value, parsed, tokens)
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
    return _restore_batch(call, lead, *program.run_shard(plan, call))


class _TokenLayout(NamedTuple):
    """The layout of a call's tokens: of the whole sequence, or of one ``shard``."""

    layout: str
    shards: int
    shard: jax.Array | None = None

    def compute_positions(self, length: int) -> jax.Array:
        """Return the positions of the call's ``length`` tokens."""
        whole = length if self.shard is None else length * self.shards
        if self.shards > 1:
            layouts.check_length(self.layout, self.shards, whole)
        first = 0 if self.shard is None else self.shard * length
        slots = first + jnp.arange(length, dtype=jnp.int32)
        return layouts.compute_positions(self.layout, slots, self.shards, whole)


def _restore_batch(call: AttentionCall, lead: tuple[int, ...], out: Array, lse: Array) -> Any:
    out = out.reshape(*lead, *out.shape[1:])
    return (out, lse.reshape(*lead, *lse.shape[1:])) if call.return_residual else out


def _make_call(
    query: Any, key: Any, value: Any, options: AttentionOptions, tokens: _TokenLayout
) -> tuple[AttentionCall, tuple[int, ...], tuple[str, ...] | None]:
    implementation = registry.check_names(options.implementation)
    call, lead = normalize(query, key, value, options)
    if options.q_offset is not None:
        # The offset is added to the positions of the tokens, not to their slots.
        shift = tokens.compute_positions(call.q_len) - jnp.arange(call.q_len, dtype=jnp.int32)
        call = dataclasses.replace(call, q_positions=present(call.q_positions) + shift[None])
    return call, lead, implementation
