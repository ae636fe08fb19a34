"""Flax's norms as the layers call them."""

from __future__ import annotations

from collections.abc import Callable

import jax

from axattn._typing import Array, Float


def normalized(
    norm: Callable[[Array], Array], x: Float[Array, "*batch H"]
) -> Float[Array, "*batch H"]:
    """``norm(x)``, a norm of Flax: it mixes 16-bit numbers with float32, which is not asked about.

    Under jax_numpy_dtype_promotion="strict" Flax's own layers cannot normalize in 16 bits.
    """
    with jax.numpy_dtype_promotion("standard"):
        return norm(x)
