"""Caches with tokens in them for the kernels that read them in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests import caches

B, K = 3, 2
CAPACITY, MAX_APPEND = 208, 24
LENGTHS = np.array([200, 65, 0])


def filled(kind, dtype="bfloat16", lengths=LENGTHS, *, head_dim, value_dim, kv_heads=K, **options):
    """A poisoned cache with so many tokens in its rows."""
    tokens = int(lengths.max())
    kind_of_tokens = dtype if dtype in caches.FLOATS else "bfloat16"
    _, k, v = caches.tokens(
        tokens, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, dtype=kind_of_tokens
    )
    v = None if options.get("values_in_keys") else v
    cache = caches.make(
        kind,
        capacity=options.pop("capacity", CAPACITY),
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_dim,
        max_append=MAX_APPEND,
        dtype=dtype,
        **options,
    )
    append = jax.jit(lambda c, k, v, n: c.append(k, v, lengths=n))
    step = MAX_APPEND if kind == "ring" else tokens
    for i in range(0, tokens, step):
        here = slice(i, i + step)
        real = np.clip(lengths - i, 0, k[:, here].shape[1]).astype(np.int32)
        cache = append(cache, k[:, here], None if v is None else v[:, here], real)
    return caches.poisoned(cache)


def queries(tokens, heads, head_dim, seed=3, dtype="bfloat16"):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(B, tokens, heads, head_dim)), dtype)
