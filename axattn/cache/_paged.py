"""A cache whose rows have pages of one pool; rows can share a page."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from axattn._stored import KVView
from axattn._typing import Array, ArrayLike, Integer
from axattn.cache._base import Cache, register_kind
from axattn.cache._checks import (
    check_counts,
    check_positive,
    convert_to_array,
    is_concrete,
    move_to_host,
)
from axattn.cache._storage import make_empty_fields, wrap_arrays
from axattn.cache._write import SlotMapping, count_runs


@lambda cls: register_kind(cls, data=("block_table",))
@dataclasses.dataclass(frozen=True, eq=False)
class PagedCache(Cache):
    """A cache whose rows have pages of one pool; rows can share a page.

    PagedAttention, https://arxiv.org/abs/2309.06180. Token p of row b is in slot p % page_size of
    page ``block_table[b, p // page_size]``; arrays are ``[num_pages, K, page_size, size]``. The
    host makes the table, with `PagePool` or otherwise, and sets it by `with_table` whenever it
    changes; all shapes are static. `create` makes the cache. Methods and the other attributes are
    those of `Cache`.

    Attributes:
      block_table: int32 ``[B, pages_per_row]``; -1 means no page. Entries after the last token of a
        row can be anything.

    Raises:
      ValueError: by `create` and the methods, for wrong sizes, and for tokens that do not fit or
        have no page.
      TypeError: by both, for wrong dtypes.

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
        """Create an empty pool of ``num_pages`` pages and a table of -1 for ``batch`` rows.

        Args:
          batch, num_kv_heads, head_dim: B, K and H.
          num_pages, page_size: pages in the pool and tokens per page.
          pages_per_row: maximum number of pages of a row.
          value_head_dim, values_in_keys, dtype: as in `DenseCache.create`.
          key_center: float ``[K, H]``, as in `DenseCache.create`.

        Raises:
          ValueError: sizes that are not positive integers, or that contradict each other.
          TypeError: another ``dtype``, or a ``key_center`` that is not floating point.
        """
        for name, count in (
            ("num_pages", num_pages),
            ("page_size", page_size),
            ("pages_per_row", pages_per_row),
        ):
            check_positive(name, count)
        fields = make_empty_fields(
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
        """Make a cache of an existing pool of pages and the tokens in them.

        The cache takes over the arrays without a copy: donating it deletes them. (A cache stores
        float8 as bits, and with older versions of JAX bfloat16 on CPUs: such arrays are copied,
        unless they are bits already.) A vector is its scale times its codes: see
        `axattn.quantization`.

        Args:
          keys: ``[num_pages, K, page_size, H]``, after RoPE.
          values: ``[num_pages, K, page_size, h]``; None if they are the first h features of the
            keys.
          block_table: int ``[B, pages_per_row]``, the pages of each row; -1 means no page.
          lengths: int ``[B]`` or int, tokens of each row in its pages.
          key_scales: float32 ``[num_pages, K, page_size]`` for int8, float8 and int4; else None.
          value_scales: likewise float32 ``[num_pages, K, page_size]``, of the values.
          value_head_dim: h if ``values`` is None; H by default.
          dtype: dtype of keys and values; by default that of the array. Arrays of bits (uint8 for
            float8_e4m3fn, uint16 for bfloat16) need it.
          key_center: float ``[K, H]`` that was subtracted from the keys.

        Raises:
          ValueError: shapes that contradict each other; missing or superfluous scales; lengths
            beyond the row's pages, or tokens whose entry of the table is no page of the pool.
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
        fields = wrap_arrays(
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
        lengths = check_counts("lengths", lengths, cache.batch, at_most=cache.capacity)
        fits, message = cache._check_room(lengths)
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
        """Tokens that a row has room for in its part of the table."""
        return self.block_table.shape[1] * self.page_size

    def stored(self) -> KVView:
        """Return what attention reads, as `Cache.stored`, with the table."""
        return dataclasses.replace(super().stored(), block_table=self.block_table)

    def with_table(self, block_table: ArrayLike, lengths: ArrayLike | None = None) -> PagedCache:
        """Replace the block table and, if they are given, the lengths.

        ``overflowed`` stays: `reset` clears it.

        Args:
          block_table: int ``[B, pages_per_row]``; -1 means no page.
          lengths: int ``[B]`` or int, the tokens that are stored already: for a row with a prefix
            from the pool, or with another sequence than before.

        Raises:
          ValueError: another shape; lengths beyond ``capacity``.
          TypeError: anything but integers.
        """
        block_table = jnp.array(convert_to_array("block_table", block_table), copy=True)
        if not jnp.issubdtype(block_table.dtype, jnp.integer):
            raise TypeError(f"block_table takes integers, got {block_table.dtype}")
        if block_table.shape != self.block_table.shape:
            raise ValueError(
                f"block_table takes [B, pages_per_row] = {list(self.block_table.shape)}, got "
                f"shape {block_table.shape}"
            )
        changes: dict[str, Any] = {"block_table": block_table.astype(jnp.int32)}
        if lengths is not None:
            lengths = check_counts("lengths", lengths, self.batch, at_most=self.capacity)
            changes["lengths"] = jnp.array(lengths, jnp.int32)
        return dataclasses.replace(self, **changes)

    def copy_pages(self, sources: ArrayLike, targets: ArrayLike) -> PagedCache:
        """Copy page ``sources[i]`` to page ``targets[i]``, in this order.

        This does the copies of `PagePool.take_copies`. Call it inside the step that donates the
        cache: an eager call copies the whole pool.

        Args:
          sources: int ``[n]``, pages to copy from; a pair with -1 is skipped.
          targets: int ``[n]``, pages to copy to.

        Raises:
          ValueError: shapes that differ, or pages that the pool does not have.
          TypeError: anything but integers.
        """
        sources = convert_to_array("sources", sources)
        targets = convert_to_array("targets", targets)
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
        # Pad to a power of two, so that only a few sizes are compiled.
        room = (0, (1 << (sources.size - 1).bit_length()) - sources.size)
        sources, targets = (
            jnp.pad(x.astype(jnp.int32), room, constant_values=-1) for x in (sources, targets)
        )
        arrays = _copy_pages(self.arrays, sources, targets)
        return dataclasses.replace(self, arrays=arrays)

    def fork(self, rows: ArrayLike) -> PagedCache:
        """Return a cache whose row i has the pages of row ``rows[i]``; nothing is copied.

        Both caches have the same arrays: donate only one of them. Rows that share a page with free
        slots must not both append to it: copy it first (see `PagePool.fork`).

        Args:
          rows: int ``[B']``, rows of this cache; B' is the batch of the new one.

        Raises:
          ValueError: another dtype or shape, or rows that this cache does not have.
          TypeError: ``rows`` is no array.
        """
        return super().fork(rows)

    def _list_row_fields(self):
        return ("block_table", "lengths", "overflowed")

    def _check_room(self, counts):
        lengths, counts, table = move_to_host(self.lengths, counts, self.block_table)
        np_ = np if is_concrete(lengths) else jnp
        total = lengths + counts
        # Every page that gets new tokens has to be in the table.
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

    def _map_slots(self, counts, length):
        first = self.lengths // self.page_size
        run = first[:, None] + jnp.arange(count_runs(length, self.page_size), dtype=jnp.int32)[None]
        rows = jnp.take_along_axis(self.block_table, run, axis=1, mode="clip")
        return SlotMapping(self.lengths, counts, rows)


@jax.jit
def _copy_pages(arrays: Any, sources: Array, targets: Array) -> Any:
    def copy_page(i, arrays):
        ok = (sources[i] >= 0) & (targets[i] >= 0)
        source = jnp.maximum(sources[i], 0)
        target = jnp.where(ok, targets[i], source)  # onto itself

        def copy_array(array):
            page = lax.dynamic_slice_in_dim(array, source, 1, 0)
            return lax.dynamic_update_slice_in_dim(array, page, target, 0)

        return jax.tree.map(copy_array, arrays)

    return lax.fori_loop(0, sources.shape[0], copy_page, arrays)
