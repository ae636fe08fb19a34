"""A cache in pages: rows share one pool, and a page can be in several rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from axattn._stored import Stored
from axattn._typing import Array, ArrayLike, Integer
from axattn.cache._base import Cache, register
from axattn.cache._checks import as_array, counts_of, host, is_concrete, positive
from axattn.cache._storage import empty_fields, given_fields
from axattn.cache._write import Places, runs_of


@lambda cls: register(cls, data=("block_table",))
@dataclasses.dataclass(frozen=True, eq=False)
class PagedCache(Cache):
    """A cache in pages: rows share one pool, and a page can be in several rows.

    PagedAttention, https://arxiv.org/abs/2309.06180. Token p of row b is in slot p % page_size of
    page ``block_table[b, p // page_size]``; arrays are ``[num_pages, K, page_size, size]``. The
    table is made on the host, by `PagePool` or by anything else, and handed over with `with_table`
    whenever it changes; all shapes are static. Made by `create`; methods and the other attributes
    are those of `Cache`.

    Attributes:
      block_table: int32 ``[B, pages_per_row]``. Entries for tokens that are not there may be
        anything; -1 means none.

    Raises:
      ValueError: by `create` and the methods, for sizes and tokens that do not fit: also tokens
        that have no page.
      TypeError: by both, for dtypes that cannot be.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn.cache import PagedCache, PagePool
      >>> cache = PagedCache.create(
      ...     2, num_pages=6, page_size=4, pages_per_row=3, num_kv_heads=1, head_dim=8
      ... )
      >>> pool = PagePool(num_pages=6, page_size=4)
      >>> rows = [pool.allocate(range(6)), pool.allocate(range(9))]
      >>> cache = cache.with_table(pool.block_table(rows, pages_per_row=3))
      >>> cache.block_table.tolist()
      [[0, 1, -1], [2, 3, 4]]
      >>> key = value = jnp.ones((2, 9, 1, 8), jnp.bfloat16)
      >>> cache.append(key, value, lengths=pool.lengths(rows)).lengths.tolist()
      [6, 9]
    """

    block_table: Integer[Array, "B pages"]

    @staticmethod
    def create(
        batch: int,
        num_pages: int,
        page_size: int,
        pages_per_row: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        values_in_keys: bool = False,
        dtype: DTypeLike = jnp.bfloat16,
        key_center: ArrayLike | None = None,
    ) -> PagedCache:
        """An empty pool of ``num_pages`` pages and a table of -1 for ``batch`` rows.

        Args:
          batch, num_kv_heads, head_dim: B, K and H.
          num_pages, page_size: pages in the pool and tokens per page.
          pages_per_row: most pages that a row can have.
          value_head_dim, values_in_keys, dtype: as in `DenseCache.create`.
          key_center: float ``[K, H]``, as there.

        Raises:
          ValueError: sizes that are no positive integers, or do not fit together.
          TypeError: another ``dtype``, or a ``key_center`` that is not floating point.
        """
        for name, count in (
            ("num_pages", num_pages),
            ("page_size", page_size),
            ("pages_per_row", pages_per_row),
        ):
            positive(name, count)
        fields = empty_fields(
            batch,
            num_pages,
            page_size,
            num_kv_heads,
            head_dim,
            value_head_dim=value_head_dim,
            values_in_keys=values_in_keys,
            dtype=dtype,
            key_center=key_center,
        )
        return PagedCache(**fields, block_table=jnp.full((batch, pages_per_row), -1, jnp.int32))

    @staticmethod
    def from_arrays(
        keys: ArrayLike,
        values: ArrayLike | None = None,
        *,
        block_table: ArrayLike,
        lengths: ArrayLike,
        key_scales: ArrayLike | None = None,
        value_scales: ArrayLike | None = None,
        value_head_dim: int | None = None,
        dtype: DTypeLike | None = None,
        key_center: ArrayLike | None = None,
    ) -> PagedCache:
        """A cache over a pool of pages that is there already, with its tokens.

        The arrays become the cache's, without a copy: where it is donated, they are gone. (What a
        cache stores as bits, float8 and with older versions of JAX bfloat16 on CPUs, is copied
        where it is given as numbers.) A vector is its scale times its codes: see
        `axattn.quantization`.

        Args:
          keys: ``[num_pages, K, page_size, H]``, after RoPE, as they are stored.
          values: ``[num_pages, K, page_size, h]``; None: the first h features of the keys.
          block_table: int ``[B, pages_per_row]``, the pages of each row; -1 means none.
          lengths: int ``[B]`` or int, tokens of each row that are in its pages.
          key_scales: float32 ``[num_pages, K, page_size]`` of int8, float8 or int4; else None.
          value_scales: likewise float32 ``[num_pages, K, page_size]``, of the values.
          value_head_dim: h where ``values`` is None; H by default.
          dtype: of keys and values; by default that of the array. Where the arrays hold bits
            (uint8 of float8_e4m3fn, uint16 of bfloat16), what these are.
          key_center: float ``[K, H]``, what was subtracted from the keys.

        Raises:
          ValueError: shapes that do not fit together; scales that lack, or are not wanted; lengths
            beyond the row's pages, or with entries of the table that are no pages of the pool.
          TypeError: other dtypes.

        Example:
          >>> import jax.numpy as jnp
          >>> from axattn.cache import PagedCache
          >>> pool, scales = jnp.ones((6, 2, 16, 64), jnp.int8), jnp.ones((6, 2, 16)) / 127
          >>> cache = PagedCache.from_arrays(
          ...     pool, pool, key_scales=scales, value_scales=scales,
          ...     block_table=jnp.array([[4, 0], [2, -1]]), lengths=jnp.array([20, 16]),
          ... )
          >>> cache.dtype, cache.num_pages, cache.lengths.tolist()
          ('int8', 6, [20, 16])
          >>> cache.attend(jnp.ones((2, 1, 8, 64))).shape
          (2, 1, 8, 64)
        """
        fields = given_fields(
            keys,
            values,
            key_scales,
            value_scales,
            rows="num_pages",
            slots="page_size",
            value_head_dim=value_head_dim,
            dtype=dtype,
            key_center=key_center,
        )
        shape = jnp.shape(block_table)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"block_table takes [B, pages_per_row], got shape {shape}")
        empty = PagedCache(
            **fields,
            lengths=jnp.zeros(shape[:1], jnp.int32),
            overflowed=jnp.zeros(shape[:1], bool),
            block_table=jnp.full(shape, -1, jnp.int32),
        )
        cache = empty.with_table(block_table)
        lengths = counts_of("lengths", lengths, cache.batch, at_most=cache.capacity)
        fits, message = cache._fits(lengths)
        if is_concrete(fits) and not np.all(fits):
            raise ValueError(f"lengths takes tokens that have a page: {message}")
        return dataclasses.replace(cache, lengths=jnp.array(lengths, jnp.int32))

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.arrays.keys.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.arrays.keys.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens that a row's part of the table can name."""
        return self.block_table.shape[1] * self.page_size

    def stored(self) -> Stored:
        """As `Cache.stored`, with the table."""
        return dataclasses.replace(super().stored(), block_table=self.block_table)

    def with_table(self, block_table: ArrayLike, lengths: ArrayLike | None = None) -> PagedCache:
        """The cache with another table and, where given, other lengths.

        ``overflowed`` stays: `reset` clears it.

        Args:
          block_table: int ``[B, pages_per_row]``; -1 means none.
          lengths: int ``[B]`` or int, of the tokens that are stored already: after a prefix was
            found in the pool, or where a row now is another sequence.

        Raises:
          ValueError: another shape; lengths beyond ``capacity``.
          TypeError: anything but integers.
        """
        block_table = jnp.array(as_array("block_table", block_table), copy=True)
        if not jnp.issubdtype(block_table.dtype, jnp.integer):
            raise TypeError(f"block_table takes integers, got {block_table.dtype}")
        if block_table.shape != self.block_table.shape:
            raise ValueError(
                f"block_table takes [B, pages_per_row] = {list(self.block_table.shape)}, got "
                f"shape {block_table.shape}"
            )
        changes: dict[str, Any] = {"block_table": block_table.astype(jnp.int32)}
        if lengths is not None:
            lengths = counts_of("lengths", lengths, self.batch, at_most=self.capacity)
            changes["lengths"] = jnp.array(lengths, jnp.int32)
        return dataclasses.replace(self, **changes)

    def copy_pages(self, sources: ArrayLike, targets: ArrayLike) -> PagedCache:
        """The cache with page ``targets[i]`` a copy of page ``sources[i]``, in this order.

        What copy-on-write asks for, see `PagePool.take_copies`. Call it inside the donated step: by
        itself it copies the pool.

        Args:
          sources: int ``[n]``, pages that are copied; a pair with -1 is left out.
          targets: int ``[n]``, pages that become the copies.

        Raises:
          ValueError: shapes that differ, or pages that the pool does not have.
          TypeError: anything but integers.
        """
        sources, targets = as_array("sources", sources), as_array("targets", targets)
        for name, x in (("sources", sources), ("targets", targets)):
            if not jnp.issubdtype(x.dtype, jnp.integer) and x.size:
                raise TypeError(f"{name} takes int [n], got {x.dtype}")
            if x.ndim != 1 or x.shape != sources.shape:
                raise ValueError(f"{name} takes int [n] like the other, got shape {x.shape}")
            if (
                is_concrete(x)
                and x.size
                and not -1 <= int(x.min()) <= int(x.max()) < self.num_pages
            ):
                raise ValueError(f"{name} takes pages 0 to {self.num_pages - 1} or -1, got {x}")
        if sources.size == 0:
            return self
        # A few sizes only, lest every number of copies be compiled anew.
        room = (0, (1 << (sources.size - 1).bit_length()) - sources.size)
        sources, targets = (
            jnp.pad(x.astype(jnp.int32), room, constant_values=-1) for x in (sources, targets)
        )
        arrays = _copy_pages(self.arrays, sources, targets)
        return dataclasses.replace(self, arrays=arrays)

    def fork(self, rows: ArrayLike) -> PagedCache:
        """A cache whose row i has the pages of row ``rows[i]``; nothing is copied.

        Both caches have the same arrays: donate one of them only.

        Rows that share a page that is not full must not both append to it: give each its own copy
        first (`PagePool.fork` says which).

        Args:
          rows: int ``[B']``, rows of this cache; B' is the batch of the new one.

        Raises:
          ValueError: another dtype or shape, or rows that this cache does not have.
          TypeError: ``rows`` is no array.
        """
        return super().fork(rows)

    def _per_row(self):
        return ("block_table", "lengths", "overflowed")

    def _fits(self, counts):
        lengths, counts, table = host(self.lengths, counts, self.block_table)
        np_ = np if is_concrete(lengths) else jnp
        total = lengths + counts
        # Every page that the new tokens touch has to be there.
        page = np_.arange(table.shape[1], dtype=np.int32)[None]
        touched = (page >= (lengths // self.page_size)[:, None]) & (
            page * self.page_size < total[:, None]
        )
        touched &= (counts > 0)[:, None]
        assigned = (table >= 0) & (table < self.num_pages)
        fits = (total <= self.capacity) & (assigned | ~touched).all(1)
        message = (
            f"a row's block_table has room for {self.capacity} tokens, and needs a page of the "
            f"pool ({self.num_pages} pages of {self.page_size}) for each token"
        )
        if np_ is np:
            rows = np.nonzero(~fits)[0].tolist()
            message += (
                f": rows {rows} with lengths {lengths[rows].tolist()} and {counts[rows].tolist()} "
                f"more tokens do not have them"
            )
        return fits, message

    def _places(self, counts, length):
        first = self.lengths // self.page_size
        run = first[:, None] + jnp.arange(runs_of(length, self.page_size), dtype=jnp.int32)[None]
        rows = jnp.take_along_axis(self.block_table, run, axis=1, mode="clip")
        return Places(self.lengths, counts, rows)


@jax.jit
def _copy_pages(arrays: Any, sources: Array, targets: Array) -> Any:
    def copy(i, arrays):
        ok = (sources[i] >= 0) & (targets[i] >= 0)
        source = jnp.maximum(sources[i], 0)
        target = jnp.where(ok, targets[i], source)  # onto itself

        def one(array):
            page = lax.dynamic_slice_in_dim(array, source, 1, 0)
            return lax.dynamic_update_slice_in_dim(array, page, target, 0)

        return jax.tree.map(one, arrays)

    return lax.fori_loop(0, sources.shape[0], copy, arrays)
