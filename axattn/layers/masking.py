"""Masks as layers are given them, and as arrays for what cannot take their structure."""

from __future__ import annotations

import jax.numpy as jnp

from axattn._typing import Array, Bool
from axattn.masks import Mask


def as_given(mask: Array | Mask | None) -> Bool[Array, "..."] | Mask | None:
    """Flax's masks have any dtype, nonzero is "attend": such a one as bool, others as they are."""
    if mask is None or isinstance(mask, Mask):
        return mask
    return jnp.asarray(mask).astype(bool)


def as_array(
    mask: Mask,
    batch: tuple[int, ...],
    q_len: int,
    kv_len: int,
    *,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> Bool[Array, "..."]:
    """``mask`` as an array [*batch, N or 1, T, S].

    Positions are [T] and [S], or [B, T] and [B, S] with the batch flattened.
    """
    mask = mask.normalized(batch, q_len, kv_len)
    array = mask.materialize(q_len, kv_len, q_positions=q_positions, kv_positions=kv_positions)
    if array.shape[0] == 1:
        return jnp.broadcast_to(array[0], (*batch, *array.shape[1:]))
    return array.reshape(*batch, *array.shape[1:])
