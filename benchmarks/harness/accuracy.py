"""Whether a result in 16 bits is as good as its precision allows: the rule of flash attention.

An error may be twice that of plain attention in the same precision, plus half a unit in the last
place (a rounding more); both against a reference in float32. Errors are relative to their own row:
behind 16,000 keys an output is a hundred times smaller than the first row's, and would hide behind
it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Rows smaller than this part of the middle one are noise (the first row of a causal dQ is zero).
_SMALL_ROW = 0.25


@jax.jit
def error(result: jax.Array, reference: jax.Array) -> jax.Array:
    """Largest error of an element / largest element of its row, over all rows ``[..., size]``."""
    difference = jnp.abs(result.astype(jnp.float32) - reference.astype(jnp.float32)).max(-1)
    size = jnp.abs(reference.astype(jnp.float32)).max(-1)
    # jnp.maximum passes NaN on: one wrong element is an infinite error.
    found = (difference / jnp.maximum(size, _SMALL_ROW * jnp.median(size))).max()
    return jnp.where(jnp.isnan(found), jnp.inf, found)


def limit(plain: float, dtype) -> float:
    """The error that is allowed where plain attention makes ``plain``."""
    return 2 * plain + 0.5 * float(jnp.finfo(dtype).eps)
