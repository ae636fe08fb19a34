"""PartitionSpecs of an attention call's arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from axattn import _mask_parts as parts
from axattn._call import AttentionCall
from axattn._masks import Mask
from axattn._sharded.axes import Axes, AxisNames


def make_call_specs(call: AttentionCall, axes: Axes, kv_heads: AxisNames) -> AttentionCall:
    """Return the call with a spec in place of each array. ``kv_heads`` are the axes of K."""
    tokens = axes.batch, axes.sequence
    specs: dict[str, Any] = dict(
        query=PartitionSpec(*tokens, axes.heads, None),
        key=PartitionSpec(*tokens, kv_heads, None),
        value=PartitionSpec(*tokens, kv_heads, None),
        bias=make_spec(call.bias, axes.batch, axes.heads, axes.sequence, None),
        mask=make_mask_specs(call.mask, axes),
        sinks=make_spec(call.sinks, axes.heads),
        traced_scale=make_spec(call.traced_scale),
        alibi_slopes=make_spec(call.alibi_slopes, axes.batch, axes.heads),
        q_positions=make_spec(call.q_positions, *tokens),
        kv_positions=make_spec(call.kv_positions, *tokens),
        dropout_key=make_spec(call.dropout_key),
        first_row=PartitionSpec(),
        first_head=PartitionSpec(),
    )
    return dataclasses.replace(call, **specs)


def make_mask_specs(mask: Mask, axes: Axes) -> Mask:
    """Return the normalized mask with a spec in place of each array."""
    return Mask(tuple(_make_part_specs(part, axes) for part in mask.parts))


def make_spec(array: jax.Array | None, *names: AxisNames) -> PartitionSpec | None:
    """Return the spec of an array, with one name per dimension. Size 1 is never sharded."""
    if array is None:
        return None
    shape = getattr(array, "shape", ())
    return PartitionSpec(*(None if n == 1 else a for n, a in zip(shape, names, strict=False)))


def _make_part_specs(part: parts.MaskPart, axes: Axes) -> parts.MaskPart:
    names = {
        "q_ids": (axes.batch, axes.sequence),
        "kv_ids": (axes.batch, axes.sequence),
        "array": (axes.batch, axes.heads, axes.sequence, None),
    }
    changes = {
        name: make_spec(getattr(part, name), *names.get(name, (axes.batch,)))
        for name in part.batched_arrays()
        if not isinstance(getattr(part, name), parts.Static | None)
    }
    return dataclasses.replace(part, **changes)


def make_result_specs(axes: Axes) -> tuple[PartitionSpec, PartitionSpec]:
    """Return the specs of the output ``[B, T, N, h]`` and the LSE ``[B, T, N]``."""
    lse = PartitionSpec(axes.batch, axes.sequence, axes.heads)
    return PartitionSpec(*lse, None), lse
