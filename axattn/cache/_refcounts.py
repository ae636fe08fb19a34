"""Reference counts of pages: which are in use, free, or can be evicted.

`PagePool` knows which sequence has which pages; here a page is a number with counts.
"""

from __future__ import annotations

import numpy as np

from axattn.cache._radix import RadixTree


class RefCountedPages:
    """Pages that are free, cached (only in the tree), or in use.

    A page is in use while a live sequence holds it or a pending copy reads it.

    Attributes:
      tree: the pages that can be found by their tokens, in use or not.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.tree = RadixTree(page_size)
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages  # live sequences
        self._readers = [0] * num_pages  # pending copies
        self._copies: dict[int, int] = {}  # pending: target -> source
        # Cached pages, least recently used first. A sequence releases its last page first, and
        # holds all pages above one that it holds. So each page comes after all pages below it,
        # and the first one is always a leaf.
        self._evictable: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        """Number of pages without tokens."""
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        """Number of pages that are in the tree and not in use."""
        return len(self._evictable)

    @property
    def pending_copies(self) -> dict[int, int]:
        """Copies that the device still has to do: target -> source."""
        return self._copies

    def count_holders(self, page: int) -> int:
        """Return the number of live sequences that hold ``page``."""
        return self._holders[page]

    def is_evictable(self, page: int) -> bool:
        """Return whether ``page`` is in the tree and not in use."""
        return page in self._evictable

    def take(self) -> int:
        """Return a page with one holder: a free one, or the least recently used cached one."""
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._evictable))
            del self._evictable[page]
            self.tree.remove(page)
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Count one more holder of ``page``."""
        self._holders[page] += 1
        self._evictable.pop(page, None)

    def release(self, page: int) -> None:
        """Count one holder less of ``page``."""
        self._holders[page] -= 1
        if not self._holders[page] and page in self._copies:
            self._forget_copy(page)
        self._settle(page)

    def copy(self, page: int) -> int:
        """Take a page, with one holder, and plan to copy ``page``, which has a holder, to it."""
        target = self.take()
        # If the copy to `page` is pending, read its source instead.
        source = self._copies.get(page, page)
        self._copies[target] = source
        self._readers[source] += 1
        return target

    def take_copies(self) -> tuple[np.ndarray, np.ndarray]:
        """Return sources and targets of the pending copies, int32 ``[n]`` each; forget them."""
        sources = np.fromiter(self._copies.values(), np.int32, len(self._copies))
        targets = np.fromiter(self._copies.keys(), np.int32, len(self._copies))
        for target in list(self._copies):
            self._forget_copy(target)
        return sources, targets

    def _forget_copy(self, target: int) -> None:
        source = self._copies.pop(target)
        self._readers[source] -= 1
        self._settle(source)

    def _settle(self, page: int) -> None:
        """Count a page as cached or free once it is not in use."""
        if self._holders[page] or self._readers[page]:
            return
        if self.tree.count_tokens(page):
            self._evictable[page] = None
        else:
            self._free.append(page)
