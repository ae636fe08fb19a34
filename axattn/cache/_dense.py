"""A cache with room for a fixed number of tokens in each row."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from axattn._typing import ArrayLike
from axattn.cache._base import Cache, register_kind
from axattn.cache._checks import check_counts, check_positive, move_to_host
from axattn.cache._storage import make_empty_fields, wrap_arrays
from axattn.cache._write import SlotMapping


@register_kind
@dataclasses.dataclass(frozen=True, eq=False)
class DenseCache(Cache):
    """A cache with room for a fixed number of tokens in each row.

    Token p of a row is in slot p; arrays are ``[B, K, length, size]``. `create` makes it. Methods
    and attributes are those of `Cache`.

    Raises:
      ValueError: by `create` and the methods, for wrong sizes and for tokens that do not fit.
      TypeError: by both, for wrong dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn.cache import DenseCache
      >>> cache = DenseCache.create(2, 32, num_kv_heads=1, head_dim=8, dtype="float32")
      >>> query, key, value = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 3, 1, 8)), jnp.ones((2, 3, 1, 8))
      >>> out, cache = cache.extend(query, key, value, lengths=jnp.array([3, 1]))
      >>> out.shape, cache.lengths.tolist(), cache.capacity
      ((2, 3, 4, 8), [3, 1], 32)
    """

    @staticmethod
    def create(
        batch: int,
        length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        values_in_keys: bool = False,
        dtype: DTypeLike = jnp.bfloat16,
        key_center: ArrayLike | None = None,
    ) -> DenseCache:
        """Create an empty cache for ``batch`` rows of at most ``length`` tokens.

        Args:
          batch, length, num_kv_heads, head_dim: B, S, K and H.
          value_head_dim: h; H by default.
          values_in_keys: store keys only: their first h features are the values (latent attention,
            https://arxiv.org/abs/2405.04434).
          dtype: ``float32``, ``bfloat16``, ``float16``; or ``int8``, ``float8_e4m3fn``, ``int4``
            with one float32 scale per token and head.
          key_center: float ``[K, H]``, subtracted from keys before they are stored; the scores
            make up for it, see `axattn.quantization.key_center`.

        Raises:
          ValueError: sizes that are not positive integers, or that contradict each other.
          TypeError: another ``dtype``, or a ``key_center`` that is not floating point.

        Example:
          >>> from axattn.cache import DenseCache
          >>> cache = DenseCache.create(8, 4096, num_kv_heads=8, head_dim=128, dtype="int8")
          >>> cache.bytes_per_token, cache.nbytes  # of one layer
          (2112, 69206016)
        """
        check_positive("length", length)
        return DenseCache(
            **make_empty_fields(
                batch,
                batch,
                length,
                num_kv_heads,
                head_dim,
                value_head_dim=value_head_dim,
                values_in_keys=values_in_keys,
                dtype=dtype,
                key_center=key_center,
            )
        )

    @staticmethod
    def from_arrays(
        keys: ArrayLike,
        values: ArrayLike | None = None,
        *,
        lengths: ArrayLike,
        key_scales: ArrayLike | None = None,
        value_scales: ArrayLike | None = None,
        value_head_dim: int | None = None,
        dtype: DTypeLike | None = None,
        key_center: ArrayLike | None = None,
    ) -> DenseCache:
        """Make a cache of existing arrays and the tokens in them.

        The cache takes over the arrays, as in `PagedCache.from_arrays`: donating it deletes them.

        Args:
          keys: ``[B, K, length, H]``, after RoPE.
          values: ``[B, K, length, h]``; None if they are the first h features of the keys.
          lengths: int ``[B]`` or int, tokens of each row, in its first slots.
          key_scales: float32 ``[B, K, length]`` for int8, float8 and int4; else None.
          value_scales: likewise float32 ``[B, K, length]``, of the values.
          value_head_dim: h if ``values`` is None; H by default.
          dtype: dtype of keys and values; by default that of the array. Arrays of bits (uint8 for
            float8_e4m3fn, uint16 for bfloat16) need it.
          key_center: float ``[K, H]`` that was subtracted from the keys.

        Raises:
          ValueError: shapes that contradict each other; missing or superfluous scales; lengths
            beyond the slots.
          TypeError: other dtypes.

        Example:
          >>> import jax.numpy as jnp
          >>> from axattn.cache import DenseCache
          >>> keys = values = jnp.ones((2, 1, 32, 8), jnp.bfloat16)
          >>> cache = DenseCache.from_arrays(keys, values, lengths=20)
          >>> cache.dtype, cache.capacity, cache.lengths.tolist()
          ('bfloat16', 32, [20, 20])
        """
        fields = wrap_arrays(
            keys,
            values,
            key_scales,
            value_scales,
            rows="B",
            slots="length",
            value_head_dim=value_head_dim,
            dtype=dtype,
            key_center=key_center,
        )
        batch, _, capacity, _ = fields["arrays"].keys.shape
        lengths = check_counts("lengths", lengths, batch, at_most=capacity)
        return DenseCache(
            **fields,
            lengths=jnp.array(lengths, jnp.int32),
            overflowed=jnp.zeros((batch,), bool),
        )

    @property
    def capacity(self) -> int:
        return self.arrays.keys.shape[2]

    def _check_room(self, counts):
        lengths, counts = move_to_host(self.lengths, counts)
        message = f"the cache holds {self.capacity} tokens per row"
        fits = lengths + counts <= self.capacity
        if lengths is not self.lengths:
            message += f": lengths {lengths.tolist()} and {counts.tolist()} more do not fit"
        return fits, message

    def _map_slots(self, counts, length):
        rows = jnp.arange(self.batch, dtype=jnp.int32)[:, None]
        return SlotMapping(self.lengths, counts, rows)
