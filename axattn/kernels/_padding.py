"""Padding of arrays to the lengths that kernels load."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pad_axis(array: jax.Array, length: int, fill: float = 0, *, axis: int = 1) -> jax.Array:
    """Fill one axis of ``array`` up to ``length``."""
    missing = length - array.shape[axis]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths, constant_values=fill)
