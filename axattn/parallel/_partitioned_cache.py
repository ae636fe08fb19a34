"""What caches in parts have in common: the interface of `Cache`, over one that they hold."""

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

# What only some kinds of caches have, and the heads, which `ShardedCache` has as a field.
_OF_WHOLE = ("num_kv_heads", "page_size", "num_pages", "window", "max_append")


@dataclasses.dataclass(frozen=True, eq=False)
class HeldCache(_serialization.Serializable, abc.ABC):
    """A value like `axattn.cache.Cache`, in parts. ``isinstance(it, Cache)`` holds.

    Attributes:
      cache: the arrays, and the lengths of all rows on all shards.
    """

    cache: Cache

    @property
    @abc.abstractmethod
    def whole(self) -> Cache:
        """The cache as it would be on one device, with shapes in place of its arrays.

        It answers for the sizes of a cache in parts: ``batch``, ``capacity``, ``num_kv_heads``...
        """

    @abc.abstractmethod
    def _append(self, key: Array, value: Array | None, counts: Array, overflowed: Array) -> Self:
        """With tokens of which each row takes so many."""

    @abc.abstractmethod
    def _attend(self, call: AttentionCall, implementation: tuple[str, ...] | None) -> Any:
        """Output and LSE of a call over the whole cache; its ``stored`` is None."""

    def __getattr__(self, name: str) -> Any:
        if name in _OF_WHOLE:
            return getattr(self.whole, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def batch(self) -> int:
        """Batch rows of the whole, B."""
        return self.whole.batch

    @property
    def capacity(self) -> int:
        """Tokens that a row of the whole can hold."""
        return self.whole.capacity

    @property
    def dtype(self) -> str:
        """In which keys and values are stored."""
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
        """int32 ``[B]``, tokens per row so far, of the whole rows."""
        return self.cache.lengths

    @property
    def overflowed(self) -> Bool[Array, " B"]:
        """bool ``[B]``, whether tokens for this row were refused under ``jit``; see `reset`."""
        return self.cache.overflowed

    @property
    def block_table(self) -> Integer[Array, "B pages"]:
        """int32 ``[B, pages_per_row]``, of a paged cache."""
        paged: Any = self.cache
        return paged.block_table

    extend = Cache.extend

    def next_positions(self, length: int) -> Integer[Array, "B T"]:
        """Positions of the next tokens of each row: as `axattn.cache.Cache.next_positions`.

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
        """The cache with more tokens at the end of each row: as `axattn.cache.Cache.append`.

        Args:
          key: ``[B, T, K, H]``, of all heads.
          value: ``[B, T, K, h]``; None where values are in the keys.
          lengths: int ``[B]`` or int: how many of the T tokens are real in each row.

        Raises:
          ValueError: shapes that do not fit; tokens that do not fit, where this can be known.
          TypeError: another dtype.
        """
        key, value, counts = self._checked_tokens(key, value, lengths)
        counts, overflowed = self.whole._admitted(counts)
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
        """Attention of the newest tokens over the whole: as `axattn.cache.Cache.attend`.

        Args:
          query: ``[B, T, N, H]``, of all heads.
          **options: as there, but for dropout.

        Returns:
          ``[B, T, N, h]``; with ``return_residual`` also the LSE ``[B, T, N]``.

        Raises:
          ValueError: shapes that do not fit.
          TypeError: an argument that there is not, or that the cache knows itself.
          NotImplementedError: dropout; the named implementation cannot take the call.
        """
        query, given = self.whole._query_and_options(query, **options)
        implementation = registry.check_names(given.implementation)
        call = normalize_over_cache(query, self.whole.stored(), given)
        if call.dropout_key is not None:
            raise NotImplementedError("dropout_rate takes 0 over a cache in parts")
        out, lse = self._attend(dataclasses.replace(call, stored=None), implementation)
        return (out, lse) if call.return_residual else out

    def truncate(self, lengths: ArrayLike) -> Self:
        """The cache without the tokens at and after ``lengths``: as `axattn.cache.Cache.truncate`.

        Args:
          lengths: int or int ``[B]``: tokens that each row keeps.

        Raises:
          ValueError: negative lengths, or another shape; what a ring no longer has.
          TypeError: lengths that are no integers.
        """
        return dataclasses.replace(self, cache=self.cache.truncate(lengths))

    def reset(self, rows: ArrayLike | None = None) -> Self:
        """The cache with rows emptied and their ``overflowed`` cleared.

        Args:
          rows: bool ``[B]``, True where a row is emptied; all by default.

        Raises:
          ValueError: ``rows`` of another dtype or shape.
        """
        return dataclasses.replace(self, cache=self.cache.reset(rows))

    def with_table(self, block_table: ArrayLike, lengths: ArrayLike | None = None) -> Self:
        """As `axattn.cache.PagedCache.with_table`; a page holds its slots of every shard.

        Args:
          block_table: int ``[B, pages_per_row]``; -1 means none.
          lengths: int ``[B]`` or int, of the tokens that are stored already.

        Raises:
          ValueError: another shape; lengths beyond ``capacity``.
          TypeError: anything but integers.
        """
        paged: Any = self.whole
        changed = paged.with_table(block_table, lengths)
        return self._with(block_table=changed.block_table, lengths=changed.lengths)

    def _checked_tokens(self, key: Any, value: Any, lengths: Any) -> Any:
        return self.whole._checked_tokens(key, value, lengths)

    def _with(self, **changes: Any) -> Self:
        return dataclasses.replace(self, cache=dataclasses.replace(self.cache, **changes))


Cache.register(HeldCache)  # type: ignore[type-abstract]  # the stub asks for a concrete class


def resized(cache: Cache, **sizes: int) -> Cache:
    """``cache`` with shapes in place of its arrays, of other ``rows``, ``heads`` or ``slots``."""

    def shape(array):
        rows, heads, slots, *rest = array.shape
        new = sizes.get("rows", rows), sizes.get("heads", heads), sizes.get("slots", slots)
        return jax.ShapeDtypeStruct((*new, *rest), array.dtype)

    return dataclasses.replace(cache, arrays=jax.tree.map(shape, cache.arrays))
