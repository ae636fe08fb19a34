"""A call's mask in the forms that kernels read.

There are four: a pair of bounds per query row, for causal, windows, prefixes and lengths (the row
attends to positions in [low, high)); positions per key (a key that is masked for all rows is far
away); ids of queries and keys (segments); tiles of a boolean [T, S] array.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import TypeGuard

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn._mask_parts import Causal, Dense, Lengths, Prefix, Static, Window, as_column
from axattn._masks import find_kv_lengths
from axattn._stored import UNUSED_POSITION

# Each query row attends to positions in [low, high); int32 ``[B or 1, T]`` both.
RowBounds = tuple[jax.Array | None, jax.Array]


def fold_key_masks(call: AttentionCall) -> AttentionCall:
    """Turn key masks, and lengths of given positions, into key positions far from every query."""
    folded = [part for part in call.mask.parts if is_key_mask(part)]
    if not folded and call.kv_positions is None:
        return call
    _, kv = call.spans()
    positions = kv.positions
    for part in folded:
        used = jnp.broadcast_to(part.array[:, 0, 0], (len(part.array), call.kv_len))
        positions = jnp.where(used, positions, UNUSED_POSITION)
    length = find_kv_lengths(call.mask)
    if length is not None:
        positions = jnp.where(kv.slots[None] < _as_column(length), positions, UNUSED_POSITION)
    parts = tuple(part for part in call.mask.parts if part not in folded)
    return dataclasses.replace(
        call,
        kv_positions=positions,
        mask=dataclasses.replace(call.mask, parts=parts),
    )


def compute_row_bounds(call: AttentionCall) -> RowBounds:
    """Return ``(low, high)``, int32 ``[B or 1, T]``: a row attends to positions in [low, high).

    ``low`` is None without a lower bound. The call has no key masks (`fold_key_masks`).
    """
    q, _ = call.spans()
    positions = q.positions
    low = None
    high = jnp.full_like(positions, call.kv_len if call.kv_positions is None else UNUSED_POSITION)
    for part in call.mask.parts:
        if isinstance(part, Causal):
            high = jnp.minimum(high, positions + _as_column(part.offset) + 1)
        elif isinstance(part, Window):
            if part.left is not None:
                left = positions - part.left
                low = left if low is None else jnp.maximum(low, left)
            if part.right is not None:
                high = jnp.minimum(high, positions + part.right + 1)
        elif isinstance(part, Prefix):
            high = jnp.minimum(high, jnp.maximum(_as_column(part.length), positions + 1))
        elif isinstance(part, Lengths):
            if part.kv is not None and call.kv_positions is None:
                high = jnp.minimum(high, _as_column(part.kv))
            if part.q is not None:
                high = jnp.where(q.slots[None] < _as_column(part.q), high, -UNUSED_POSITION)
        elif is_row_mask(part):
            high = jnp.where(part.array[:, 0, :, 0], high, -UNUSED_POSITION)
    return low, high


def may_have_empty_rows(call: AttentionCall) -> bool:
    """Say whether a row may have no keys; False where the mask's structure rules it out.

    True costs a copy of ``dout``.
    """
    if any(x is not None for x in (call.q_positions, call.kv_positions, call.bias)):
        return True
    for part in call.mask.parts:
        if isinstance(part, Causal):
            if not isinstance(part.offset, Static) or part.offset < 0:
                return True
        elif isinstance(part, Window):
            if call.q_len > call.kv_len:
                return True
        elif not isinstance(part, Prefix):
            return True
    return False


def merge_dense_masks(call: AttentionCall) -> jax.Array | None:
    """Join the call's mask arrays over queries and keys to one, or None."""
    arrays = list_dense_masks(call)
    return functools.reduce(operator.and_, arrays) if arrays else None


def list_dense_masks(call: AttentionCall) -> list[jax.Array]:
    """Return the call's mask arrays over queries and keys."""
    dense = [part for part in call.mask.parts if isinstance(part, Dense)]
    return [part.array for part in dense if not (is_key_mask(part) or is_row_mask(part))]


def is_key_mask(part: object) -> TypeGuard[Dense]:
    """Say whether a part is an array ``[B, 1, 1, S]``, the same for every query and head."""
    return isinstance(part, Dense) and part.array.shape[1:3] == (1, 1)


def is_row_mask(part: object) -> TypeGuard[Dense]:
    """Say whether a part is an array ``[B, 1, T, 1]``, the same for every key and head."""
    return isinstance(part, Dense) and part.array.shape[1::2] == (1, 1) and not is_key_mask(part)


def _as_column(per_row) -> jax.Array:
    return as_column(jnp.asarray(per_row, jnp.int32))
