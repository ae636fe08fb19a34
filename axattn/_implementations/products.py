"""The two matrix products of attention over tiles, with key/value heads read as they are stored.

Tiles: query ``[B, t, N, H]``, key ``[B, s, K, H]``, value ``[B, s, K, h]``; scores and weights
``[B, K, G, t, s]``; outputs ``[B, K, G, t, h]``. Two forms give the same numbers:

* ``grouped``: a batched product over (B, K), whose rows are the group's queries.
* ``folded``: one product over K * H with each row zero outside its own key/value head. Batched
  products want the keys of each head contiguous, and XLA on CPU and GPU copies a BSKH cache for
  that; this form reads the cache as it lies. It has K times the FLOPs, which cost nothing for few
  rows. A NaN or infinity in one key/value head reaches the others.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _multiply_keys(options: tuple, query: jax.Array, key: jax.Array) -> jax.Array:
    """Return ``[B, K, G, t, s]`` of bfloat16 ``[B, K, G, t, H]`` and ``[B, s, K, H]``.

    The products of a TPU read the scores' gradient in bfloat16 whatever it is in: there it is in
    memory in bfloat16, too. Elsewhere nothing is rounded.
    """
    return jnp.einsum("bkgth,bskh->bkgts", query, key, **dict(options))


@functools.partial(_multiply_keys.defjvp, symbolic_zeros=True)
def _multiply_keys_jvp(options, primals, tangents):
    (query, key), dots = primals, _multiply_keys(options, *primals)

    def multiply(x, y, *, dtype):
        product = jnp.einsum(
            "bkgth,bskh->bkgts", x, y, **dict(options) | {"preferred_element_type": dtype}
        )
        return product.astype(dots.dtype)

    terms = [
        lax.platform_dependent(
            x,
            y,
            tpu=functools.partial(multiply, dtype=query.dtype),
            default=functools.partial(multiply, dtype=dots.dtype),
        )
        for x, y in ((tangents[0], key), (query, tangents[1]))
        if not isinstance(x, SymbolicZero) and not isinstance(y, SymbolicZero)
    ]
    return dots, sum(terms) if terms else jnp.zeros_like(dots)


class GroupedProducts:
    def __init__(self, query: jax.Array, num_kv_heads: int, precision: Any, dtype: Any):
        batch, rows, heads, size = query.shape
        self.query = query.reshape(batch, rows, num_kv_heads, heads // num_kv_heads, size)
        self.query = self.query.transpose(0, 2, 3, 1, 4)
        self.options = {"precision": precision, "preferred_element_type": dtype}

    def multiply_keys(self, key: jax.Array) -> jax.Array:
        if self.query.dtype == jnp.bfloat16 and self.options["precision"] is None:
            return _multiply_keys(tuple(self.options.items()), self.query, key)
        return jnp.einsum("bkgth,bskh->bkgts", self.query, key, **self.options)

    def multiply_values(self, weights: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.einsum("bkgts,bskh->bkgth", weights, value, **self.options)


class FoldedProducts:
    def __init__(self, query: jax.Array, num_kv_heads: int, precision: Any, dtype: Any):
        batch, rows, heads, size = query.shape
        group = heads // num_kv_heads
        self.tile = (batch, num_kv_heads, group, rows)
        query = query.reshape(batch, rows, num_kv_heads, group, size).transpose(0, 2, 3, 1, 4)
        query = query.reshape(batch, num_kv_heads, group * rows, 1, size)
        own = jnp.eye(num_kv_heads, dtype=bool).reshape(1, num_kv_heads, 1, num_kv_heads, 1)
        query = jnp.where(own, query, jnp.zeros((), query.dtype))
        self.query = query.reshape(batch, heads * rows, num_kv_heads * size)
        self.options = {"precision": precision, "preferred_element_type": dtype}

    def multiply_keys(self, key: jax.Array) -> jax.Array:
        key = key.reshape(*key.shape[:2], math.prod(key.shape[2:]))
        dots = jnp.einsum("brc,bsc->brs", self.query, key, **self.options)
        return dots.reshape(*self.tile, dots.shape[-1])

    def multiply_values(self, weights: jax.Array, value: jax.Array) -> jax.Array:
        batch, kv_heads, group, rows = self.tile
        size = value.shape[-1]
        out = jnp.einsum(
            "brs,bsc->brc",
            weights.reshape(batch, kv_heads * group * rows, weights.shape[-1]),
            value.reshape(*value.shape[:2], kv_heads * size),
            **self.options,
        )
        out = out.reshape(batch, kv_heads, group * rows, kv_heads, size)
        out = jnp.stack([out[:, k, :, k] for k in range(kv_heads)], axis=1)
        return out.reshape(batch, kv_heads, group, rows, size)
