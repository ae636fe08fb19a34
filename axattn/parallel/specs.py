"""PartitionSpecs of an attention call's arrays."""

from __future__ import annotations

import dataclasses

from jax.sharding import PartitionSpec

from axattn import mask_parts as parts
from axattn.call import AttentionCall
from axattn.masks import Mask
from axattn.parallel.axes import Axes, Names


def of_call(call: AttentionCall, axes: Axes, kv_heads: Names) -> AttentionCall:
    """The call with a spec in the place of each array; ``kv_heads``: the axes of K."""
    tokens = axes.batch, axes.sequence

    def spec(array, *names):
        if array is None:
            return None
        shape = getattr(array, "shape", ())
        return PartitionSpec(*(None if n == 1 else a for n, a in zip(shape, names, strict=False)))

    return dataclasses.replace(
        call,
        query=PartitionSpec(*tokens, axes.heads, None),
        key=PartitionSpec(*tokens, kv_heads, None),
        value=PartitionSpec(*tokens, kv_heads, None),
        bias=spec(call.bias, axes.batch, axes.heads, axes.sequence, None),
        mask=Mask(tuple(_of_part(part, axes, spec) for part in call.mask.parts)),
        sinks=spec(call.sinks, axes.heads),
        traced_scale=spec(call.traced_scale),
        alibi_slopes=spec(call.alibi_slopes, axes.heads),
        q_positions=spec(call.q_positions, *tokens),
        kv_positions=spec(call.kv_positions, *tokens),
        dropout_key=spec(call.dropout_key),
        first_row=PartitionSpec(),
    )


def _of_part(part: parts.Part, axes: Axes, spec) -> parts.Part:
    names = {
        "q_ids": (axes.batch, axes.sequence),
        "kv_ids": (axes.batch, axes.sequence),
        "array": (axes.batch, axes.heads, axes.sequence, None),
    }
    changes = {
        name: spec(getattr(part, name), *names.get(name, (axes.batch,)))
        for name in part.batched_arrays()
        if not isinstance(getattr(part, name), parts.Static | None)
    }
    return dataclasses.replace(part, **changes)


def of_results(axes: Axes) -> tuple[PartitionSpec, PartitionSpec]:
    """Of the output ``[B, T, N, h]`` and the LSE ``[B, T, N]``."""
    lse = PartitionSpec(axes.batch, axes.sequence, axes.heads)
    return PartitionSpec(*lse, None), lse
