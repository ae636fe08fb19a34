"""Masks that layers are given, as booleans, and as arrays for functions that know no structure."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from axattn._masks import Mask, normalize_mask
from axattn._typing import Array, Bool
from axattn.cache._checks import is_concrete


def cast_mask(mask: Array | Mask | None) -> Bool[Array, "..."] | Mask | None:
    """Cast a mask array of any dtype to bool, nonzero being "attend"; return others unchanged.

    Raises:
      ValueError: it has the numbers of a bias (0 and -1e9 would mean the opposite). Numbers that
        are being traced are not known, and not checked.
    """
    if mask is None or isinstance(mask, Mask):
        return mask
    if is_concrete(mask):
        _check_no_bias(np.asarray(mask))
    return jnp.asarray(mask).astype(bool)


def _check_no_bias(mask: np.ndarray) -> None:
    """Raise ValueError where a mask has other numbers than 0 and 1."""
    if jnp.issubdtype(mask.dtype, jnp.floating):
        odd = mask[(mask != 0) & (mask != 1)]
    elif jnp.issubdtype(mask.dtype, jnp.signedinteger):
        odd = mask[mask < 0]
    else:
        return
    if odd.size:
        raise ValueError(
            "mask takes booleans, or 1 where to attend and 0 where not, got "
            f"{mask.dtype} with {float(odd.flat[0]):g} in it. What is added to logits is a bias: "
            "give dot_product_attention bias=..., or the layer mask=(bias == 0)"
        )


def materialize_mask(
    mask: Mask,
    batch: tuple[int, ...],
    q_len: int,
    kv_len: int,
    *,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> Bool[Array, "..."]:
    """Return ``mask`` as an array ``[*batch, N or 1, T, S]``.

    Positions are ``[T]`` and ``[S]``, or ``[B, T]`` and ``[B, S]`` with the batch flattened.
    """
    mask = normalize_mask(mask, batch, q_len, kv_len)
    array = mask.materialize(q_len, kv_len, q_positions=q_positions, kv_positions=kv_positions)
    if array.shape[0] == 1:
        return jnp.broadcast_to(array[0], (*batch, *array.shape[1:]))
    return array.reshape(*batch, *array.shape[1:])
