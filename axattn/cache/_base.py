"""`Cache`, the base of all key/value caches."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Literal, Self, TypeVar, cast, overload

import jax
import jax.numpy as jnp
import numpy as np

from axattn import _jax_compat, _quantization, _serialization
from axattn._arguments import normalize_over_cache
from axattn._attention import Explanation, attend_stored, explain_call
from axattn._call import AttentionCall
from axattn._options import AttentionOptions
from axattn._stored import KeyValueArrays, KVView
from axattn._typing import Array, ArrayLike, Bool, CacheType, Float, Float32, Integer
from axattn.cache._checks import check_counts, convert_to_array, is_concrete, move_to_host
from axattn.cache._storage import bytes_per_token, encode_tokens
from axattn.cache._write import SlotMapping, write_tokens

_Kind = TypeVar("_Kind")

# Arguments of attention that the cache itself knows.
_CACHE_ARGUMENTS = ("key", "value", "key_value_seq_lengths", "kv_positions", "q_offset")

DATA_FIELDS = ("arrays", "lengths", "overflowed", "key_center")
STATIC_FIELDS = ("dtype", "head_dim", "value_head_dim")


@dataclasses.dataclass(frozen=True, eq=False)
class Cache(_serialization.SerializableValue, abc.ABC):
    """Keys and values of the tokens so far, as a value that is passed in, returned and donated.

    The kinds are `DenseCache`, `RingCache` and `PagedCache`, each made by its own ``create``. A
    cache is a pytree, and every method returns a new one. With the old one donated to ``jax.jit``
    the arrays are updated in place. (As ``xs`` of ``lax.scan`` they are copied: keep one cache per
    layer, in a tuple.) Tokens are ``[B, T, K, H]`` outside and head-major inside. Queries have a
    gradient with ``implementation="xla"``; so have keys and values that are stored unchanged.

    Attributes:
      arrays: head-major keys ``[rows, K, slots, H]``, values ``[rows, K, slots, h]`` and, where
        quantized, float32 scales ``[rows, K, slots]`` of both. A row is a batch row, or a page.
      lengths: int32 ``[B]``, tokens per row so far, which is the position of the next one.
      overflowed: bool ``[B]``: under ``jit`` tokens for this row were refused, because they did not
        fit. The stored tokens are untouched, and the row takes no more until `reset`: later tokens
        would get the positions of the missing ones. ``checkify`` raises (debug checks).
      key_center: float32 ``[K, H]`` or None, subtracted from keys before they are stored.
      dtype: name of the dtype of keys and values.
      head_dim: H, the size of a key.
      value_head_dim: h, the size of a value.

    Raises:
      ValueError: by its methods, for wrong shapes, and for tokens that do not fit where this can
        be known. Nothing is changed then.
      TypeError: by its methods, for wrong dtypes and for arguments that the cache knows itself.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn.cache import DenseCache
      >>> cache = DenseCache.create(1, 16, num_kv_heads=1, head_dim=8, dtype="float32")
      >>> @jax.jit
      ... def step(cache, query, key, value):
      ...     return cache.extend(query, key, value)
      >>> prompt = jnp.ones((1, 5, 4, 8)), jnp.ones((1, 5, 1, 8)), jnp.ones((1, 5, 1, 8))
      >>> out, cache = step(cache, *prompt)
      >>> cache.lengths, cache.next_positions(2)
      (Array([5], dtype=int32), Array([[5, 6]], dtype=int32))
      >>> cache = cache.truncate(3)  # two tokens were rejected
      >>> out.shape, int(cache.lengths[0])
      ((1, 5, 4, 8), 3)
    """

    arrays: KeyValueArrays
    lengths: Integer[Array, " B"]
    overflowed: Bool[Array, " B"]
    key_center: Float[Array, "K H"] | None
    dtype: str
    head_dim: int
    value_head_dim: int

    # ---- sizes --------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def capacity(self) -> int:
        """Tokens that a row can hold at a time."""

    @property
    def batch(self) -> int:
        """Batch rows, B."""
        return self.lengths.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads, K."""
        return self.arrays.keys.shape[1]

    @property
    def values_in_keys(self) -> bool:
        """Whether the values are the first ``value_head_dim`` features of the keys."""
        return self.arrays.values is None

    @property
    def stores_floats(self) -> bool:
        """Whether keys and values are stored in ``dtype``, not quantized."""
        return not _quantization.is_quantized(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(map(_quantization.count_bytes, jax.tree.leaves(self.arrays)))

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

    def next_positions(self: CacheType, length: int) -> Integer[Array, "B T"]:
        """Return the positions of the next tokens of each row, for RoPE.

        Args:
          length: how many tokens, T.

        Returns:
          int32 ``[B, T]``.
        """
        return self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None]

    def stored(self) -> KVView:
        """Return what attention reads: the arrays and their meaning, without lengths and masks."""
        return KVView(
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
        """Append tokens to the end of each row.

        Args:
          key: ``[B, T, K, H]``, any T, after RoPE. Its dtype is the cache's; a quantized cache
            takes any floating-point dtype.
          value: ``[B, T, K, h]``; None where values are in the keys.
          lengths: int ``[B]`` or int: how many of the T tokens are real in each row, 0 to T; the
            others are padding with any content. T by default.

        Returns:
          The cache with the new tokens. This one does not change.

        Raises:
          ValueError: wrong shapes; tokens that do not fit, where this can be known. Under ``jit``
            such a row does not change and its ``overflowed`` is set.
          TypeError: another dtype.

        Example:
          >>> import jax.numpy as jnp
          >>> from axattn.cache import DenseCache
          >>> cache = DenseCache.create(2, 16, num_kv_heads=1, head_dim=8, dtype="int8")
          >>> key = value = jnp.ones((2, 4, 1, 8))
          >>> cache.append(key, value, lengths=jnp.array([4, 2])).lengths.tolist()
          [4, 2]
        """
        key, value, counts = self._check_tokens(key, value, lengths)
        return self._append(key, value, counts) if key.shape[1] else self

    @overload
    def attend(
        self,
        query: Float[Array, "B T N H"],
        *,
        query_seq_lengths: ArrayLike | None = ...,
        q_positions: ArrayLike | None = ...,
        is_causal: bool = ...,
        return_residual: Literal[False] = ...,
        **options: Any,
    ) -> Float[Array, "B T N h"]: ...

    @overload
    def attend(
        self,
        query: Float[Array, "B T N H"],
        *,
        query_seq_lengths: ArrayLike | None = ...,
        q_positions: ArrayLike | None = ...,
        is_causal: bool = ...,
        return_residual: Literal[True],
        **options: Any,
    ) -> tuple[Float[Array, "B T N h"], Float32[Array, "B T N"]]: ...

    @overload
    def attend(
        self,
        query: Float[Array, "B T N H"],
        *,
        query_seq_lengths: ArrayLike | None = ...,
        q_positions: ArrayLike | None = ...,
        is_causal: bool = ...,
        return_residual: bool,
        **options: Any,
    ) -> Float[Array, "B T N h"] | tuple[Float[Array, "B T N h"], Float32[Array, "B T N"]]: ...

    def attend(
        self,
        query: Float[Array, "B T N H"],
        *,
        query_seq_lengths: ArrayLike | None = None,
        q_positions: ArrayLike | None = None,
        is_causal: bool = True,
        **options: Any,
    ) -> Float[Array, "B T N h"] | tuple[Float[Array, "B T N h"], Float32[Array, "B T N"]]:
        """Attend from the newest tokens to all stored tokens.

        Args:
          query: ``[B, T, N, H]``, floating point; N a multiple of K. By default these are the
            queries of the T tokens that were appended last.
          query_seq_lengths: int ``[B]`` or int: how many of the T are real (``lengths`` of
            `append`); the others give zeros.
          q_positions: int ``[T]`` or ``[B, T]``, for queries at other positions.
          is_causal: False where every query sees all stored tokens (cross-attention).
          **options: as in `axattn.dot_product_attention`. In an array for ``mask`` or ``bias`` S
            counts the slots of a row, ``capacity``.

        Returns:
          ``[B, T, N, h]`` in the query's dtype; with ``return_residual`` also the LSE, float32
          ``[B, T, N]``. A row without tokens gives zeros.

        Raises:
          ValueError: wrong shapes.
          TypeError: an argument that the cache knows itself: ``key``, ``value``, ``kv_positions``,
            ``key_value_seq_lengths`` or ``q_offset``; another dtype.
          NotImplementedError: the named implementation does not support the call.
        """
        query, parsed = self._parse_query(
            query,
            query_seq_lengths=query_seq_lengths,
            q_positions=q_positions,
            is_causal=is_causal,
            **options,
        )
        return attend_stored(query, self.stored(), parsed)

    def explain_implementations(
        self, query: Any, *, target: str | None = None, **options: Any
    ) -> Explanation:
        """Explain which implementations support a call of `attend`, and which one ``None`` takes.

        Nothing is computed.

        Args:
          query: ``[B, T, N, H]``, an array or a ``jax.ShapeDtypeStruct``. The cache, too, may have
            shapes in place of its arrays (``jax.eval_shape`` of its ``create``).
          target: the name of a chip in ``axattn.aot.TARGETS``; None for this process's devices.
          **options: as in `attend`.

        Returns:
          As `axattn.explain_implementations`.

        Raises:
          ValueError, TypeError: what `attend` would raise for these arguments; an unknown target.

        Example:
          >>> import jax
          >>> from axattn.cache import DenseCache
          >>> cache = DenseCache.create(2, 4096, num_kv_heads=1, head_dim=128, dtype="int8")
          >>> query = jax.ShapeDtypeStruct((2, 1, 16, 128), "bfloat16")
          >>> cache.explain_implementations(query, target="v5p").chosen
          'mosaic_tpu'
        """

        def make_call(cache: Cache, query: Any, **options: Any) -> AttentionCall:
            query, parsed = cache._parse_query(query, **options)
            return normalize_over_cache(query, cache.stored(), parsed)

        return explain_call(make_call, dict(cache=self, query=query, **options), target)

    @overload
    def extend(
        self: CacheType,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K h"] | None = ...,
        *,
        lengths: ArrayLike | None = ...,
        return_residual: Literal[False] = ...,
        **options: Any,
    ) -> tuple[Float[Array, "B T N h"], CacheType]: ...

    @overload
    def extend(
        self: CacheType,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K h"] | None = ...,
        *,
        lengths: ArrayLike | None = ...,
        return_residual: Literal[True],
        **options: Any,
    ) -> tuple[tuple[Float[Array, "B T N h"], Float32[Array, "B T N"]], CacheType]: ...

    @overload
    def extend(
        self: CacheType,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K h"] | None = ...,
        *,
        lengths: ArrayLike | None = ...,
        return_residual: bool,
        **options: Any,
    ) -> tuple[
        Float[Array, "B T N h"] | tuple[Float[Array, "B T N h"], Float32[Array, "B T N"]], CacheType
    ]: ...

    def extend(
        self: CacheType,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K h"] | None = None,
        *,
        lengths: ArrayLike | None = None,
        **options: Any,
    ) -> tuple[
        Float[Array, "B T N h"] | tuple[Float[Array, "B T N h"], Float32[Array, "B T N"]], CacheType
    ]:
        """Append tokens, then attend from them: one step of a layer.

        Args:
          query: ``[B, T, N, H]``, floating point; N a multiple of K.
          key: ``[B, T, K, H]``, as in `append`.
          value: ``[B, T, K, h]``; None where values are in the keys.
          lengths: int ``[B]`` or int: how many of the T tokens are real in each row.
          **options: as in `attend`.

        Returns:
          ``(output, cache)``; output ``[B, T, N, h]``, zeros in a row that overflowed.

        Raises:
          ValueError, TypeError: as `append` and `attend`; different numbers of queries and keys;
            ``query_seq_lengths``, which is ``lengths`` here.
          NotImplementedError: the named implementation does not support the call.
        """
        if "query_seq_lengths" in options:
            raise TypeError("extend takes no argument query_seq_lengths: lengths says it")
        if jnp.shape(query)[1:2] != jnp.shape(key)[1:2]:
            raise ValueError(
                f"query takes as many tokens as key, got {jnp.shape(query)} and {jnp.shape(key)}; "
                "append and attend apart take other numbers"
            )
        # Type checkers see only the common class of all caches here.
        cache = cast(CacheType, self.append(key, value, lengths=lengths))
        counts = cache.lengths - self.lengths
        return cache.attend(query, query_seq_lengths=counts, **options), cache

    # ---- other changes ------------------------------------------------------------------------

    def truncate(self, lengths: ArrayLike) -> Self:
        """Keep the first ``lengths`` tokens of each row, for instance without rejected drafts.

        Shorter rows do not change.

        Args:
          lengths: int or int ``[B]``: tokens that each row keeps.

        Raises:
          ValueError: negative lengths, or another shape.
          TypeError: lengths that are no integers.
        """
        lengths = check_counts("lengths", lengths, self.batch)
        return dataclasses.replace(self, lengths=jnp.minimum(self.lengths, lengths))

    def reset(self, rows: ArrayLike | None = None) -> Self:
        """Empty rows and clear their ``overflowed``.

        Args:
          rows: bool ``[B]``, True for the rows to empty; all by default.

        Raises:
          ValueError: ``rows`` of another dtype or shape.
        """
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
        """Return a cache whose row i is row ``rows[i]`` of this one, for beams and samples.

        The rows are copied. Indices must be in range: under ``jit`` they are clipped.

        Args:
          rows: int ``[B']``, rows of this cache; B' is the batch of the new one.

        Raises:
          ValueError: another dtype or shape, or rows that this cache does not have.
          TypeError: ``rows`` is no array.

        Example:
          >>> import jax.numpy as jnp
          >>> from axattn.cache import DenseCache
          >>> cache = DenseCache.create(2, 8, num_kv_heads=1, head_dim=4)
          >>> cache.fork(jnp.array([0, 0, 1])).batch  # two continuations of row 0, one of row 1
          3
        """
        rows = self._check_rows(rows)
        changes = {name: _take_rows(getattr(self, name), rows) for name in self._list_row_fields()}
        if self.key_center is not None:
            changes["key_center"] = jnp.array(self.key_center, copy=True)  # each can be donated
        return dataclasses.replace(self, **changes)

    # ---- for the kinds of caches --------------------------------------------------------------

    def _list_row_fields(self) -> tuple[str, ...]:
        """Return the fields with batch rows, which `fork` selects from."""
        return ("arrays", "lengths", "overflowed")

    @abc.abstractmethod
    def _check_room(self, counts: Array) -> tuple[Array, str]:
        """Return which rows have room for ``counts`` tokens, bool [B], and the error message.

        Both are computed with numpy where all arrays are concrete.
        """

    @abc.abstractmethod
    def _map_slots(self, counts: Array, length: int) -> SlotMapping:
        """Return the slots of the next tokens, ``counts`` of the ``length`` in each row."""

    def _parse_query(
        self,
        query: Any,
        *,
        query_seq_lengths: ArrayLike | None = None,
        q_positions: ArrayLike | None = None,
        is_causal: bool = True,
        **options: Any,
    ) -> tuple[Array, AttentionOptions]:
        """Return the query, and options of the user and of the cache as one value."""
        query = convert_to_array("query", query)
        length = query.shape[1] if query.ndim == 4 else 0  # else `attend_stored` raises
        self._check_options(options, length, q_positions, is_causal)
        if query_seq_lengths is not None:
            query_seq_lengths = check_counts(
                "query_seq_lengths", query_seq_lengths, self.batch, at_most=length
            )
        if q_positions is None and is_causal and length:
            count = length if query_seq_lengths is None else query_seq_lengths
            first = self.lengths - jnp.asarray(count, jnp.int32)
            q_positions = first[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        return query, AttentionOptions.parse(
            "attend",
            **{**self._make_mask_options(), **options},
            query_seq_lengths=query_seq_lengths,
            q_positions=q_positions,
            is_causal=is_causal,
        )

    def _make_mask_options(self) -> dict[str, Any]:
        return {"key_value_seq_lengths": self.lengths}

    def _check_options(
        self, options: dict[str, Any], length: int, q_positions: Any, is_causal: bool
    ) -> None:
        for name in options:
            if name in _CACHE_ARGUMENTS:
                raise TypeError(f"attend takes no argument {name}: the cache knows it")

    def _append(self, key: Array, value: Array | None, counts: Array) -> Self:
        counts, overflowed = self._admit(counts)
        mapping = self._map_slots(counts, key.shape[1])
        arrays = _write_jitted(self.arrays, self._encode(key, value), mapping)
        return dataclasses.replace(
            self, arrays=arrays, lengths=self.lengths + counts, overflowed=overflowed
        )

    def _admit(self, counts: Array) -> tuple[Array, Array]:
        """Return how many of the new tokens each row takes, int32 [B], and ``overflowed``.

        Raises:
          ValueError: tokens that do not fit, where this can be known.
        """
        fits, message = self._check_room(counts)
        (overflowed,) = move_to_host(self.overflowed)
        if is_concrete(fits, overflowed):
            if np.any(overflowed & (np.asarray(counts) > 0)):
                rows = np.nonzero(overflowed)[0].tolist()
                raise ValueError(f"rows {rows} have overflowed: reset them before more tokens")
            if not np.all(fits):
                raise ValueError(message)
        else:
            fits = jnp.asarray(fits)
            _jax_compat.check_in_debug(fits.all(), message)
            counts = jnp.where(fits & ~self.overflowed, counts, 0)
        return jnp.asarray(counts, jnp.int32), self.overflowed | ~jnp.asarray(fits)

    def _check_tokens(
        self, key: Any, value: Any, lengths: Any
    ) -> tuple[Array, Array | None, Array]:
        """Check new keys and values; return them and their number in each row."""
        key = self._check_vectors("key", key, self.head_dim)
        length = key.shape[1]
        if self.values_in_keys:
            if value is not None:
                raise ValueError("value takes None: in this cache the values are in the keys")
        else:
            value = self._check_vectors("value", value, self.value_head_dim)
            if value.shape[1] != length:
                raise ValueError(
                    f"value takes as many tokens as key, {length}, got shape {value.shape}"
                )
        counts = length if lengths is None else lengths
        return key, value, check_counts("lengths", counts, self.batch, at_most=length)

    def _check_vectors(self, name: str, x: Any, size: int) -> Array:
        takes = f"[B, T, K, size] = [{self.batch}, T, {self.num_kv_heads}, {size}]"
        if x is None:
            raise ValueError(f"{name} takes {takes}, got None")
        x = convert_to_array(name, x)
        shape = (self.batch, *x.shape[1:2], self.num_kv_heads, size)
        if x.ndim != 4 or x.shape != shape:
            raise ValueError(f"{name} takes {takes} for this cache, got {x.shape}")
        if not self.stores_floats:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise TypeError(f"{name} takes a floating-point dtype, got {x.dtype}")
        elif x.dtype != jnp.dtype(self.dtype):
            raise TypeError(
                f"{name} takes the dtype of the cache, {self.dtype}, got {x.dtype}; cast it, or "
                "create the cache with another dtype"
            )
        return x

    def _encode(self, key: Array, value: Array | None) -> KeyValueArrays:
        """Return new tokens in the form in which they are stored."""
        if self.key_center is not None:
            center = self.key_center.astype(jnp.float32)[None, None]
            key = (key.astype(jnp.float32) - center).astype(
                key.dtype if self.stores_floats else jnp.float32
            )
        return encode_tokens(key, value, self.dtype, self.arrays.keys.dtype)

    def _check_rows(self, rows: Any) -> Array:
        rows = convert_to_array("rows", rows)
        if not jnp.issubdtype(rows.dtype, jnp.integer) or rows.ndim != 1 or rows.size == 0:
            raise ValueError(f"rows takes int [B'], got {rows.dtype} {rows.shape}")
        if is_concrete(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.batch:
            raise ValueError(f"rows takes rows of this cache, 0 to {self.batch - 1}, got {rows}")
        return rows.astype(jnp.int32)


def register_kind(
    cls: type[_Kind], data: tuple[str, ...] = (), static: tuple[str, ...] = ()
) -> type[_Kind]:
    """Make a kind of cache a pytree; ``data`` and ``static`` are the fields that it adds."""
    fields = (*DATA_FIELDS, *data), (*STATIC_FIELDS, *static)
    return _serialization.register_dataclass(cls, *fields)


_write_jitted = jax.jit(write_tokens)  # so that an eager call compiles one program


def _take_rows(tree: Any, rows: Array) -> Any:
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), tree)
