"""Products with keys and values in arrays or in a cache, for both XLA paths.

`KVProducts` holds one tile of queries. For a span of key/value slots it multiplies queries by keys,
and weights by values. Scores and weights are ``[B, K, G, t, s]``.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from axattn._call import DECODE_ROWS, AttentionCall
from axattn._implementations.products import FoldedProducts, GroupedProducts
from axattn._implementations.softmax import MaskedScores, average_values
from axattn._jax_compat import is_known
from axattn._mask_parts import Span, as_column
from axattn._masks import find_kv_lengths, zero_unused
from axattn._stored import UNUSED_POSITION
from axattn._typing import present


class KVProducts(Protocol):
    def multiply_keys(self, kv: Span) -> jax.Array:
        """Multiply queries and keys, in the accumulator's dtype. Unused slots may give NaN."""
        ...

    def multiply_values(self, weights: jax.Array, kv: Span, *, clean: bool) -> jax.Array:
        """Multiply weights and values, ``[B, K, G, t, h]``; ``clean``: ``kv`` has unused slots."""
        ...

    def average_values(self, masked: MaskedScores, kv: Span) -> tuple[jax.Array, jax.Array]:
        """Average clean values by the softmax, differentiably; return the LSE as well."""
        ...


def make_kv_products(call: AttentionCall, query: jax.Array, *, folded: bool) -> KVProducts:
    """Make the products of ``call`` for the rows ``query [B, t, N, H]``."""
    if call.stored is None:
        return _ArrayProducts(call, query, folded=folded)
    return _CacheProducts(call, query)


class _ArrayProducts:
    """Products with keys and values ``[B, S, K, size]``."""

    def __init__(self, call: AttentionCall, query: jax.Array, *, folded: bool):
        self.call, self.key, self.value = call, present(call.key), present(call.value)
        self.product = (FoldedProducts if folded else GroupedProducts)(
            query, call.num_kv_heads, call.precision, call.accumulator_dtype
        )

    def multiply_keys(self, kv):
        return self.product.multiply_keys(take_kv_rows(self.call, self.key, kv, clean=False))

    def multiply_values(self, weights, kv, *, clean):
        value = take_kv_rows(self.call, self.value, kv, clean=clean)
        return self.product.multiply_values(weights.astype(value.dtype), value)

    def average_values(self, masked, kv):
        value = take_kv_rows(self.call, self.value, kv, clean=True)
        return average_values(self.product.multiply_values, masked, value)


def take_kv_rows(call: AttentionCall, array: jax.Array, kv: Span, *, clean: bool) -> jax.Array:
    """Slice slots ``kv`` of keys or values; ``clean`` zeroes those at and after the length."""
    rows = kv.take(array, 1)
    return zero_unused(rows, kv.slots, find_kv_lengths(call.mask)) if clean else rows


class _CacheProducts:
    """Products with a cache ``[B, K, s, size]``, whose scales are folded into scores and weights.

    If keys are stored without their center, it is added to the scores.
    """

    def __init__(self, call: AttentionCall, query: jax.Array):
        self.call, self.stored, self.dtype = call, present(call.stored), call.product_dtype
        self.options = {
            "precision": call.precision,
            "preferred_element_type": call.accumulator_dtype,
        }
        batch, rows, heads, size = query.shape
        self.from_center = self.stored.multiply_center(query, call.accumulator_dtype)
        query = query.reshape(batch, rows, call.num_kv_heads, heads // call.num_kv_heads, size)
        self.query = query.transpose(0, 2, 3, 1, 4).astype(self.dtype)

    def multiply_keys(self, kv):
        dots = self._multiply_stored_keys(self.stored.keys(kv, self.dtype))
        scales = self.stored.key_scales(kv)
        if scales is not None:
            dots = dots * scales[:, :, None, None].astype(dots.dtype)
        return dots if self.from_center is None else dots + self.from_center[..., None]

    def _multiply_stored_keys(self, key: jax.Array) -> jax.Array:
        batch, kv_heads, group, rows, size = self.query.shape
        if not is_known(lambda: group * rows <= DECODE_ROWS, otherwise=False):
            return jnp.einsum("bkgth,bksh->bkgts", self.query, key, **self.options)
        # With few rows, keys come first in the product: else XLA:CPU would transpose them (3 to 10
        # times slower). The result that is transposed instead is small.
        query = self.query.reshape(batch, kv_heads, group * rows, size)
        dots = jnp.einsum("bksh,bkrh->bksr", key, query, **self.options).swapaxes(2, 3)
        return dots.reshape(batch, kv_heads, group, rows, key.shape[2])

    def multiply_values(self, weights, kv, *, clean):
        value, scales = self._read_values(kv, clean=clean)
        if scales is not None:
            weights = weights * scales.astype(weights.dtype)
        return self._multiply_stored_values(weights.astype(self.dtype), value)

    def average_values(self, masked, kv):
        value, scales = self._read_values(kv, clean=True)
        return average_values(self._multiply_stored_values, masked.scale(scales), value)

    def _multiply_stored_values(self, weights: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.einsum("bkgts,bksh->bkgth", weights, value, **self.options)

    def _read_values(self, kv: Span, *, clean: bool) -> tuple[jax.Array, jax.Array | None]:
        """Return values without their scales, and the scales ``[B, K, 1, 1, s]`` or None."""
        value, scales = self.stored.values(kv, self.dtype), self.stored.value_scales(kv)
        used = self._find_used_slots(kv) if clean else None
        if scales is not None:
            if used is not None:
                scales = jnp.where(used[:, None], scales, 0.0)
            scales = scales[:, :, None, None]
        if used is not None and self.stored.dtype not in ("int8", "int4"):  # which have no NaN
            value = jnp.where(used[:, None, :, None], value, jnp.zeros((), value.dtype))
        return value, scales

    def _find_used_slots(self, kv: Span) -> jax.Array | None:
        """Find the slots that hold a token, bool ``[B or 1, s]``, or None for all."""
        used = None
        length = find_kv_lengths(self.call.mask)
        if length is not None:
            used = kv.slots[None] < as_column(jnp.asarray(length))
        if self.call.kv_positions is not None:
            held = kv.positions < UNUSED_POSITION
            used = held if used is None else used & held
        return used
