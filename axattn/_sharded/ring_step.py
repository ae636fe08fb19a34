"""A hop of the ring: the call of one shard's queries over another shard's keys."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn import _mask_parts as parts
from axattn._call import AttentionCall
from axattn._masks import Mask
from axattn._typing import present


class Moving(NamedTuple):
    """What travels from shard to shard: the key side of a call."""

    key: jax.Array  # [B, s, K, H]
    value: jax.Array  # [B, s, K, h]
    positions: jax.Array | None  # int32 [B or 1, s]
    ids: tuple[jax.Array, ...]  # int32 [B or 1, s], of each part of segments


def moving(call: AttentionCall) -> Moving:
    ids = tuple(part.kv_ids for part in call.mask.parts if isinstance(part, parts.Segments))
    return Moving(present(call.key), present(call.value), call.kv_positions, ids)


def shifted(tree, axis: str, shards: int, distance: int):
    """Every shard's ``tree`` on the shard that is ``distance`` further."""
    if distance % shards == 0:
        return tree
    pairs = [(r, (r + distance) % shards) for r in range(shards)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), tree)


def call_of(
    call: AttentionCall, keys: Moving, here: jax.Array, source: jax.Array, *, first: bool
) -> AttentionCall:
    """The local ``call`` of shard ``here`` over the keys of shard ``source``.

    Sinks count once: in the ``first`` hop.
    """
    q_len, kv_len = call.q_len, keys.key.shape[1]
    q_first, kv_first = here * q_len, source * kv_len
    ids = iter(keys.ids)

    def part(one: parts.Part) -> parts.Part:
        if isinstance(one, parts.Segments):
            return dataclasses.replace(one, kv_ids=next(ids))
        if isinstance(one, parts.Lengths):
            return parts.Lengths(_rest(one.q, q_first, q_len), _rest(one.kv, kv_first, kv_len))
        if isinstance(one, parts.Dense):
            return parts.Dense(columns(one.array, kv_first, kv_len))
        return one

    dropout_key = call.dropout_key
    if dropout_key is not None:
        # Bits belong to slots, which here are counted from 0 in every pair of shards.
        shards = jnp.stack([jnp.asarray(x, jnp.uint32) for x in (here, source)])
        dropout_key = dropout_key ^ (shards * jnp.uint32(0x9E3779B9))
    return dataclasses.replace(
        call,
        key=keys.key,
        value=keys.value,
        kv_positions=keys.positions,
        bias=None if call.bias is None else columns(call.bias, kv_first, kv_len),
        mask=Mask(tuple(part(one) for one in call.mask.parts)),
        sinks=call.sinks if first else None,
        dropout_key=dropout_key,
    )


def columns(array: jax.Array, first: jax.Array, size: int) -> jax.Array:
    """Key slots of ``[.., .., .., S or 1]``."""
    if array.shape[-1] == 1:
        return array
    return lax.dynamic_slice_in_dim(array, first, size, array.ndim - 1)


def _rest(length, first, size: int):
    """How many of a shard's slots are below ``length``."""
    return None if length is None else jnp.clip(length - first, 0, size)
