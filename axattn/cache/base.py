"""What all key/value caches have in common."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from axattn import _jax_compat, quantization
from axattn._typing import Array, ArrayLike, Bool, Float, Integer
from axattn.attention import dot_product_attention
from axattn.cache.write import Places, write
from axattn.stored import KeyValueArrays, Stored

# What attention over a cache takes from the cache itself.
_OWN = ("key", "value", "key_value_seq_lengths", "query_seq_lengths", "kv_positions", "q_offset")

DATA_FIELDS = ("arrays", "lengths", "overflowed", "key_center")
STATIC_FIELDS = ("dtype", "head_dim", "value_head_dim")


@dataclasses.dataclass(frozen=True)
class Cache(abc.ABC):
    """Keys and values of the tokens seen so far, as a value: passed in, returned, donated.

    A pytree. Every method returns a new cache; with the old one donated to ``jax.jit`` the arrays
    are updated in place. Tokens are ``[B, T, K, H]`` outside and head-major inside.

    Attributes:
      arrays: what is stored, see :class:`axattn.stored.KeyValueArrays`.
      lengths: int32 ``[B]``, tokens per row so far: the position of the next one.
      overflowed: bool ``[B]``: under ``jit`` tokens for this row were refused, since they did not
        fit. What was stored before is untouched. Also raised by ``checkify`` (debug checks).
      key_center: float32 ``[K, H]`` or None: subtracted from keys before they are stored.
      dtype: name of the dtype of keys and values.
      head_dim, value_head_dim: H and h.
    """

    arrays: KeyValueArrays
    lengths: Integer[Array, " B"]
    overflowed: Bool[Array, " B"]
    key_center: Float[Array, "K H"] | None
    dtype: str
    head_dim: int
    value_head_dim: int

    # ---- what it is ---------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def capacity(self) -> int:
        """Tokens that a row can hold at a time."""

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.arrays.keys.shape[1]

    @property
    def values_in_keys(self) -> bool:
        """Whether the values are the first ``value_head_dim`` features of the keys."""
        return self.arrays.values is None

    @property
    def stores_floats(self) -> bool:
        """Whether keys and values are stored as they are, in ``dtype``: not quantized."""
        return not quantization.is_quantized(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(map(quantization.nbytes, jax.tree.leaves(self.arrays)))

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes, all heads, scales included."""
        return bytes_per_token(
            self.num_kv_heads,
            self.head_dim,
            self.value_head_dim,
            dtype=self.dtype,
            values_in_keys=self.values_in_keys,
        )

    def next_positions(self, length: int) -> Integer[Array, "B T"]:
        """Positions of the next ``length`` tokens of each row, int32 ``[B, length]``: for RoPE."""
        return self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)

    def stored(self) -> Stored:
        """What attention reads."""
        return Stored(
            self.arrays,
            key_center=self.key_center,
            batch=self.batch,
            dtype=self.dtype,
            head_dim=self.head_dim,
            value_head_dim=self.value_head_dim,
        )

    # ---- new tokens ---------------------------------------------------------------------------

    def append(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K h"] | None = None,
        *,
        lengths: ArrayLike | None = None,
    ) -> Self:
        """The cache with more tokens at the end of each row.

        Args:
          key: ``[B, T, K, H]``, any T >= 1, after RoPE. Its dtype is the cache's, or any
            floating-point one where the cache is quantized.
          value: ``[B, T, K, h]``; None where values are in the keys.
          lengths: int ``[B]`` or int: how many of the T tokens are real in each row, 0 to T; those
            behind are padding, of any content. All T by default.

        Raises:
          ValueError: shapes that do not fit; tokens that do not fit, where this can be known. Under
            ``jit`` the row is left as it was and ``overflowed`` set.
          TypeError: another dtype.
        """
        return self._append(*self._tokens(key, value, lengths))

    def attend(
        self,
        query: Float[Array, "B T N H"],
        *,
        query_seq_lengths: ArrayLike | None = None,
        q_positions: ArrayLike | None = None,
        is_causal: bool = True,
        **options: Any,
    ) -> Float[Array, "B T N h"]:
        """Attention of the newest tokens over all that is stored.

        Args:
          query: ``[B, T, N, H]``, floating point; N a multiple of K. By default the queries of the
            T tokens appended last.
          query_seq_lengths: int ``[B]`` or int: how many of them are real (``lengths`` of
            `append`); rows behind give zeros.
          q_positions: int ``[T]`` or ``[B, T]``, where they are others.
          is_causal: False where every query sees all that is stored (cross-attention).
          **options: as `axattn.dot_product_attention`. An array for ``mask`` or ``bias`` speaks of
            the slots: S is ``capacity``.

        Returns:
          ``[B, T, N, h]`` in the query's dtype; with ``return_residual`` also the LSE. A row
          without tokens gives zeros.
        """
        query = jnp.asarray(query)
        self._check_options(options, is_causal)
        if q_positions is None and query.ndim == 4 and is_causal:
            count = query.shape[1] if query_seq_lengths is None else query_seq_lengths
            first = self.lengths - jnp.asarray(count, jnp.int32)
            q_positions = first[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)
        if query_seq_lengths is not None:
            query_seq_lengths = _counts("query_seq_lengths", query_seq_lengths, self.batch)
        return dot_product_attention(
            query,
            self.stored(),
            None,
            query_seq_lengths=query_seq_lengths,
            q_positions=q_positions,
            is_causal=is_causal,
            **{**self._mask_options(), **options},
        )

    def extend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K h"] | None = None,
        *,
        lengths: ArrayLike | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "B T N h"], Self]:
        """`append`, then `attend` from the same tokens: one step of a layer.

        Takes what the two take; returns ``(output, cache)``. In a row that overflowed the output is
        zeros.
        """
        tokens, counts = self._tokens(key, value, lengths)
        cache = self._append(tokens, counts)
        written = cache.lengths - self.lengths
        return cache.attend(query, query_seq_lengths=written, **options), cache

    # ---- other changes ------------------------------------------------------------------------

    def truncate(self, lengths: ArrayLike) -> Self:
        """The cache without the tokens at and after ``lengths`` (int or int ``[B]``).

        For speculative tokens that were rejected. A row that is shorter already stays as it is.
        """
        lengths = _counts("lengths", lengths, self.batch)
        return dataclasses.replace(self, lengths=jnp.minimum(self.lengths, lengths))

    def reset(self, rows: ArrayLike | None = None) -> Self:
        """The cache with rows emptied and their ``overflowed`` cleared: all, or bool ``[B]``."""
        if rows is None:
            rows = jnp.ones((self.batch,), bool)
        rows = jnp.asarray(rows)
        if rows.dtype != jnp.bool_ or rows.shape != (self.batch,):
            raise ValueError(
                f"rows takes bool [{self.batch}], one per row, got {rows.dtype} {rows.shape}"
            )
        return dataclasses.replace(
            self,
            lengths=jnp.where(rows, 0, self.lengths),
            overflowed=self.overflowed & ~rows,
        )

    def fork(self, rows: ArrayLike) -> Self:
        """A cache whose row i is row ``rows[i]`` of this one (int ``[B']``): beams and samples.

        The rows are copied. Indices must be in range: under ``jit`` they are clipped.
        """
        rows = self._rows(rows)
        changes = {name: take_rows(getattr(self, name), rows) for name in self._per_row()}
        return dataclasses.replace(self, **changes)

    # ---- for the kinds of caches --------------------------------------------------------------

    def _per_row(self) -> tuple[str, ...]:
        """The fields that `fork` picks rows of."""
        return ("arrays", "lengths", "overflowed")

    @abc.abstractmethod
    def _fits(self, counts: Array) -> tuple[Array, str]:
        """Which rows have room for so many tokens, bool [B], and what to say of those that do not.

        Computed with numpy where everything is concrete.
        """

    @abc.abstractmethod
    def _places(self, counts: Array, length: int) -> Places: ...

    def _mask_options(self) -> dict[str, Any]:
        return {"key_value_seq_lengths": self.lengths}

    def _check_options(self, options: dict[str, Any], is_causal: bool) -> None:
        for name in options:
            if name in _OWN:
                raise TypeError(f"attend takes no argument {name}: the cache knows it")

    def _append(self, tokens: KeyValueArrays, counts: Array) -> Self:
        length = tokens.keys.shape[1]
        fits, message = self._fits(counts)
        if is_concrete(fits):
            if not np.all(fits):
                raise ValueError(message)
        else:
            _jax_compat.debug_check(fits.all(), message)
            counts = jnp.where(fits, counts, 0)
        counts = jnp.asarray(counts, jnp.int32)
        arrays = _write(self.arrays, tokens, self._places(counts, length))
        return dataclasses.replace(
            self,
            arrays=arrays,
            lengths=self.lengths + counts,
            overflowed=self.overflowed | ~jnp.asarray(fits),
        )

    def _tokens(self, key: Any, value: Any, lengths: Any) -> tuple[KeyValueArrays, Array]:
        """New tokens as they are stored, and how many there are in each row."""
        key = self._checked("key", key, self.head_dim)
        if self.values_in_keys:
            if value is not None:
                raise ValueError("value takes None: in this cache the values are in the keys")
        else:
            value = self._checked("value", value, self.value_head_dim)
            if value.shape[1] != key.shape[1]:
                raise ValueError(
                    f"value takes as many tokens as key, {key.shape[1]}, got shape {value.shape}"
                )
        length = key.shape[1]
        if self.key_center is not None:
            center = self.key_center.astype(jnp.float32)
            key = (key.astype(jnp.float32) - center).astype(
                key.dtype if self.stores_floats else jnp.float32
            )
        counts = length if lengths is None else lengths
        counts = _counts("lengths", counts, self.batch, at_most=length)
        return encode(key, value, self.dtype, self.arrays.keys.dtype), counts

    def _checked(self, name: str, x: Any, size: int) -> Array:
        x = jnp.asarray(x) if x is not None else x
        takes = f"[B, T, K, size] = [{self.batch}, T, {self.num_kv_heads}, {size}]"
        if x is None:
            raise ValueError(f"{name} takes {takes}, got None")
        shape = (self.batch, *x.shape[1:2], self.num_kv_heads, size)
        if x.ndim != 4 or x.shape != shape or x.shape[1] == 0:
            raise ValueError(f"{name} takes {takes} with T >= 1 for this cache, got {x.shape}")
        if not self.stores_floats:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise TypeError(f"{name} takes a floating-point dtype, got {x.dtype}")
        elif x.dtype != jnp.dtype(self.dtype):
            raise TypeError(
                f"{name} takes the dtype of the cache, {self.dtype}, got {x.dtype}; cast it, or "
                "create the cache with another dtype"
            )
        return x

    def _rows(self, rows: Any) -> Array:
        rows = jnp.asarray(rows)
        if not jnp.issubdtype(rows.dtype, jnp.integer) or rows.ndim != 1 or rows.size == 0:
            raise ValueError(f"rows takes int [B'], got {rows.dtype} {rows.shape}")
        if is_concrete(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.batch:
            raise ValueError(f"rows takes rows of this cache, 0 to {self.batch - 1}, got {rows}")
        return rows.astype(jnp.int32)


def register(cls, data: tuple[str, ...] = (), static: tuple[str, ...] = ()):
    """Makes a kind of cache a pytree; ``data`` and ``static`` are the fields that it adds."""
    return jax.tree_util.register_dataclass(cls, (*DATA_FIELDS, *data), (*STATIC_FIELDS, *static))


_write = jax.jit(write)  # one program when called eagerly, too


def is_concrete(*arrays: Any) -> bool:
    return not any(isinstance(x, jax.core.Tracer) for x in arrays)


def host(*arrays: Any) -> tuple[Any, ...]:
    """The arrays as numpy where all are concrete, else as they are."""
    return tuple(map(np.asarray, arrays)) if is_concrete(*arrays) else arrays


def take_rows(tree: Any, rows: Array) -> Any:
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), tree)


def _counts(name: str, counts: Any, batch: int, at_most: int | None = None) -> Array:
    """int32 ``[B]`` of at least 0 (and at most ``at_most``), numpy where concrete."""
    takes = f"int or int [B] = [{batch}]" + ("" if at_most is None else f", 0 to {at_most}")
    if not isinstance(counts, jax.core.Tracer):
        counts = np.asarray(counts)
    if not np.issubdtype(counts.dtype, np.integer):
        raise TypeError(f"{name} takes {takes}, got dtype {counts.dtype}")
    if counts.shape not in ((), (batch,)):
        raise ValueError(f"{name} takes {takes}, got shape {counts.shape}")
    if isinstance(counts, jax.core.Tracer):
        counts = jnp.clip(counts, 0, at_most).astype(jnp.int32)
        return jnp.broadcast_to(counts, (batch,))
    if counts.size and (counts.min() < 0 or (at_most is not None and counts.max() > at_most)):
        raise ValueError(f"{name} takes {takes}, got {counts.tolist()}")
    return np.broadcast_to(counts.astype(np.int32), (batch,))


def encode(key: Array, value: Array | None, dtype: str, stored: Any) -> KeyValueArrays:
    """Tokens ``[B, T, K, size]`` as they are stored, and their scales ``[B, T, K]``."""
    if not quantization.is_quantized(dtype):
        key, value = (
            None if x is None else quantization.to_storage(x, dtype, stored) for x in (key, value)
        )
        return KeyValueArrays(key, value, None, None)
    keys = quantization.quantize(key, dtype)
    if value is None:
        return KeyValueArrays(keys.codes, None, keys.scales, None)
    values = quantization.quantize(value, dtype)
    return KeyValueArrays(keys.codes, values.codes, keys.scales, values.scales)


def empty_fields(
    batch: int,
    rows: int,
    slots: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    value_head_dim: int | None,
    values_in_keys: bool,
    dtype: Any,
    key_center: ArrayLike | None,
) -> dict[str, Any]:
    """The fields of an empty cache whose arrays have so many rows of slots."""
    for name, count in (
        ("batch", batch),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
        ("value_head_dim", head_dim if value_head_dim is None else value_head_dim),
    ):
        positive(name, count)
    dtype = quantization.dtype_name(dtype)
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    if values_in_keys and value_head_dim > head_dim:
        raise ValueError(
            f"value_head_dim takes at most head_dim, {head_dim}, where values are in the keys, got "
            f"{value_head_dim}"
        )
    if key_center is not None:
        key_center = jnp.asarray(key_center)
        if key_center.shape != (num_kv_heads, head_dim):
            raise ValueError(
                f"key_center takes [K, H] = [{num_kv_heads}, {head_dim}], got {key_center.shape}"
            )
        if values_in_keys:
            raise ValueError("key_center takes None where values are in the keys")
        # A copy: the cache is to be donated, and the caller's array is not.
        key_center = jnp.array(key_center, jnp.float32, copy=True)

    def vectors(size):
        return jnp.zeros((rows, num_kv_heads, slots, size), quantization.storage(dtype))

    def scales():
        if not quantization.is_quantized(dtype):
            return None
        return jnp.zeros((rows, num_kv_heads, slots), jnp.float32)

    with_values = not values_in_keys
    return {
        "arrays": KeyValueArrays(
            vectors(head_dim),
            vectors(value_head_dim) if with_values else None,
            scales(),
            scales() if with_values else None,
        ),
        "lengths": jnp.zeros((batch,), jnp.int32),
        "overflowed": jnp.zeros((batch,), bool),
        "key_center": key_center,
        "dtype": dtype,
        "head_dim": head_dim,
        "value_head_dim": value_head_dim,
    }


def positive(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
        raise ValueError(f"{name} takes an int >= 1, got {count!r}")


def bytes_per_token(
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int | None = None,
    *,
    dtype: Any = jnp.bfloat16,
    values_in_keys: bool = False,
) -> int:
    """Bytes that a cache stores per token and layer, scales included.

    >>> bytes_per_token(1, 128), bytes_per_token(1, 128, dtype="int8")
    (512, 264)
    """
    total = quantization.bytes_per_vector(dtype, head_dim)
    if not values_in_keys:
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        total += quantization.bytes_per_vector(dtype, value_head_dim)
    return num_kv_heads * total
