"""Rotary embedding of a layer's queries and keys."""

from __future__ import annotations

import jax.numpy as jnp

from axattn._rotary import RotaryEmbedding
from axattn._typing import Array, Float, Integer


def rotate_query_key(
    rope: RotaryEmbedding | None,
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    positions: Integer[Array, "*leading T"] | None,
    kv_positions: Integer[Array, "*leading S"] | None,
    first: Integer[Array, ""] | int = 0,
) -> tuple[Float[Array, "*batch T N H"], Float[Array, "*batch S K H"]]:
    """Apply ``rope`` to queries and keys; without one, return them unchanged.

    Args:
      rope: the embedding or None.
      query, key: ``[..., T, N, H]`` and ``[..., S, K, H]``.
      positions: int ``[..., T]`` of the queries, and of the keys as well where T == S; by default
        they count from ``first``.
      kv_positions: int ``[..., S]`` of the keys.
      first: the position of the first token where no positions are given (a cache's length).

    Returns:
      Queries and keys, in their shapes and dtypes.

    Raises:
      ValueError: positions without a ``rope``, or positions of the queries only where T != S.
    """
    if rope is None:
        if positions is not None or kv_positions is not None:
            name = "positions" if positions is not None else "kv_positions"
            raise ValueError(f"{name} has no use in a layer with rope=None")
        return query, key
    length, kv_length = query.shape[-3], key.shape[-3]
    if kv_positions is None:
        if positions is not None and length != kv_length:
            raise ValueError(
                f"positions are those of {length} queries; pass kv_positions too for the "
                f"{kv_length} keys"
            )
        kv_positions = (
            first + jnp.arange(kv_length, dtype=jnp.int32) if positions is None else positions
        )
    if positions is None:
        positions = first + jnp.arange(length, dtype=jnp.int32)
    return rope.apply(query, positions), rope.apply(key, kv_positions)
