"""Calls as the kernels get them."""

from __future__ import annotations

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from axattn import Mask
from axattn.cache import base
from benchmarks.harness.calls import make_call as call_of

# What no kernel takes: the reason, other sizes than `shapes` has, and options.
REFUSED = [
    ("mask array per head", {}, dict(mask=jax.ShapeDtypeStruct((1, 8, 1, 1024), bool))),
    ("traced scale", {}, dict(scale=jax.ShapeDtypeStruct((), jnp.float32))),
    (
        "two pairs of segment ids",
        {},
        dict(
            query_segment_ids=jax.ShapeDtypeStruct((1024,), jnp.int32),
            mask=Mask.segments(np.zeros(1024, int)),
        ),
    ),
]


def _sizes(B, T, S, N, K, H, h):
    return (B, T, N, H), (B, S, K, H), (B, S, K, h or H)


def shapes(B=1, T=1024, S=1024, N=8, K=2, H=128, h=None, dtype=jnp.bfloat16):
    """Query, key and value as shapes."""
    return [jax.ShapeDtypeStruct(size, dtype) for size in _sizes(B, T, S, N, K, H, h)]


def arrays(B, T, S, N, K, H, h=None, dtype=jnp.bfloat16, seed=0):
    """Query, key and value."""
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.normal(size=size).astype(dtype)) for size in _sizes(B, T, S, N, K, H, h)
    ]


def make_call(B, T, S, N, K, H, h=None, dtype=jnp.bfloat16, seed=0, **options):
    return call_of(*arrays(B, T, S, N, K, H, h, dtype, seed), **options)


def call_of_cache(cache, query, **options):
    """The call that ``cache.attend`` makes."""
    found = []

    def door(*args, **kwargs):
        found.append(call_of(*args, **kwargs))
        return query

    with mock.patch.object(base, "dot_product_attention", door):
        cache.attend(query, **options)
    return found[0]
