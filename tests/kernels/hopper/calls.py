"""Calls as the kernels get them."""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import numpy as np

from axattn import attention
from axattn.arguments import normalize


def make_call(B, T, S, N, K, H, h=None, dtype=jnp.bfloat16, seed=0, **options):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, h or H))
    arrays = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return call_of(*arrays, **options)


def call_of(query, key, value, **options):
    """The call that the door would make of these arguments."""
    bound = inspect.signature(attention.dot_product_attention).bind(query, key, value, **options)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    arguments.pop("implementation")
    return normalize(**arguments)[0]
