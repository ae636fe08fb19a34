"""Dtypes of results. ``jnp.promote_types`` raises under jax_numpy_dtype_promotion="strict"."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

FLOATS = ("float32", "bfloat16", "float16", "float64")


def choose_accumulator(dtype: Any) -> Any:
    """Return the dtype for sums over ``dtype``: float64 for float64, else float32.

    Raises:
      TypeError: ``dtype`` is not float32, bfloat16, float16 or float64.
    """
    if jnp.dtype(dtype).name not in FLOATS:
        raise TypeError(f"dtype takes one of {', '.join(FLOATS)}, got {jnp.dtype(dtype).name}")
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def promote_floats(a: Any, b: Any) -> Any:
    """Return the narrowest dtype that holds all numbers of both."""
    if jnp.dtype(a) == jnp.dtype(b):
        return jnp.dtype(a)
    return jnp.dtype(jnp.float64 if jnp.float64 in (jnp.dtype(a), jnp.dtype(b)) else jnp.float32)
