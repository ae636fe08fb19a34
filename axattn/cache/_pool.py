"""Which page of a paged cache holds which tokens of which sequence: the host's side.

Pages have reference counts. Sequences share full pages, found again by their token ids
(:mod:`axattn.cache._radix`) or by forking; a page that is written is held by one sequence only.
Nothing here touches a device: the arrays that come out are for `PagedCache`.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

from axattn.cache._pool_types import PoolExhaustedError, PoolStatistics, UnknownSequenceError
from axattn.cache._radix import Match, token_ids
from axattn.cache._refcounts import RefCountedPages


class _Sequence:
    """Pages, in order; length; the ids of the leading tokens whose ids are known."""

    __slots__ = ("cached", "ids", "length", "pages")

    def __init__(self, pages: array, length: int, ids: array, cached: int):
        self.pages = pages
        self.length = length
        self.ids = ids
        self.cached = cached


class PagePool:
    """Gives pages to sequences, shares them, and takes them back.

    One step of a model, for the sequences ``rows`` of a batch::

        for row, token in zip(rows, sampled):
            pool.append(row, [token])                       # or: rows.append(pool.allocate(prompt))
        cache = cache.copy_pages(*pool.take_copies())       # in every layer
        lengths = np.array([pool.cached(row) for row in rows])
        cache = cache.with_table(pool.block_table(rows, pages_per_row), lengths)
        ...                                                 # appends tokens from `lengths` on
        for row in rows:
            pool.publish(row)

    Appending reserves room; the device fills it. Publishing says that the device was given all
    tokens of a sequence. Tables are made anew in every step, since appending and publishing can
    move a sequence to other pages. Sequences that are never published have ``pool.lengths`` from
    before the append in place of `cached`. Pages are those of PagedAttention,
    https://arxiv.org/abs/2309.06180.

    Same calls, same pages. A pool is not safe to use from several threads at once.

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
      >>> pool.publish(first)  # its keys and values were computed
      >>> second = pool.allocate(prompt + [7, 8])  # shares the prefix
      >>> pool.cached(second), pool.lengths([first, second]).tolist()
      (10, [10, 12])
      >>> sources, targets = pool.take_copies()  # the shared page that is not full
      >>> sources.tolist(), targets.tolist()
      ([2], [3])
      >>> pool.block_table([first, second], pages_per_row=4).tolist()
      [[0, 1, 2, -1], [0, 1, 3, -1]]
      >>> pool.free(first)
      >>> pool
      PagePool(num_pages=8, page_size=4): 1 sequences, 4 pages free, 1 cached
    """

    # What holds between calls:
    # - Sequences that hold the same page hold it at the same place, after the same pages.
    # - A sequence that holds a page of the tree holds all pages above it. So no page below an
    #   unheld one is held, and all unheld pages of the tree can be evicted.
    # - The tokens by which the tree finds a page are not written over.

    def __init__(self, num_pages: int, page_size: int):
        self._num_pages = _positive("num_pages", num_pages)
        self._page_size = _positive("page_size", page_size)
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
        """A new sequence, with room for ``tokens``.

        With token ids, the longest published prefix is reused; `cached` says how long it is. Its
        full pages are shared. A page that matches in part is continued in place where it ends
        there and nobody uses it, and copied otherwise (see `take_copies`).

        Args:
          tokens: ids (any iterable of integers, a one-dimensional array) or, as a Python int,
            the number of tokens whose ids are not known.

        Returns:
          The id of the sequence. No id is given twice.

        Raises:
          PoolExhaustedError: there are too few pages.
          TypeError, ValueError: ``tokens`` is neither.
        """
        count, ids = token_ids("tokens", tokens)
        # Without the last token: a model has to run on one token to give the logits after it.
        found = self._pages.tree.match(ids[: count - 1]) if ids else Match([], None, 0)
        cached = len(found.pages) * self._page_size + found.inside
        pages = array("i", found.pages)
        if found.partial is not None:
            pages.append(found.partial)
        new = self._pages_of(count) - len(pages)
        write = self._plan(f"allocating {count} tokens", new, pages, found.inside, held=False)
        for page in pages:
            self._pages.hold(page)
        sequence = _Sequence(pages, cached, ids or array("q"), cached)
        self._extend(sequence, count, write)
        self._sequences[self._next_id] = sequence
        self._next_id += 1
        return self._next_id - 1

    def append(self, sequence: int, tokens: Iterable[int] | int) -> None:
        """Reserves room for more tokens of ``sequence``.

        The last page is copied (see `take_copies`) if it is filled in part and another sequence
        holds it. If only the tree has it, and tokens in it that were truncated from this sequence
        are still found by prefix, it is copied where there is a page for that, else the tree
        forgets them.

        Args:
          sequence: the id.
          tokens: ids or, as a Python int, their number. Ids that come after unknown ones are not
            kept; `publish` takes them.

        Raises:
          PoolExhaustedError: there are too few pages.
          UnknownSequenceError: ``sequence`` is not alive.
          TypeError, ValueError: ``tokens`` are neither ids nor a number.
        """
        this = self._get(sequence)
        count, ids = token_ids("tokens", tokens)
        if not count:
            return
        length = this.length + count
        inside = this.length % self._page_size
        new = self._pages_of(length) - len(this.pages)
        request = f"appending {count} tokens to sequence {sequence}"
        write = self._plan(request, new, this.pages, inside, held=True)
        if ids is not None and len(this.ids) == this.length:
            this.ids.extend(ids)
        self._extend(this, length, write)

    def publish(self, sequence: int, tokens: Iterable[int] | None = None) -> None:
        """Makes the tokens of ``sequence`` findable by `allocate`, and notes that they are stored.

        To be called when the device was given the keys and values of all of them (given: it may
        still be at work), and after speculative tokens were truncated. Where the tree has a page
        with the same tokens already, that one takes the place of the sequence's own, also in
        sequences that share it.

        Args:
          sequence: the id.
          tokens: ids of all its tokens; needed where some were reserved by number only.

        Raises:
          UnknownSequenceError: ``sequence`` is not alive.
          ValueError: ids are not known, or not those known before.
          RuntimeError: a copy of one of its pages is pending.
        """
        this = self._get(sequence)
        ids = self._ids_of(sequence, this, tokens)
        pending = [target for target in self._pages.pending if target in this.pages]
        if pending:
            raise RuntimeError(
                f"sequence {sequence} has {len(pending)} pages whose copies are pending: call "
                "take_copies() and do them before its tokens are stored and published"
            )
        this.ids, this.cached = ids, this.length
        first = len(this.pages)
        while first and self._pages.tree.filled(this.pages[first - 1]) < self._page_size:
            first -= 1
        for index in range(first, len(this.pages)):
            start = index * self._page_size
            key = ids[start : start + self._page_size]
            above = this.pages[index - 1] if index else None
            page = self._pages.tree.insert(above, key, this.pages[index])
            if page != this.pages[index]:
                self._merge(index, this.pages[index], page)

    def fork(self, sequence: int) -> int:
        """A new sequence with the tokens of ``sequence``, which shares all its pages.

        Takes no page. Whichever of the two first appends to a last page that is filled in part
        gets a copy of that page.

        Args:
          sequence: the id.

        Returns:
          The id of the new sequence.

        Raises:
          UnknownSequenceError: ``sequence`` is not alive.
        """
        this = self._get(sequence)
        for page in this.pages:
            self._pages.hold(page)
        fork = _Sequence(this.pages[:], this.length, this.ids[:], this.cached)
        self._sequences[self._next_id] = fork
        self._next_id += 1
        return self._next_id - 1

    def truncate(self, sequence: int, length: int) -> None:
        """Keeps the first ``length`` tokens of ``sequence``. What was published stays published.

        Args:
          sequence: the id.
          length: 0 to its length.

        Raises:
          UnknownSequenceError: ``sequence`` is not alive.
          ValueError: ``length`` is negative or more than the sequence has.
          TypeError: ``length`` is no integer.
        """
        this = self._get(sequence)
        length = operator.index(length)
        if not 0 <= length <= this.length:
            raise ValueError(
                f"length must be 0 to {this.length}, the length of sequence {sequence}, "
                f"got {length}"
            )
        keep = self._pages_of(length)
        for page in reversed(this.pages[keep:]):
            self._pages.release(page)
        del this.pages[keep:], this.ids[length:]
        this.length, this.cached = length, min(this.cached, length)

    def free(self, sequence: int) -> None:
        """Ends ``sequence``. Published pages can be found until they are evicted.

        Args:
          sequence: the id.

        Raises:
          UnknownSequenceError: ``sequence`` is not alive; it may have been freed before.
        """
        for page in reversed(self._get(sequence).pages):
            self._pages.release(page)
        del self._sequences[sequence]

    def cached(self, sequence: int) -> int:
        """The number of leading tokens of ``sequence`` that are known to be stored.

        After `allocate`, the tokens found by prefix: at most all but the last one. After
        `publish`, all. A fork starts with those of its parent.

        Args:
          sequence: the id.

        Raises:
          UnknownSequenceError: ``sequence`` is not alive.
        """
        return self._get(sequence).cached

    def take_copies(self) -> tuple[np.ndarray, np.ndarray]:
        """The page copies that are pending, for `PagedCache.copy_pages`, and forgets them.

        To be done, in every layer, before tokens appended since the last call are stored. No page
        is the target of two copies, nor the source of one and the target of another. Until they
        are taken, no source is given to anyone else, and there is no `block_table`.

        Returns:
          ``(sources, targets)``, numpy int32 ``[n]`` each, n >= 0.
        """
        return self._pages.take_copies()

    def block_table(self, sequences: Iterable[int | None], pages_per_row: int) -> np.ndarray:
        """The pages of each sequence.

        Args:
          sequences: ids, each once; None for a row without a sequence.
          pages_per_row: columns of the table.

        Returns:
          numpy int32 ``[B, pages_per_row]``, -1 where a row has no page.

        Raises:
          UnknownSequenceError: one of them is not alive.
          TypeError, ValueError: ``pages_per_row`` is no positive integer.
          ValueError: a sequence has more pages than a row, or is named twice: both rows would
            write to the same pages (`fork` it).
          RuntimeError: page copies are pending.
        """
        sequences, width = list(sequences), _positive("pages_per_row", pages_per_row)
        rows = [None if s is None else self._get(s) for s in sequences]
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
        if self._pages.pending:
            raise RuntimeError(
                f"{len(self._pages.pending)} page copies are pending: give take_copies() to the "
                "cache's copy_pages before a table is made"
            )
        table = np.full((len(rows), width), -1, np.int32)
        for out, row in zip(table, rows, strict=True):
            if row is not None and row.pages:
                out[: len(row.pages)] = np.frombuffer(row.pages, np.int32)
        return table

    def lengths(self, sequences: Iterable[int | None]) -> np.ndarray:
        """Tokens per sequence, those included whose room is reserved.

        Args:
          sequences: ids; None for a row without a sequence, whose length is 0.

        Returns:
          numpy int32 ``[B]``.

        Raises:
          UnknownSequenceError: one of them is not alive.
        """
        return np.array([0 if s is None else self._get(s).length for s in sequences], np.int32)

    def statistics(self) -> PoolStatistics:
        """What the pool holds now."""
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

    # Requests: first a plan, which may refuse, then the changes, which cannot fail.

    def _plan(self, request: str, new: int, pages: array, inside: int, held: bool) -> str:
        """How the last of ``pages`` can be written from its token ``inside`` on, and room for it.

        Args:
          request: for the error.
          new: pages needed besides ``pages``.
          pages: of the sequence.
          inside: tokens that the last page keeps; 0 if it is full, or is not there.
          held: whether the sequence holds its pages already.

        Returns:
          ``"in place"``, ``"copy"`` or ``"trim"``: in place, once the tree forgot what comes there.
        """
        free, evictable = self._pages.num_free, self._pages.num_evictable
        if not held:
            evictable -= sum(map(self._pages.is_evictable, pages))
        write = "in place"
        if inside:
            others = self._pages.holders(pages[-1]) - held
            if others:
                write = "copy"
            elif self._pages.tree.filled(pages[-1]) > inside:
                # Worth a page only if there is one: reuse must not make a request fail.
                write = "copy" if new < free + evictable else "trim"
        needed = new + (write == "copy")
        if needed > free + evictable:
            in_use = self._num_pages - free - evictable
            raise PoolExhaustedError(request, needed, free, evictable, in_use)
        return write

    def _extend(self, sequence: _Sequence, length: int, write: str) -> None:
        """Room for ``length`` tokens, the last page made writable as `_plan` said."""
        pages = sequence.pages
        last = len(pages) - 1
        if write == "copy":
            shared = pages[last]
            pages[last] = self._pages.copy(shared)
            self._pages.release(shared)
        pages.extend(self._pages.take() for _ in range(self._pages_of(length) - len(pages)))
        if write == "trim":
            # All that could be evicted was taken just now, so no page follows this one in the tree.
            self._pages.tree.trim(pages[last], sequence.length % self._page_size)
        sequence.length = length

    def _merge(self, index: int, old: int, new: int) -> None:
        """Puts the page ``new``, which has the same tokens, in the place of ``old``."""
        for each in self._sequences.values():
            if index < len(each.pages) and each.pages[index] == old:
                each.pages[index] = new
                self._pages.hold(new)
                # It may be in the tree with its first tokens, which `new` has too.
                if self._pages.holders(old) == 1 and self._pages.tree.filled(old):
                    self._pages.tree.remove(old)
                self._pages.release(old)

    def _get(self, sequence: int) -> _Sequence:
        try:
            return self._sequences[sequence]
        except (KeyError, TypeError):
            raise UnknownSequenceError(sequence) from None

    def _ids_of(self, sequence: int, this: _Sequence, tokens: Iterable[int] | None) -> array:
        """The ids of all tokens, known before or told now."""
        if tokens is None:
            if len(this.ids) < this.length:
                raise ValueError(
                    f"sequence {sequence} has {this.length} tokens, and only the ids of the first "
                    f"{len(this.ids)} are known: publish takes the ids of all as tokens="
                )
            return this.ids
        count, ids = token_ids("tokens", tokens)
        if ids is None:
            raise TypeError("publish takes token ids, got a number of tokens")
        if count != this.length:
            raise ValueError(
                f"tokens must be the {this.length} tokens of sequence {sequence}, got {count}"
            )
        if ids[: len(this.ids)] != this.ids:
            raise ValueError(f"tokens do not begin with the known tokens of sequence {sequence}")
        return ids

    def _pages_of(self, length: int) -> int:
        return -(-length // self._page_size)


def _positive(name: str, number: Any) -> int:
    try:
        number = operator.index(number)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(number).__name__}") from None
    if number < 1:
        raise ValueError(f"{name} must be positive, got {number}")
    return number
