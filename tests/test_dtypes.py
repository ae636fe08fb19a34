"""axattn._dtypes: what JAX would say, were its promotion not strict."""

from __future__ import annotations

import itertools

import jax.numpy as jnp

from axattn import _dtypes


def test_common_dtypes_are_those_of_jax():
    """float16 and bfloat16, too: neither holds the numbers of the other."""
    for a, b in itertools.product(("float32", "bfloat16", "float16"), repeat=2):
        assert _dtypes.promote_floats(a, b) == jnp.promote_types(a, b), (a, b)
