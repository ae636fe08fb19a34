"""Calls as the kernels get them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from axattn import Mask
from axattn._arguments import normalize_over_cache
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


def with_layout(call, layout):
    """The same call with queries in memory by "tokens" or by "heads", which are then said."""
    return dataclasses.replace(call, options=call.options | {"is_projected": layout == "heads"})


def make_call(B, T, S, N, K, H, h=None, dtype=jnp.bfloat16, seed=0, **options):
    return call_of(*arrays(B, T, S, N, K, H, h, dtype, seed), **options)


def call_of_cache(cache, query, **options):
    """The call that ``cache.attend`` makes."""
    query, given = cache._parse_query(query, **options)
    return normalize_over_cache(query, cache.stored(), given)
