"""All-to-all from shards of the sequence to shards of the heads, and back. In ``shard_map``.

DeepSpeed Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from axattn import _mask_parts as parts
from axattn._call import AttentionCall
from axattn._masks import Mask
from axattn._sharded.combine import Results
from axattn._sharded.gather import gather_shards
from axattn._typing import present


def find_refusal(num_heads: int, num_kv_heads: int, shards: int) -> str | None:
    """Return why ``shards`` cannot share the heads of a device, or None."""
    if num_heads % shards:
        return f"needs query heads in multiples of {shards}, got {num_heads}"
    if num_kv_heads % shards and shards % num_kv_heads:
        return (
            f"needs key/value heads that divide {shards} or are a multiple of it, got "
            f"{num_kv_heads}"
        )
    return None


def run_ulysses(
    call: AttentionCall, axis: str, shards: int, attend: Callable[[AttentionCall], Results]
) -> Results:
    """Attend to all tokens with a part of the heads on each shard."""
    shard = lax.axis_index(axis)

    def scatter_heads(array: jax.Array) -> jax.Array:
        """Turn ``[B, t, n, size]`` of this shard's tokens into ``[B, T, n / shards, size]``."""
        return lax.all_to_all(array, axis, split_axis=2, concat_axis=1, tiled=True)

    def scatter_kv_heads(array: jax.Array) -> jax.Array:
        # Copies go to the shards that share the head: each gets it once.
        copies = max(1, shards // array.shape[2])
        return scatter_heads(jnp.repeat(array, copies, axis=2) if copies > 1 else array)

    def slice_heads(array: jax.Array | None, dim: int = 0) -> jax.Array | None:
        """Return this shard's heads of an array that has all heads on every shard."""
        if array is None or array.shape[dim] == 1:
            return array
        size = array.shape[dim] // shards
        return lax.dynamic_slice_in_dim(array, shard * size, size, dim)

    def scatter_scores(array: jax.Array | None) -> jax.Array | None:
        """Return all rows of ``[B, n or 1, t or 1, S or 1]``, for this shard's heads."""
        if array is None or (array.shape[2] == 1 and call.q_len > 1):
            return slice_heads(array, 1)
        if array.shape[1] == 1:
            return gather_shards(array, axis, 2)
        return lax.all_to_all(array, axis, split_axis=1, concat_axis=2, tiled=True)

    def scatter_part(part: parts.MaskPart) -> parts.MaskPart:
        if isinstance(part, parts.Segments):
            return parts.Segments(gather_shards(part.q_ids, axis), gather_shards(part.kv_ids, axis))
        if isinstance(part, parts.Dense):
            return parts.Dense(present(scatter_scores(part.array)))
        return part

    out, lse = attend(
        dataclasses.replace(
            call,
            query=scatter_heads(call.query),
            key=scatter_kv_heads(present(call.key)),
            value=scatter_kv_heads(present(call.value)),
            bias=scatter_scores(call.bias),
            sinks=slice_heads(call.sinks),
            alibi_slopes=slice_heads(call.alibi_slopes, 1),
            mask=Mask(tuple(map(scatter_part, call.mask.parts))),
        )
    )

    def gather_heads(array: jax.Array) -> jax.Array:
        return lax.all_to_all(array, axis, split_axis=1, concat_axis=2, tiled=True)

    return gather_heads(out), gather_heads(lse)
