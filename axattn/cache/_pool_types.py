"""Errors and statistics of a `PagePool`."""

from __future__ import annotations

import dataclasses
from typing import Any


class PoolExhaustedError(RuntimeError):
    """A request needs more pages than there are. The request did not change the pool.

    Attributes:
      request: what was asked for.
      needed: pages that it needs, besides those that it would share.
      free: pages without tokens.
      evictable: pages of published tokens that neither a live sequence nor this request uses.
      in_use: all other pages.

    Raises:
      PoolExhaustedError: by `PagePool.allocate` and `PagePool.append`.

    Example:
      >>> from axattn.cache import PagePool, PoolExhaustedError
      >>> pool = PagePool(num_pages=2, page_size=4)
      >>> try:
      ...     pool.allocate(9)
      ... except PoolExhaustedError as error:  # time to free another sequence
      ...     print(error)
      allocating 9 tokens needs 3 pages and the pool has 2: 2 free, 0 evictable; 0 are in use
    """

    def __init__(self, request: str, needed: int, free: int, evictable: int, in_use: int):
        super().__init__(request, needed, free, evictable, in_use)
        self.request = request
        self.needed = needed
        self.free = free
        self.evictable = evictable
        self.in_use = in_use

    def __str__(self) -> str:
        return (
            f"{self.request} needs {self.needed} pages and the pool has "
            f"{self.free + self.evictable}: {self.free} free, {self.evictable} evictable; "
            f"{self.in_use} are in use"
        )


class UnknownSequenceError(KeyError):
    """A sequence was freed or never allocated. The call did not change the pool.

    Attributes:
      sequence: the id.

    Raises:
      UnknownSequenceError: by the methods of `PagePool` that take a sequence.

    Example:
      >>> from axattn.cache import PagePool, UnknownSequenceError
      >>> pool = PagePool(num_pages=2, page_size=4)
      >>> pool.free(pool.allocate(3))
      >>> try:
      ...     pool.append(0, [17])
      ... except UnknownSequenceError as error:
      ...     print(error)
      sequence 0 is unknown: freed before, or never allocated
    """

    def __init__(self, sequence: Any):
        super().__init__(sequence)
        self.sequence = sequence

    def __str__(self) -> str:
        return f"sequence {self.sequence!r} is unknown: freed before, or never allocated"


@dataclasses.dataclass(frozen=True)
class PoolStatistics:
    """What a pool stores. Free, cached and used pages add up to all pages.

    Attributes:
      num_pages: pages of the pool.
      page_size: tokens per page.
      pages_free: pages without tokens.
      pages_cached: published pages that no live sequence has: found by prefix until evicted.
      pages_in_use: pages of live sequences, each counted once, and sources of pending copies.
      tokens_stored: tokens in pages of live sequences; those in a shared page count once.
      tokens_logical: the sum of the lengths of all live sequences.

    Example:
      >>> from axattn.cache import PagePool
      >>> pool = PagePool(num_pages=8, page_size=16)
      >>> sequence = pool.allocate(24)
      >>> statistics = pool.statistics()
      >>> statistics.pages_in_use, statistics.tokens_stored, round(statistics.overhead, 2)
      (2, 24, 1.33)
    """

    num_pages: int
    page_size: int
    pages_free: int
    pages_cached: int
    pages_in_use: int
    tokens_stored: int
    tokens_logical: int

    @property
    def overhead(self) -> float:
        """Slots in used pages per stored token; 1.0 if all used pages are full, or none is used."""
        if not self.tokens_stored:
            return 1.0
        return self.pages_in_use * self.page_size / self.tokens_stored
