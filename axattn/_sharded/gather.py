"""All-gather of keys and values, cheap where query heads share them. Inside ``shard_map``.

Its gradient is a reduce-scatter: each shard gets the sum for its own keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import overload

import jax
from jax import lax

from axattn import _mask_parts as parts
from axattn._call import AttentionCall
from axattn._masks import Mask
from axattn._sharded import layouts
from axattn._sharded.combine import Results


@overload
def gather_shards(array: jax.Array, axis: str, dim: int = ...) -> jax.Array: ...


@overload
def gather_shards(array: jax.Array | None, axis: str, dim: int = ...) -> jax.Array | None: ...


def gather_shards(array: jax.Array | None, axis: str, dim: int = 1) -> jax.Array | None:
    """Return the parts of all shards, concatenated in order."""
    if array is None:
        return None
    return lax.all_gather(array, axis, axis=dim, tiled=True)


def run_gather(
    call: AttentionCall, axis: str, attend: Callable[[AttentionCall], Results]
) -> Results:
    """Attend from this shard's queries to the keys of all shards."""
    shard = lax.axis_index(axis)

    def gather_part(part: parts.MaskPart) -> parts.MaskPart:
        if isinstance(part, parts.Segments):
            return dataclasses.replace(part, kv_ids=gather_shards(part.kv_ids, axis))
        if isinstance(part, parts.Lengths) and part.q is not None:
            length = layouts.clip_length(part.q, shard * call.q_len, call.q_len)
            return dataclasses.replace(part, q=length)
        return part

    return attend(
        dataclasses.replace(
            call,
            key=gather_shards(call.key, axis),
            value=gather_shards(call.value, axis),
            mask=Mask(tuple(map(gather_part, call.mask.parts))),
        )
    )
