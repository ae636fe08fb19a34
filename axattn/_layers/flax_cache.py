"""Flax's key/value cache: it takes one token at a time, at an index that counts up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jax import lax

from axattn._typing import Array, Float, Integer


def check_token(query_shape, key_shape, cache_shape) -> None:
    """Raise ValueError unless query and key are one token for a cache ``[..., S, K, H]``."""
    *batch, _, _, head_dim = cache_shape
    expected_query = (*batch, 1, query_shape[-2], head_dim)
    expected_key = (*batch, 1, *cache_shape[-2:])
    for name, got, expected in (
        ("query", tuple(query_shape), expected_query),
        ("key", tuple(key_shape), expected_key),
    ):
        if got != expected:
            raise ValueError(
                f"Autoregressive cache shape error, expected {name} shape {expected} instead got "
                f"{got}."
            )


def write_token(
    cached: Float[Array, "*batch S K H"],
    index: Integer[Array, ""],
    token: Float[Array, "*batch 1 K H"],
) -> Float[Array, "*batch S K H"]:
    """Return the cache with ``token`` written at ``index``, in the cache's dtype."""
    cached = lax.dynamic_update_slice_in_dim(
        cached, token.astype(cached.dtype), index, axis=cached.ndim - 3
    )
    # Without this XLA on CPU fuses the update into each reader of the cache, and copies it there.
    return lax.optimization_barrier(cached)


@dataclasses.dataclass(frozen=True)
class FlaxCache:
    """The arrays of Flax's cache, and a function that writes all three back into the layer."""

    key: Float[Array, "*batch S K H"]
    value: Float[Array, "*batch S K H"]
    index: Integer[Array, ""]
    write: Callable[[Array, Array, Array], None]
