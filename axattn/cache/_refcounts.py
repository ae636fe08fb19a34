"""Pages by number: who holds each, which are free, and which can be evicted.

`PagePool` decides which sequence has which pages; here a page is a number with counts.
"""

from __future__ import annotations

import numpy as np

from axattn.cache._radix import RadixTree


class RefCountedPages:
    """Pages in one of three states: free, cached (in the tree only), or in use.

    A page is in use while a live sequence holds it or a pending copy reads it.

    Attributes:
      tree: the pages that can be found by their tokens, used or not.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.tree = RadixTree(page_size)
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages  # live sequences
        self._readers = [0] * num_pages  # pending copies
        self._copies: dict[int, int] = {}  # pending: target -> source
        # Cached pages, least recently used first. A sequence releases its last page first, and
        # who holds a page of the tree holds all above it: so each page comes after all pages
        # below it, and the first is always a leaf.
        self._evictable: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        """Pages that are in the tree and not in use."""
        return len(self._evictable)

    @property
    def pending(self) -> dict[int, int]:
        """Copies to be done on the device: target -> source."""
        return self._copies

    def holders(self, page: int) -> int:
        """The number of live sequences that hold ``page``."""
        return self._holders[page]

    def is_evictable(self, page: int) -> bool:
        """Whether ``page`` is in the tree and not in use."""
        return page in self._evictable

    def take(self) -> int:
        """A page that holds nothing, with one holder; evicts the least recently used if need be."""
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._evictable))
            del self._evictable[page]
            self.tree.remove(page)
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Counts one more holder."""
        self._holders[page] += 1
        self._evictable.pop(page, None)

    def release(self, page: int) -> None:
        """Counts one holder less."""
        self._holders[page] -= 1
        if not self._holders[page] and page in self._copies:
            self._forget_copy(page)
        self._settle(page)

    def copy(self, page: int) -> int:
        """Takes a page, with one holder, that is to become a copy of ``page``, which is held."""
        target = self.take()
        # The copy of a page that is itself still to be copied is a copy of that one's source.
        source = self._copies.get(page, page)
        self._copies[target] = source
        self._readers[source] += 1
        return target

    def take_copies(self) -> tuple[np.ndarray, np.ndarray]:
        """Sources and targets of the pending copies, int32 ``[n]`` each; none is pending then."""
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
        """Files a page that is not in use any more under cached or free."""
        if self._holders[page] or self._readers[page]:
            return
        if self.tree.filled(page):
            self._evictable[page] = None
        else:
            self._free.append(page)
