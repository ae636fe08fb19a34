"""One ring step: the call of one shard's queries over another shard's keys."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn import _mask_parts as parts
from axattn._call import AttentionCall
from axattn._masks import Mask
from axattn._sharded import layouts
from axattn._typing import present


class KVShard(NamedTuple):
    """The key side of a call, which is sent from shard to shard."""

    key: jax.Array  # [B, s, K, H]
    value: jax.Array  # [B, s, K, h]
    positions: jax.Array | None  # int32 [B or 1, s]
    kv_ids: tuple[jax.Array, ...]  # int32 [B or 1, s], one for each part of segments


def get_kv_shard(call: AttentionCall) -> KVShard:
    """Return the keys that this shard has before the first step."""
    kv_ids = tuple(part.kv_ids for part in call.mask.parts if isinstance(part, parts.Segments))
    return KVShard(present(call.key), present(call.value), call.kv_positions, kv_ids)


def shift_shards(tree, axis: str, shards: int, distance: int):
    """Send the arrays of every shard to the shard ``distance`` further around the ring."""
    if distance % shards == 0:
        return tree
    pairs = [(r, (r + distance) % shards) for r in range(shards)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), tree)


def make_step_call(
    call: AttentionCall, kv: KVShard, shard: jax.Array, source: jax.Array, *, first: bool
) -> AttentionCall:
    """Return ``call`` of the queries of ``shard`` over the keys of shard ``source``.

    Sinks belong to the ``first`` step only.
    """
    q_len, kv_len = call.q_len, kv.key.shape[1]
    q_first, kv_first = shard * q_len, source * kv_len
    kv_ids = iter(kv.kv_ids)

    def localize_part(part: parts.MaskPart) -> parts.MaskPart:
        if isinstance(part, parts.Segments):
            return dataclasses.replace(part, kv_ids=next(kv_ids))
        if isinstance(part, parts.Lengths):
            return parts.Lengths(
                None if part.q is None else layouts.clip_length(part.q, q_first, q_len),
                None if part.kv is None else layouts.clip_length(part.kv, kv_first, kv_len),
            )
        if isinstance(part, parts.Dense):
            return parts.Dense(slice_key_slots(part.array, kv_first, kv_len))
        return part

    dropout_key = call.dropout_key
    if dropout_key is not None:
        # Every pair of shards counts its slots from 0, and needs bits of its own.
        shards = jnp.stack([jnp.asarray(x, jnp.uint32) for x in (shard, source)])
        dropout_key = dropout_key ^ (shards * jnp.uint32(0x9E3779B9))
    return dataclasses.replace(
        call,
        key=kv.key,
        value=kv.value,
        kv_positions=kv.positions,
        bias=None if call.bias is None else slice_key_slots(call.bias, kv_first, kv_len),
        mask=Mask(tuple(map(localize_part, call.mask.parts))),
        sinks=call.sinks if first else None,
        dropout_key=dropout_key,
    )


def slice_key_slots(array: jax.Array, first: jax.Array, size: int) -> jax.Array:
    """Return ``size`` key slots of an array ``[.., .., .., S or 1]``."""
    if array.shape[-1] == 1:
        return array
    return lax.dynamic_slice_in_dim(array, first, size, array.ndim - 1)
