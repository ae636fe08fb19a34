"""Keys and values as a cache stores them, read tile by tile.

The arrays are head-major, ``[rows, K, slots, size]``, so that the keys of one head lie together.
A row is a row of the batch, or a page that a block table names.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn import _quantization, _serialization
from axattn._mask_parts import Span


class KeyValueArrays(NamedTuple):
    """The arrays of a cache: R rows (or pages) of C slots.

    Scales are None without quantization; values are None where they are the first features of the
    keys.
    """

    keys: jax.Array  # [R, K, C, H]
    values: jax.Array | None  # [R, K, C, h]
    key_scales: jax.Array | None  # float32 [R, K, C]
    value_scales: jax.Array | None  # float32 [R, K, C]


_serialization.register_named_tuple(KeyValueArrays)

# The position of an unused slot: later than every query, so that a causal mask excludes it.
UNUSED_POSITION = 2**30


@functools.partial(
    _serialization.register_dataclass,
    data=("arrays", "key_center", "block_table", "first_row"),
    static=("batch", "dtype", "head_dim", "value_head_dim"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class KVView(_serialization.SerializableValue):
    """What stands in an :class:`AttentionCall` in place of key and value arrays.

    Slot s of batch row b is slot s of row b of the arrays or, with a block table, slot s % C of
    page ``block_table[b, s // C]``. The call's mask says which slots are in use.
    """

    arrays: KeyValueArrays
    key_center: jax.Array | None = None  # float32 [K, H], subtracted from the stored keys
    block_table: jax.Array | None = None  # int32 [B, pages]
    # The row of the arrays that is row 0 of the batch: taking a batch row copies nothing.
    first_row: Any = 0
    batch: int = 0
    dtype: str = "bfloat16"  # of the stored numbers; the arrays may hold their bytes
    head_dim: int = 0
    value_head_dim: int = 0

    @property
    def num_kv_heads(self) -> int:
        return self.arrays.keys.shape[1]

    @property
    def page_size(self) -> int:
        return self.arrays.keys.shape[2]

    @property
    def kv_len(self) -> int:
        """Slots per batch row, S."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.page_size

    def row(self, b: int | jax.Array) -> KVView:
        """Return batch row ``b`` alone."""
        if self.block_table is None:
            return dataclasses.replace(self, first_row=self.first_row + b, batch=1)
        table = lax.dynamic_slice_in_dim(self.block_table, b, 1, 0)
        return dataclasses.replace(self, block_table=table, batch=1)

    def keys(self, kv: Span, dtype: Any) -> jax.Array:
        """Read slots ``kv`` of the keys, ``[B, K, s, H]`` in ``dtype``, without scale or center."""
        return _quantization.cast_codes(self._tile(self.arrays.keys, kv), self.dtype, dtype)

    def values(self, kv: Span, dtype: Any) -> jax.Array:
        """Read slots ``kv`` of the values, ``[B, K, s, h]`` in ``dtype``, without scale."""
        if self.arrays.values is None:
            return self.keys(kv, dtype)[..., : self.value_head_dim]
        return _quantization.cast_codes(self._tile(self.arrays.values, kv), self.dtype, dtype)

    def key_scales(self, kv: Span) -> jax.Array | None:
        """Read the scales of the keys, float32 ``[B, K, s]``, or None."""
        scales = self.arrays.key_scales
        return None if scales is None else self._tile(scales, kv)

    def value_scales(self, kv: Span) -> jax.Array | None:
        if self.arrays.values is None:
            return self.key_scales(kv)
        scales = self.arrays.value_scales
        return None if scales is None else self._tile(scales, kv)

    def multiply_center(self, query: jax.Array, dtype: Any) -> jax.Array | None:
        """Multiply queries ``[B, T, N, H]`` by the center of the keys: ``[B, K, G, T]``, or None.

        With the center c, q . k = q . (k - c) + q . c; this is the second term.
        """
        if self.key_center is None:
            return None
        batch, rows, heads, size = query.shape
        query = query.reshape(batch, rows, self.num_kv_heads, heads // self.num_kv_heads, size)
        # These few products shift whole rows of scores: full precision.
        return jnp.einsum(
            "btkgh,kh->bkgt",
            query.astype(dtype),
            self.key_center.astype(dtype),
            precision=lax.Precision.HIGHEST,
        )

    def _tile(self, array: jax.Array, kv: Span) -> jax.Array:
        _, heads, page_size, *rest = array.shape
        if self.block_table is None:
            start = (self.first_row, 0, kv.start, *(0 for _ in rest))
            start = tuple(jnp.asarray(first, jnp.int32) for first in start)
            return lax.dynamic_slice(array, start, (self.batch, heads, kv.size, *rest))
        # Spans begin and end with pages. Table entries without used slots may be garbage.
        pages = lax.dynamic_slice_in_dim(
            self.block_table, kv.start // page_size, kv.size // page_size, 1
        )
        tile = jnp.moveaxis(array.at[pages].get(mode="clip"), 1, 2)
        return tile.reshape(self.batch, heads, kv.size, *rest)
