"""What is asked of JAX where it has no public way to say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from axattn import _jax_compat


def asked(wrap, within):
    """What `is_argument` says of an argument and of a sum, inside ``wrap`` of the program."""
    found = []

    def program(x):
        for y in (x, x + 1.0):
            wrap(lambda y: found.append(_jax_compat.is_argument(y)) or y.sum())(y)
        return x

    within(program)(jnp.ones((3, 4)))
    return found


WRAPS = {
    "nothing": lambda f: f,
    "grad": jax.grad,
    "vjp": lambda f: lambda x: jax.vjp(f, x),
    "vmap": jax.vmap,
    "grad of vmap": lambda f: jax.grad(lambda x: jax.vmap(f)(x).sum()),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_is_argument(wrap):
    assert asked(wrap, jax.jit) == [True, False]


def test_is_argument_of_what_is_just_there():
    assert asked(lambda f: f, lambda f: f) == [True, True]


def test_is_argument_of_an_inner_program():
    """Its own arguments, whatever they are outside: that program is all that it says of them."""
    assert asked(jax.jit, jax.jit) == [True, True]
