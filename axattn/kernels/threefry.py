"""Threefry-2x32 in the arithmetic that kernels have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array) -> jax.Array:
    """First word of Threefry-2x32-20 at counter (x0, x1), in int32 arithmetic that wraps around.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    keys = (key0, key1, key0 ^ key1 ^ jnp.int32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            high = lax.shift_left(x1, jnp.full_like(x1, rotation))
            low = lax.shift_right_logical(x1, jnp.full_like(x1, 32 - rotation))
            x1 = (high | low) ^ x0
        x0 = x0 + keys[(block + 1) % 3]
        x1 = x1 + (keys[(block + 2) % 3] + (block + 1))
    return x0
