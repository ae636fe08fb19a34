"""Shards of the sequence become shards of the heads, and back (DeepSpeed Ulysses,
arXiv:2309.14509). Inside ``shard_map``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from axattn import _mask_parts as parts
from axattn._call import AttentionCall
from axattn._masks import Mask
from axattn._sharded.gather import Results, whole
from axattn._typing import present


def refuses(num_heads: int, num_kv_heads: int, shards: int) -> str | None:
    """Why heads (of one shard of them) cannot be shared out further."""
    if num_heads % shards:
        return f"needs query heads in multiples of {shards}, got {num_heads}"
    if num_kv_heads % shards and shards % num_kv_heads:
        return (
            f"needs key/value heads that divide {shards} or are a multiple of it, got "
            f"{num_kv_heads}"
        )
    return None


def attend(
    call: AttentionCall, axis: str, shards: int, run: Callable[[AttentionCall], Results]
) -> Results:
    """``run`` of all tokens with this shard's part of the heads."""
    here = lax.axis_index(axis)

    def by_heads(array: jax.Array) -> jax.Array:
        """``[B, t, n, size]`` of this shard's tokens as ``[B, T, n / shards, size]``."""
        return lax.all_to_all(array, axis, split_axis=2, concat_axis=1, tiled=True)

    def of_keys(array: jax.Array) -> jax.Array:
        # A head that several shards share is sent to each of them, once.
        copies = max(1, shards // array.shape[2])
        return by_heads(jnp.repeat(array, copies, axis=2) if copies > 1 else array)

    def own(array: jax.Array | None, dim: int = 0) -> jax.Array | None:
        """This shard's heads of what every shard has for all of them."""
        if array is None or array.shape[dim] == 1:
            return array
        size = array.shape[dim] // shards
        return lax.dynamic_slice_in_dim(array, here * size, size, dim)

    def like_scores(array: jax.Array | None) -> jax.Array | None:
        """``[B, n or 1, t or 1, S or 1]`` with all rows, of this shard's heads."""
        if array is None or (array.shape[2] == 1 and call.q_len > 1):
            return own(array, 1)
        if array.shape[1] == 1:
            return whole(array, axis, 2)
        return lax.all_to_all(array, axis, split_axis=1, concat_axis=2, tiled=True)

    def part(one: parts.Part) -> parts.Part:
        if isinstance(one, parts.Segments):
            return parts.Segments(whole(one.q_ids, axis), whole(one.kv_ids, axis))
        return parts.Dense(present(like_scores(one.array))) if isinstance(one, parts.Dense) else one

    out, lse = run(
        dataclasses.replace(
            call,
            query=by_heads(call.query),
            key=of_keys(present(call.key)),
            value=of_keys(present(call.value)),
            bias=like_scores(call.bias),
            sinks=own(call.sinks),
            alibi_slopes=own(call.alibi_slopes, 1),
            mask=Mask(tuple(map(part, call.mask.parts))),
        )
    )

    def by_tokens(array: jax.Array) -> jax.Array:
        return lax.all_to_all(array, axis, split_axis=1, concat_axis=2, tiled=True)

    return by_tokens(out), by_tokens(lse)
