"""Calls whose arrays say by their types how they are sharded (JAX's Explicit mesh axes).

The axes of the query's type are the `Axes` of the call, so that every device runs its own part.
"""

from __future__ import annotations

import functools

import jax
from jax.sharding import PartitionSpec

from axattn._call import AttentionCall
from axattn._implementations import registry
from axattn._jax_compat import explicit_sharding, with_auto_axes
from axattn._sharded import program
from axattn._sharded.axes import Axes
from axattn._typing import present


def attend(
    call: AttentionCall, implementation: tuple[str, ...] | None
) -> tuple[jax.Array, jax.Array | None]:
    """Output ``[B, T, N, h]`` and LSE ``[B, T, N]`` of a call whose query has Explicit axes."""
    plan = _plan(call, implementation)
    if isinstance(plan, program.Plan):
        return program.run(plan, call)
    try:
        return _by_partitioner(call, implementation)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error}. It is left to the partitioner since {plan}") from None


def _plan(call: AttentionCall, implementation) -> program.Plan | str:
    """Or why the call is left to the partitioner."""
    mesh, (batch, sequence, heads, _) = present(explicit_sharding(call.query))
    if call.stored is not None:
        return "key is a cache: ShardedCache needs no partitioner"
    if isinstance(sequence, tuple):
        if len(sequence) > 1:
            return f"the sequence of query has several mesh axes, {sequence}"
        sequence = sequence[0] if sequence else None
    if sequence is None and any(_shares_out_slots(present(x)) for x in (call.key, call.value)):
        # A step over keys that are shared out: these are not to be moved.
        return "keys have a mesh axis for their sequence that queries have not"
    try:
        return program.plan(call, Axes(batch, heads, sequence), mesh, implementation=implementation)
    except ValueError as error:
        return str(error)


def _shares_out_slots(array: jax.Array) -> bool:
    found = explicit_sharding(array)
    return found is not None and found[1][1] not in (None, ())


@functools.partial(jax.jit, static_argnames="implementation")
def _by_partitioner(call: AttentionCall, implementation) -> tuple[jax.Array, jax.Array | None]:
    def attend(call):
        return registry.run_plan(call, registry.make_plan(call, implementation))

    arrays = (call.query, call.key, call.value) if call.stored is None else (call.query,)
    out_specs = functools.partial(_out_specs, return_residual=call.return_residual)
    return with_auto_axes(attend, arrays, out_specs)(call)


def _out_specs(query: tuple, return_residual: bool) -> tuple:
    """Shardings of (out, lse): those of the query's ``[B, T, N]``, the value head size whole."""
    lse = PartitionSpec(*query[:3])
    return PartitionSpec(*query[:3], None), lse if return_residual else None
