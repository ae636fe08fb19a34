"""A radix tree over token ids whose every node is a page.

A page's keys and values depend on all tokens before it, so a page is known by the path to it: the
root's children are first pages of sequences, and so on. Inner nodes are full pages. A leaf may be
filled in part, and a search may end inside any page.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from axattn._typing import present

_INT64_MAX = np.iinfo(np.int64).max


def token_ids(name: str, tokens: Iterable[int] | int) -> tuple[int, array | None]:
    """How many tokens there are and, if ``tokens`` says, their ids as an ``array("q")``.

    Args:
      name: of the argument, for errors.
      tokens: token ids (any iterable of integers, a one-dimensional array) or, as a Python int,
        their number.

    Raises:
      TypeError: anything else. An array's scalar is refused, because ``sampled[0]`` would be
        meant as an id and taken for a number of tokens.
      ValueError: a negative number of tokens, an array of other than one dimension, an id that
        is no int64.
    """
    if type(tokens) is int:
        if tokens < 0:
            raise ValueError(f"{name} must be token ids or a number of tokens >= 0, got {tokens}")
        return tokens, None
    takes = f"{name} takes token ids, as in [7], or a number of tokens as a Python int"
    if not hasattr(tokens, "__array__"):
        if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Iterable):
            raise TypeError(f"{takes}, got {type(tokens).__name__}")
        tokens = list(tokens)
    ids: np.ndarray[Any, Any] = np.asarray(tokens)
    if ids.ndim == 0:
        raise TypeError(f"{takes}, got a scalar of type {type(tokens).__name__}")
    if ids.ndim != 1:
        raise ValueError(f"{takes}; the ids have one dimension, got shape {ids.shape}")
    if ids.size == 0:
        return 0, array("q")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{takes}, got ids of type {ids.dtype}")
    if ids.dtype == np.uint64 and ids.max() > _INT64_MAX:
        raise ValueError(f"{name} must be int64, got an id of {ids.max()}")
    return ids.size, array("q", ids.astype(np.int64).tobytes())


class Match(NamedTuple):
    """The longest prefix that a tree has of some tokens.

    Attributes:
      pages: full pages, all of whose tokens match.
      partial: the page after those whose first ``inside`` tokens match, or None.
      inside: how many of its tokens match: at least 1 with a page, and less than a page.
    """

    pages: list[int]
    partial: int | None
    inside: int


class _Node:
    """A page, its tokens, and the pages that follow it, sorted by their tokens."""

    __slots__ = ("children", "key", "keys", "page", "parent")

    def __init__(self, key: array, page: int, parent: _Node | None):
        self.key = key
        self.page = page
        self.parent = parent
        self.keys: list[array] = []
        self.children: list[_Node] = []

    def add(self, child: _Node) -> None:
        at = bisect_left(self.keys, child.key)
        self.keys.insert(at, child.key)
        self.children.insert(at, child)

    def discard(self, child: _Node) -> None:
        at = bisect_left(self.keys, child.key)
        assert self.children[at] is child, "siblings have different keys"
        del self.keys[at], self.children[at]

    def closest(self, key: array) -> tuple[_Node | None, int]:
        """The child that shares the most leading tokens with ``key``, and how many."""
        # In sorted order nothing shares more with a key than its neighbors do.
        at = bisect_left(self.keys, key)
        best, most = None, 0
        for child in self.children[max(at - 1, 0) : at + 1]:
            common = _common(child.key, key)
            if common > most:
                best, most = child, common
        return best, most


def _common(a: array, b: array) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


class RadixTree:
    """Finds the pages that hold the longest known prefix of some tokens.

    The tree knows pages and their tokens, not who uses them; `PagePool` decides what to remove.
    Token ids are ``array("q")``; see `token_ids`.
    """

    def __init__(self, page_size: int):
        self._page_size = page_size
        self._root = _Node(array("q"), -1, None)
        self._nodes: dict[int, _Node] = {}

    def __len__(self) -> int:
        """The number of pages."""
        return len(self._nodes)

    def filled(self, page: int) -> int:
        """How many leading tokens of ``page`` can be found; 0 if it is not in the tree."""
        node = self._nodes.get(page)
        return len(node.key) if node else 0

    def path(self, page: int) -> list[tuple[int, tuple[int, ...]]]:
        """The pages from the first one down to ``page``, each with its token ids."""
        node, out = self._nodes[page], []
        while node.parent is not None:
            out.append((node.page, tuple(node.key)))
            node = node.parent
        return out[::-1]

    def match(self, tokens: array) -> Match:
        """The longest prefix of ``tokens`` that is in the tree."""
        node = self._root
        pages: list[int] = []
        for start in range(0, len(tokens), self._page_size):
            child, common = node.closest(tokens[start : start + self._page_size])
            if child is None:
                break
            if common < self._page_size:
                return Match(pages, child.page, common)
            pages.append(child.page)
            node = child
        return Match(pages, None, 0)

    def insert(self, parent: int | None, key: array, page: int) -> int:
        """Makes ``page`` findable as the page that holds the tokens ``key`` after ``parent``.

        Args:
          parent: the full page before it, already in the tree; None for a first page.
          key: 1 to page_size tokens.
          page: new to the tree, or there after the same parent with the first of these tokens.

        Returns:
          The full page that has these tokens: ``page``, or the one that had them before, in which
          case nothing changes. For tokens that do not fill a page it is ``page`` always; where
          another page begins with the same tokens, nothing changes.
        """
        above = self._root if parent is None else self._nodes[parent]
        child, common = above.closest(key)
        if child is not None and common == len(key):
            return child.page if len(key) == self._page_size else page
        if page in self._nodes:
            self.remove(page)
        self._add(key, page, above)
        return page

    def remove(self, page: int) -> None:
        """Forgets ``page``, which no other page follows."""
        node = self._nodes[page]
        assert not node.children, f"page {page} has pages after it"
        present(node.parent).discard(node)
        del self._nodes[page]

    def trim(self, page: int, length: int) -> None:
        """Forgets the tokens of ``page``, which no other page follows, after the first ``length``.

        Forgets ``page`` altogether where another page begins with the tokens that remain.
        """
        node = self._nodes[page]
        above, key = present(node.parent), node.key[:length]
        self.remove(page)
        if above.closest(key)[1] < length:
            self._add(key, page, above)

    def _add(self, key: array, page: int, parent: _Node) -> None:
        self._nodes[page] = _Node(key, page, parent)
        parent.add(self._nodes[page])
