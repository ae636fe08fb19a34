"""PartitionSpecs of an attention call's arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from axattn import _mask_parts as parts
from axattn._call import AttentionCall
from axattn._masks import Mask
from axattn._sharded.axes import Axes, Names


def of_call(call: AttentionCall, axes: Axes, kv_heads: Names) -> AttentionCall:
    """The call with a spec in the place of each array; ``kv_heads``: the axes of K."""
    tokens = axes.batch, axes.sequence
    specs: dict[str, Any] = dict(
        query=PartitionSpec(*tokens, axes.heads, None),
        key=PartitionSpec(*tokens, kv_heads, None),
        value=PartitionSpec(*tokens, kv_heads, None),
        bias=spec(call.bias, axes.batch, axes.heads, axes.sequence, None),
        mask=of_mask(call.mask, axes),
        sinks=spec(call.sinks, axes.heads),
        traced_scale=spec(call.traced_scale),
        alibi_slopes=spec(call.alibi_slopes, axes.batch, axes.heads),
        q_positions=spec(call.q_positions, *tokens),
        kv_positions=spec(call.kv_positions, *tokens),
        dropout_key=spec(call.dropout_key),
        first_row=PartitionSpec(),
    )
    return dataclasses.replace(call, **specs)


def of_mask(mask: Mask, axes: Axes) -> Mask:
    """The normalized mask with a spec in the place of each array."""
    return Mask(tuple(_of_part(part, axes) for part in mask.parts))


def spec(array: jax.Array | None, *names: Names) -> PartitionSpec | None:
    """The spec of an array whose dimensions these axes share out, but for those of size 1."""
    if array is None:
        return None
    shape = getattr(array, "shape", ())
    return PartitionSpec(*(None if n == 1 else a for n, a in zip(shape, names, strict=False)))


def _of_part(part: parts.Part, axes: Axes) -> parts.Part:
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
