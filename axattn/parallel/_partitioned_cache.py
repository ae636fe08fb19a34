"""The base of caches in parts: the interface of `Cache` over the parts on several devices."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Literal, Self, overload

import jax

from axattn import _serialization
from axattn._arguments import normalize_over_cache
from axattn._call import AttentionCall
from axattn._implementations import registry
from axattn._typing import Array, ArrayLike, Bool, Float, Float32, Integer
from axattn.cache import Cache

# Attributes of some kinds of caches, and the heads, which are a field of `ShardedCache`.
_WHOLE_ATTRIBUTES = ("num_kv_heads", "page_size", "num_pages", "window", "max_append")


@dataclasses.dataclass(frozen=True, eq=False)
class PartitionedCache(_serialization.SerializableValue, abc.ABC):
    """A cache in parts, with the methods of `axattn.cache.Cache`. ``isinstance`` says it is one.

    Attributes:
      cache: the arrays, and the lengths of the whole rows.
    """

    cache: Cache

    @property
    @abc.abstractmethod
    def whole(self) -> Cache:
        """The cache as it would be on one device, with shapes in place of its arrays.

        A cache in parts has its sizes: ``batch``, ``capacity``, ``num_kv_heads`` and others.
        """

    @abc.abstractmethod
    def _append(self, key: Array, value: Array | None, counts: Array, overflowed: Array) -> Self:
        """Return the cache with ``counts`` of the tokens appended to each row."""

    @abc.abstractmethod
    def _attend(self, call: AttentionCall, implementation: tuple[str, ...] | None) -> Any:
        """Return output and LSE of a call over the whole cache; its ``stored`` is None."""

    def __getattr__(self, name: str) -> Any:
        if name in _WHOLE_ATTRIBUTES:
            return getattr(self.whole, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def batch(self) -> int:
        """Batch rows of the whole cache, B."""
        return self.whole.batch

    @property
    def capacity(self) -> int:
        """Tokens that a row of the whole cache can hold."""
        return self.whole.capacity

    @property
    def dtype(self) -> str:
        """Name of the dtype in which keys and values are stored."""
        return self.whole.dtype

    @property
    def head_dim(self) -> int:
        """Key head size, H."""
        return self.whole.head_dim

    @property
    def value_head_dim(self) -> int:
        """Value head size, h."""
        return self.whole.value_head_dim

    @property
    def values_in_keys(self) -> bool:
        """Whether the values are the first ``value_head_dim`` features of the keys."""
        return self.whole.values_in_keys

    @property
    def stores_floats(self) -> bool:
        """Whether keys and values are stored as they are, in ``dtype``."""
        return self.whole.stores_floats

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes, all heads, scales included."""
        return self.whole.bytes_per_token

    @property
    def lengths(self) -> Integer[Array, " B"]:
        """int32 ``[B]``, tokens of each whole row so far."""
        return self.cache.lengths

    @property
    def overflowed(self) -> Bool[Array, " B"]:
        """bool ``[B]``, whether tokens for this row were refused under ``jit``; see `reset`."""
        return self.cache.overflowed

    @property
    def block_table(self) -> Integer[Array, "B pages"]:
        """The block table of a paged cache, int32 ``[B, pages_per_row]``."""
        paged: Any = self.cache
        return paged.block_table

    extend = Cache.extend

    def next_positions(self, length: int) -> Integer[Array, "B T"]:
        """Return the positions of the next tokens: as `axattn.cache.Cache.next_positions`.

        Args:
          length: how many tokens, T.

        Returns:
          int32 ``[B, T]``.
        """
        return Cache.next_positions(self, length)

    def append(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K h"] | None = None,
        *,
        lengths: ArrayLike | None = None,
    ) -> Self:
        """Append tokens to each row: as `axattn.cache.Cache.append`.

        Args:
          key: ``[B, T, K, H]``, of all heads.
          value: ``[B, T, K, h]``; None where values are in the keys.
          lengths: int ``[B]`` or int: how many of the T tokens are real in each row.

        Raises:
          ValueError: shapes that do not fit; tokens that do not fit, where this can be known.
          TypeError: another dtype.
        """
        key, value, counts = self._check_tokens(key, value, lengths)
        counts, overflowed = self.whole._admit(counts)
        return self._append(key, value, counts, overflowed)

    @overload
    def attend(
        self,
        query: Float[Array, "B T N H"],
        *,
        return_residual: Literal[False] = ...,
        **options: Any,
    ) -> Float[Array, "B T N h"]: ...

    @overload
    def attend(
        self,
        query: Float[Array, "B T N H"],
        *,
        return_residual: Literal[True],
        **options: Any,
    ) -> tuple[Float[Array, "B T N h"], Float32[Array, "B T N"]]: ...

    @overload
    def attend(
        self,
        query: Float[Array, "B T N H"],
        *,
        return_residual: bool,
        **options: Any,
    ) -> Float[Array, "B T N h"] | tuple[Float[Array, "B T N h"], Float32[Array, "B T N"]]: ...

    def attend(
        self,
        query: Float[Array, "B T N H"],
        **options: Any,
    ) -> Any:
        """Attend from the newest tokens to the whole cache: as `axattn.cache.Cache.attend`.

        Args:
          query: ``[B, T, N, H]``, of all heads.
          **options: as there, without dropout.

        Returns:
          ``[B, T, N, h]``; with ``return_residual`` also the LSE ``[B, T, N]``.

        Raises:
          ValueError: shapes that do not fit.
          TypeError: an unknown argument, or one that the cache knows itself.
          NotImplementedError: dropout; the named implementation cannot take the call.
        """
        query, parsed = self.whole._parse_query(query, **options)
        implementation = registry.check_names(parsed.implementation)
        call = normalize_over_cache(query, self.whole.stored(), parsed)
        if call.dropout_key is not None:
            raise NotImplementedError("dropout_rate takes 0 over a cache in parts")
        out, lse = self._attend(dataclasses.replace(call, stored=None), implementation)
        return (out, lse) if call.return_residual else out

    def truncate(self, lengths: ArrayLike) -> Self:
        """Keep the first ``lengths`` tokens of each row: as `axattn.cache.Cache.truncate`.

        Args:
          lengths: int or int ``[B]``: tokens that each row keeps.

        Raises:
          ValueError: negative lengths, another shape, or tokens that a ring no longer has.
          TypeError: lengths that are no integers.
        """
        return dataclasses.replace(self, cache=self.cache.truncate(lengths))

    def reset(self, rows: ArrayLike | None = None) -> Self:
        """Empty rows and clear their ``overflowed``.

        Args:
          rows: bool ``[B]``, True where a row is emptied; all by default.

        Raises:
          ValueError: ``rows`` of another dtype or shape.
        """
        return dataclasses.replace(self, cache=self.cache.reset(rows))

    def with_table(self, block_table: ArrayLike, lengths: ArrayLike | None = None) -> Self:
        """Set the block table: as `axattn.cache.PagedCache.with_table`.

        Args:
          block_table: int ``[B, pages_per_row]``; -1 means none.
          lengths: int ``[B]`` or int, the tokens that are stored already.

        Raises:
          ValueError: another shape; lengths beyond ``capacity``.
          TypeError: anything but integers.
        """
        paged: Any = self.whole
        changed = paged.with_table(block_table, lengths)
        return self._replace_in_cache(block_table=changed.block_table, lengths=changed.lengths)

    def _check_tokens(self, key: Any, value: Any, lengths: Any) -> Any:
        return self.whole._check_tokens(key, value, lengths)

    def _replace_in_cache(self, **changes: Any) -> Self:
        return dataclasses.replace(self, cache=dataclasses.replace(self.cache, **changes))


Cache.register(PartitionedCache)  # type: ignore[type-abstract]  # the stub asks for a concrete class


def make_resized_shapes(cache: Cache, **sizes: int) -> Cache:
    """Replace the arrays by shapes with other numbers of ``rows``, ``heads`` or ``slots``."""

    def resize(array):
        rows, heads, slots, *rest = array.shape
        new = sizes.get("rows", rows), sizes.get("heads", heads), sizes.get("slots", slots)
        return jax.ShapeDtypeStruct((*new, *rest), array.dtype)

    return dataclasses.replace(cache, arrays=jax.tree.map(resize, cache.arrays))
