"""Calls whose arrays say by their types how they are sharded (JAX's Explicit mesh axes).

The axes of the query's type are the `Axes` of the call, so that every device runs its own part.
"""

from __future__ import annotations

import functools

import jax
from jax.sharding import PartitionSpec

from axattn._jax_compat import explicit_sharding, with_auto_axes
from axattn.call import AttentionCall
from axattn.implementations import registry
from axattn.parallel import layouts, program
from axattn.parallel.axes import Axes


def attend(
    call: AttentionCall, implementation: tuple[str, ...] | None
) -> tuple[jax.Array, jax.Array | None]:
    """Output ``[B, T, N, h]`` and LSE ``[B, T, N]`` of a call whose query has Explicit axes."""
    plan = _plan(call, implementation)
    if plan is None:
        return _by_partitioner(call, implementation)
    return program.run(plan, call, "contiguous")


def _plan(call: AttentionCall, implementation) -> program.Plan | None:
    """None for what is left to the partitioner: caches, and sizes that cannot be cut alike."""
    mesh, (batch, sequence, heads, _) = explicit_sharding(call.query)
    if call.stored is not None or isinstance(sequence, tuple) and len(sequence) > 1:
        return None
    if isinstance(sequence, tuple):
        sequence = sequence[0] if sequence else None
    axes = Axes(batch, heads, sequence)
    try:
        for length in (call.q_len, call.kv_len):
            layouts.runs("contiguous", axes.size(mesh, "sequence"), length)
        return program.plan(call, axes, mesh, implementation=implementation)
    except ValueError:
        return None


def _by_partitioner(call: AttentionCall, implementation) -> tuple[jax.Array, jax.Array | None]:
    def attend(call):
        return registry.attend(call, registry.plan(call, implementation))

    arrays = (call.query, call.key, call.value) if call.stored is None else (call.query,)
    out_specs = functools.partial(_out_specs, return_residual=call.return_residual)
    return with_auto_axes(attend, arrays, out_specs)(call)


def _out_specs(query: tuple, return_residual: bool) -> tuple:
    """Shardings of (out, lse): those of the query's ``[B, T, N]``, the value head size whole."""
    lse = PartitionSpec(*query[:3])
    return PartitionSpec(*query[:3], None), lse if return_residual else None
