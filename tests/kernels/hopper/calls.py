"""Calls as the kernels get them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from benchmarks.harness.tile_calls import make_call as call_of


def make_call(B, T, S, N, K, H, h=None, dtype=jnp.bfloat16, seed=0, **options):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, h or H))
    arrays = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return call_of(*arrays, **options)
