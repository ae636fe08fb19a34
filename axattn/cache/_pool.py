"""`PagePool`: the host's record of which page has which tokens of which sequence.

Pages have reference counts. Sequences share full pages, which `allocate` finds by token ids (see
`_radix`) and `fork` by sequence; only a page of one sequence is written to. Nothing here touches a
device: the arrays that come out are for `PagedCache`.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

from axattn.cache._pool_types import PoolExhaustedError, PoolStatistics, UnknownSequenceError
from axattn.cache._radix import PrefixMatch, parse_token_ids
from axattn.cache._refcounts import RefCountedPages


class _Sequence:
    """Pages in order, length, and the known ids, which are those of the first tokens."""

    __slots__ = ("cached", "ids", "length", "pages")

    def __init__(self, pages: array, length: int, ids: array, cached: int):
        self.pages = pages
        self.length = length
        self.ids = ids
        self.cached = cached


class PagePool:
    """A pool of pages that sequences get, share and give back.

    One step of a model, for the sequences ``rows`` of a batch::

        for row, token in zip(rows, sampled):
            pool.append(row, [token])                       # or: rows.append(pool.allocate(prompt))
        cache = cache.copy_pages(*pool.take_copies())       # in every layer
        lengths = np.array([pool.cached(row) for row in rows])
        cache = cache.with_table(pool.block_table(rows, pages_per_row), lengths)
        ...                                                 # appends tokens from `lengths` on
        for row in rows:
            pool.publish(row)

    Appending reserves room, and the device fills it. Publish a sequence after the device was given
    all its tokens. Make a new table for every step: appending and publishing can move a sequence to
    other pages. For sequences that are never published use ``pool.lengths`` from before the append
    in place of `cached`. Pages are those of PagedAttention, https://arxiv.org/abs/2309.06180.

    The same calls give the same pages. A pool is not thread-safe.

    Args:
      num_pages: pages of the pool, as in `PagedCache.create`.
      page_size: tokens per page, as there.

    Raises:
      TypeError, ValueError: anything but positive integers.

    Example:
      >>> from axattn.cache import PagePool
      >>> pool = PagePool(num_pages=8, page_size=4)
      >>> prompt = list(range(100, 110))
      >>> first = pool.allocate(prompt)
      >>> pool.publish(first)  # the device computes its keys and values
      >>> second = pool.allocate(prompt + [7, 8])  # shares the prefix
      >>> pool.cached(second), pool.lengths([first, second]).tolist()
      (10, [10, 12])
      >>> sources, targets = pool.take_copies()  # of the shared page that is not full
      >>> sources.tolist(), targets.tolist()
      ([2], [3])
      >>> pool.block_table([first, second], pages_per_row=4).tolist()
      [[0, 1, 2, -1], [0, 1, 3, -1]]
      >>> pool.free(first)
      >>> pool
      PagePool(num_pages=8, page_size=4): 1 sequences, 4 pages free, 1 cached
    """

    # Invariants between calls:
    # - Sequences that share a page have it at the same index, after the same pages.
    # - A sequence with a page of the tree has all pages above it, too. So the pages below an unused
    #   page are unused, and all unused pages of the tree can be evicted.
    # - The tokens by which the tree finds a page are never overwritten.

    def __init__(self, num_pages: int, page_size: int):
        self._num_pages = _parse_positive("num_pages", num_pages)
        self._page_size = _parse_positive("page_size", page_size)
        self._pages = RefCountedPages(self._num_pages, self._page_size)
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0

    def __repr__(self) -> str:
        return (
            f"PagePool(num_pages={self._num_pages}, page_size={self._page_size}): "
            f"{len(self._sequences)} sequences, {self._pages.num_free} pages free, "
            f"{self._pages.num_evictable} cached"
        )

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self._num_pages

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self._page_size

    def allocate(self, tokens: Iterable[int] | int = ()) -> int:
        """Make a new sequence with room for ``tokens``.

        Token ids reuse the longest published prefix; `cached` returns its length. Its full pages
        are shared. A page that matches in part is extended in place if it ends there and is not in
        use, and copied otherwise (see `take_copies`).

        Args:
          tokens: ids (any iterable of integers, or a one-dimensional array) or, as a Python int,
            the number of tokens whose ids are unknown.

        Returns:
          The id of the sequence, which no other sequence ever gets.

        Raises:
          PoolExhaustedError: there are too few pages.
          TypeError, ValueError: ``tokens`` is neither.
        """
        count, ids = parse_token_ids("tokens", tokens)
        # Not the last token: the model has to run on one token to compute the next logits.
        match = self._pages.tree.match(ids[: count - 1]) if ids else PrefixMatch([], None, 0)
        cached = len(match.pages) * self._page_size + match.partial_tokens
        pages = array("i", match.pages)
        if match.partial is not None:
            pages.append(match.partial)
        new = self._count_pages(count) - len(pages)
        request = f"allocating {count} tokens"
        write = self._plan_write(request, new, pages, match.partial_tokens, holds=False)
        for page in pages:
            self._pages.hold(page)
        sequence = _Sequence(pages, cached, ids or array("q"), cached)
        self._reserve(sequence, count, write)
        self._sequences[self._next_id] = sequence
        self._next_id += 1
        return self._next_id - 1

    def append(self, sequence: int, tokens: Iterable[int] | int) -> None:
        """Reserve room for more tokens of ``sequence``.

        A last page with free slots is copied (see `take_copies`) if another sequence has it. It can
        also have tokens in the tree that were truncated from this sequence: then it is copied if
        there is a page for that; else the tree forgets those tokens.

        Args:
          sequence: the id.
          tokens: ids or, as a Python int, their number. Ids after unknown ones are not kept;
            `publish` takes them.

        Raises:
          PoolExhaustedError: there are too few pages.
          UnknownSequenceError: ``sequence`` is not alive.
          TypeError, ValueError: ``tokens`` are neither ids nor a number.
        """
        entry = self._find_sequence(sequence)
        count, ids = parse_token_ids("tokens", tokens)
        if not count:
            return
        length = entry.length + count
        num_kept = entry.length % self._page_size
        new = self._count_pages(length) - len(entry.pages)
        request = f"appending {count} tokens to sequence {sequence}"
        write = self._plan_write(request, new, entry.pages, num_kept, holds=True)
        if ids is not None and len(entry.ids) == entry.length:
            entry.ids.extend(ids)
        self._reserve(entry, length, write)

    def publish(self, sequence: int, tokens: Iterable[int] | None = None) -> None:
        """Let `allocate` find the tokens of ``sequence``, and count them as stored.

        Call it after the device was given the keys and values of all of them (it can still be
        computing), and after rejected drafts were truncated. If the tree already has a page with
        the same tokens, that page replaces the sequence's own, also in sequences that share it.

        Args:
          sequence: the id.
          tokens: ids of all its tokens; needed if some were reserved by number only.

        Raises:
          UnknownSequenceError: ``sequence`` is not alive.
          ValueError: ids are unknown, or differ from those known before.
          RuntimeError: a copy of one of its pages is pending.
        """
        entry = self._find_sequence(sequence)
        ids = self._check_ids(sequence, entry, tokens)
        pending = [target for target in self._pages.pending_copies if target in entry.pages]
        if pending:
            raise RuntimeError(
                f"sequence {sequence} has {len(pending)} pages whose copies are pending: call "
                "take_copies() and do them before its tokens are stored and published"
            )
        entry.ids, entry.cached = ids, entry.length
        first = len(entry.pages)
        while first and self._pages.tree.count_tokens(entry.pages[first - 1]) < self._page_size:
            first -= 1
        for index in range(first, len(entry.pages)):
            start = index * self._page_size
            key = ids[start : start + self._page_size]
            parent = entry.pages[index - 1] if index else None
            page = self._pages.tree.insert(parent, key, entry.pages[index])
            if page != entry.pages[index]:
                self._replace_page(index, entry.pages[index], page)

    def fork(self, sequence: int) -> int:
        """Make a new sequence with the tokens of ``sequence``, which shares all its pages.

        It takes no page. The first of the two that appends to a shared last page with free slots
        gets a copy of it.

        Args:
          sequence: the id.

        Returns:
          The id of the new sequence.

        Raises:
          UnknownSequenceError: ``sequence`` is not alive.
        """
        entry = self._find_sequence(sequence)
        for page in entry.pages:
            self._pages.hold(page)
        fork = _Sequence(entry.pages[:], entry.length, entry.ids[:], entry.cached)
        self._sequences[self._next_id] = fork
        self._next_id += 1
        return self._next_id - 1

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first ``length`` tokens of ``sequence``. Published tokens stay published.

        Args:
          sequence: the id.
          length: 0 to its length.

        Raises:
          UnknownSequenceError: ``sequence`` is not alive.
          ValueError: ``length`` is negative, or more than the sequence has.
          TypeError: ``length`` is not an integer.
        """
        entry = self._find_sequence(sequence)
        length = operator.index(length)
        if not 0 <= length <= entry.length:
            raise ValueError(
                f"length must be 0 to {entry.length}, the length of sequence {sequence}, "
                f"got {length}"
            )
        keep = self._count_pages(length)
        for page in reversed(entry.pages[keep:]):
            self._pages.release(page)
        del entry.pages[keep:], entry.ids[length:]
        entry.length, entry.cached = length, min(entry.cached, length)

    def free(self, sequence: int) -> None:
        """End ``sequence``. `allocate` finds its published pages until they are evicted.

        Args:
          sequence: the id.

        Raises:
          UnknownSequenceError: ``sequence`` is not alive, for instance freed before.
        """
        for page in reversed(self._find_sequence(sequence).pages):
            self._pages.release(page)
        del self._sequences[sequence]

    def cached(self, sequence: int) -> int:
        """Return how many of the first tokens of ``sequence`` are stored.

        After `allocate` these are the tokens found by prefix, at most all but the last one; after
        `publish` all. A fork starts with the number of its parent.

        Args:
          sequence: the id.

        Raises:
          UnknownSequenceError: ``sequence`` is not alive.
        """
        return self._find_sequence(sequence).cached

    def take_copies(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the pending page copies, for `PagedCache.copy_pages`, and forget them.

        Do them in every layer, before the tokens that were appended since the last call are stored.
        No page is the target of two copies, or both a source and a target. Until they are taken, no
        sequence gets a page that is a source, and there is no `block_table`.

        Returns:
          ``(sources, targets)``, numpy int32 ``[n]`` each, n >= 0.
        """
        return self._pages.take_copies()

    def block_table(self, sequences: Iterable[int | None], pages_per_row: int) -> np.ndarray:
        """Return the pages of each sequence.

        Args:
          sequences: ids, each once; None for a row without a sequence.
          pages_per_row: number of columns of the table.

        Returns:
          numpy int32 ``[B, pages_per_row]``, -1 where a row has no page.

        Raises:
          UnknownSequenceError: one of them is not alive.
          TypeError, ValueError: ``pages_per_row`` is not a positive integer.
          ValueError: a sequence has more pages than a row, or is named twice: both rows would write
            to the same pages (`fork` it).
          RuntimeError: page copies are pending.
        """
        sequences, width = list(sequences), _parse_positive("pages_per_row", pages_per_row)
        rows = [None if s is None else self._find_sequence(s) for s in sequences]
        named = [s for s in sequences if s is not None]
        if len(set(named)) < len(named):
            twice = next(s for s in named if named.count(s) > 1)
            raise ValueError(f"sequence {twice} is in the table twice; fork it to use it twice")
        for sequence, row in zip(sequences, rows, strict=True):
            if row is not None and len(row.pages) > width:
                raise ValueError(
                    f"sequence {sequence} has {row.length} tokens in {len(row.pages)} pages of "
                    f"{self._page_size}; pages_per_row is {width}"
                )
        if self._pages.pending_copies:
            count = len(self._pages.pending_copies)
            raise RuntimeError(
                f"{count} page copies are pending: give take_copies() to the cache's copy_pages "
                "before a table is made"
            )
        table = np.full((len(rows), width), -1, np.int32)
        for out, row in zip(table, rows, strict=True):
            if row is not None and row.pages:
                out[: len(row.pages)] = np.frombuffer(row.pages, np.int32)
        return table

    def lengths(self, sequences: Iterable[int | None]) -> np.ndarray:
        """Return the tokens per sequence, including those that only have room reserved.

        Args:
          sequences: ids; None for a row without a sequence, whose length is 0.

        Returns:
          numpy int32 ``[B]``.

        Raises:
          UnknownSequenceError: one of them is not alive.
        """
        rows = [None if s is None else self._find_sequence(s) for s in sequences]
        return np.array([0 if row is None else row.length for row in rows], np.int32)

    def statistics(self) -> PoolStatistics:
        """Return what the pool stores now."""
        size = self._page_size
        filled: dict[int, int] = {}
        for sequence in self._sequences.values():
            for index, page in enumerate(sequence.pages):
                tokens = min(sequence.length - index * size, size)
                filled[page] = max(tokens, filled.get(page, 0))
        free, cached = self._pages.num_free, self._pages.num_evictable
        return PoolStatistics(
            num_pages=self._num_pages,
            page_size=size,
            pages_free=free,
            pages_cached=cached,
            pages_in_use=self._num_pages - free - cached,
            tokens_stored=sum(filled.values()),
            tokens_logical=sum(s.length for s in self._sequences.values()),
        )

    # A request first makes its plan, which can raise, and then the changes, which cannot.

    def _plan_write(self, request: str, new: int, pages: array, num_kept: int, holds: bool) -> str:
        """Choose how to write to the last of ``pages``, and check that there are enough pages.

        Args:
          request: what the error says was asked for.
          new: number of pages needed besides ``pages``.
          pages: pages of the sequence.
          num_kept: tokens that the last page keeps; 0 if there is no page, or a full one.
          holds: whether the sequence holds ``pages`` already.

        Returns:
          ``"in place"``, ``"copy"``, or ``"trim"``: in place, once the tree forgot the tokens
          after ``num_kept``.

        Raises:
          PoolExhaustedError: there are too few pages.
        """
        free, evictable = self._pages.num_free, self._pages.num_evictable
        if not holds:
            evictable -= sum(map(self._pages.is_evictable, pages))
        write = "in place"
        if num_kept:
            others = self._pages.count_holders(pages[-1]) - holds
            if others:
                write = "copy"
            elif self._pages.tree.count_tokens(pages[-1]) > num_kept:
                # Copy only if there is a page for it: reuse must not make a request fail.
                write = "copy" if new < free + evictable else "trim"
        needed = new + (write == "copy")
        if needed > free + evictable:
            in_use = self._num_pages - free - evictable
            raise PoolExhaustedError(request, needed, free, evictable, in_use)
        return write

    def _reserve(self, sequence: _Sequence, length: int, write: str) -> None:
        """Reserve room for ``length`` tokens; make the last page writable as planned."""
        pages = sequence.pages
        last = len(pages) - 1
        if write == "copy":
            shared = pages[last]
            pages[last] = self._pages.copy(shared)
            self._pages.release(shared)
        pages.extend(self._pages.take() for _ in range(self._count_pages(length) - len(pages)))
        if write == "trim":
            # Every evictable page has just been taken, so no page follows this one in the tree.
            self._pages.tree.trim(pages[last], sequence.length % self._page_size)
        sequence.length = length

    def _replace_page(self, index: int, old: int, new: int) -> None:
        """Replace the page ``old`` by ``new``, which has the same tokens, in all sequences."""
        for each in self._sequences.values():
            if index < len(each.pages) and each.pages[index] == old:
                each.pages[index] = new
                self._pages.hold(new)
                # The tree can have `old` with its first tokens, which `new` has, too.
                if self._pages.count_holders(old) == 1 and self._pages.tree.count_tokens(old):
                    self._pages.tree.remove(old)
                self._pages.release(old)

    def _find_sequence(self, sequence: int) -> _Sequence:
        try:
            return self._sequences[sequence]
        except (KeyError, TypeError):
            raise UnknownSequenceError(sequence) from None

    def _check_ids(self, sequence: int, entry: _Sequence, tokens: Iterable[int] | None) -> array:
        """Return the ids of all tokens, from before or from ``tokens``; raise if they are wrong."""
        if tokens is None:
            if len(entry.ids) < entry.length:
                raise ValueError(
                    f"sequence {sequence} has {entry.length} tokens, and only the ids of the first "
                    f"{len(entry.ids)} are known: publish takes the ids of all as tokens="
                )
            return entry.ids
        count, ids = parse_token_ids("tokens", tokens)
        if ids is None:
            raise TypeError("publish takes token ids, got a number of tokens")
        if count != entry.length:
            raise ValueError(
                f"tokens must be the {entry.length} tokens of sequence {sequence}, got {count}"
            )
        if ids[: len(entry.ids)] != entry.ids:
            raise ValueError(f"tokens do not begin with the known tokens of sequence {sequence}")
        return ids

    def _count_pages(self, length: int) -> int:
        return -(-length // self._page_size)


def _parse_positive(name: str, number: Any) -> int:
    try:
        number = operator.index(number)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(number).__name__}") from None
    if number < 1:
        raise ValueError(f"{name} must be positive, got {number}")
    return number
