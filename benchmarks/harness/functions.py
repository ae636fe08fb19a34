"""Attention as functions of arrays, forward or forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

DIRECTIONS = ("fwd", "fwd+bwd")


def in_direction(
    fn: Callable[..., jax.Array], direction: str, *, arrays: int | None = None
) -> Callable:
    """``fn`` itself, or its value and gradients with respect to its arguments, jitted.

    With ``arrays``, to the first so many of them.

    The loss is the mean of squares, so that the cotangent is as dense and random as the output.
    """
    if direction == "fwd":
        return jax.jit(fn)
    if direction != "fwd+bwd":
        raise ValueError(f"direction={direction!r}; it takes one of {', '.join(DIRECTIONS)}")

    def loss(*args):
        return jnp.mean(jnp.square(fn(*args).astype(jnp.float32)))

    def both(*args):
        return jax.value_and_grad(loss, argnums=tuple(range(arrays or len(args))))(*args)

    return jax.jit(both)
