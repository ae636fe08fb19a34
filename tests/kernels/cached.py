"""Caches with tokens in them, and the kernels of both families that read them in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from axattn import Mask
from axattn.cache import PagedCache
from axattn.kernels._tpu.cached.block_sizes import find_cache_refusal
from axattn.kernels._tpu.cached.grid import CachedBlockSizes
from axattn.kernels._tpu.cached.kernel import attend_over_cache
from tests import caches
from tests.cache.test_attend import check
from tests.kernels.calls import call_of_cache
from tests.kernels.conftest import HOPPER

B, K = 3, 2
CAPACITY, MAX_APPEND = 208, 24
LENGTHS = np.array([200, 65, 0])


def in_lanes(kind):
    """On TPUs heads of other sizes than whole lanes are laid out slots last, in multiples of 128."""
    return dict(capacity=256) | (dict(window=256 - MAX_APPEND) if kind == "ring" else {})


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
    step = MAX_APPEND if kind == "ring" else max(tokens, 1)
    return caches.poisoned(caches.grown(cache, k, v, lengths, step=step))


def paged(page, dtype="bfloat16", lengths=LENGTHS, *, head_dim):
    """One of pages of another size."""
    pages, tokens = -(-200 // page), int(lengths.max())
    cache = PagedCache.create(B, B * pages + 2, page, pages, K, head_dim, dtype=dtype)
    table = np.random.default_rng(5).permutation(B * pages + 2)[: B * pages]
    cache = cache.with_table(table.reshape(B, pages))
    _, k, v = caches.tokens(tokens, head_dim=head_dim, value_dim=head_dim, dtype="bfloat16")
    return caches.poisoned(caches.grown(cache, k, v, lengths, step=tokens))


def queries(tokens, heads, head_dim, seed=3, dtype="bfloat16"):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(B, tokens, heads, head_dim)).astype(dtype))


def attend(family, cache, query, *, sizes=None, cores=1, interpret=True, **options):
    """Output and LSE. A TPU kernel has small blocks, or the ``sizes``; and see `interpreted`."""

    def program(cache, query, arrays):
        options = static | arrays
        if family == HOPPER:
            return cache.attend(query, implementation=family, return_residual=True, **options)
        call = call_of_cache(cache, query, **options)
        assert find_cache_refusal(call) is None
        own = sizes or CachedBlockSizes(min(query.shape[1], 8), 128)
        return attend_over_cache(call, own, cores=cores, interpret=interpret)

    arrays = {k: v for k, v in options.items() if isinstance(v, (np.ndarray, jax.Array, Mask))}
    static = {k: v for k, v in options.items() if k not in arrays}
    return jax.jit(program)(cache, query, arrays)


def attend_and_check(family, cache, query, lengths=LENGTHS, reference=None, how=None, **options):
    """``reference``: the options that the reference is given, where they are others."""
    tokens = query.shape[1]
    real = np.minimum(lengths, tokens)
    out, lse = attend(family, cache, query, query_seq_lengths=real, **(how or {}), **options)
    options = options if reference is None else reference
    check(query, real, cache, out, lse, first=lengths - real, **options)
