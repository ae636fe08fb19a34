"""Calls whose arrays have shardings in their types (JAX's Explicit mesh axes).

The axes of the query's type become the `Axes` of the call, so that every device runs its own part.
"""

from __future__ import annotations

import functools

import jax
from jax.sharding import PartitionSpec

from axattn._call import AttentionCall
from axattn._implementations import registry
from axattn._jax_compat import allow_auto_axes, find_explicit_sharding
from axattn._sharded import program
from axattn._sharded.axes import Axes
from axattn._typing import present


def attend_explicit(
    call: AttentionCall, implementation: tuple[str, ...] | None
) -> tuple[jax.Array, jax.Array | None]:
    """Return output ``[B, T, N, h]`` and LSE ``[B, T, N]``; the query has Explicit axes."""
    plan = _plan_shards(call, implementation)
    if isinstance(plan, program.MeshPlan):
        return program.run_mesh_plan(plan, call)
    try:
        return _run_partitioner(call, implementation)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error}. It is left to the partitioner since {plan}") from None


def _plan_shards(call: AttentionCall, implementation) -> program.MeshPlan | str:
    """Return the plan, or why the call is left to the partitioner."""
    mesh, (batch, sequence, heads, _) = present(find_explicit_sharding(call.query))
    if call.stored is not None:
        return "key is a cache: ShardedCache needs no partitioner"
    if isinstance(sequence, tuple):
        if len(sequence) > 1:
            return f"the sequence of query has several mesh axes, {sequence}"
        sequence = sequence[0] if sequence else None
    if sequence is None and any(_shards_key_slots(present(x)) for x in (call.key, call.value)):
        # One step over sharded keys: do not move them.
        return "keys have a mesh axis for their sequence that queries have not"
    try:
        return program.plan_call(
            call, Axes(batch, heads, sequence), mesh, implementation=implementation
        )
    except ValueError as error:
        return str(error)


def _shards_key_slots(array: jax.Array) -> bool:
    sharding = find_explicit_sharding(array)
    return sharding is not None and sharding[1][1] not in (None, ())


@functools.partial(jax.jit, static_argnames="implementation")
def _run_partitioner(call: AttentionCall, implementation) -> tuple[jax.Array, jax.Array | None]:
    def attend_unsharded(call):
        return registry.run_plan(call, registry.make_plan(call, implementation))

    arrays = (call.query, call.key, call.value) if call.stored is None else (call.query,)
    out_specs = functools.partial(_make_out_specs, return_residual=call.return_residual)
    return allow_auto_axes(attend_unsharded, arrays, out_specs)(call)


def _make_out_specs(query: tuple, return_residual: bool) -> tuple:
    """Return shardings of output and LSE: the query's; the value head size is not sharded."""
    lse = PartitionSpec(*query[:3])
    return PartitionSpec(*query[:3], None), lse if return_residual else None
