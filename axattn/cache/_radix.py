"""A radix tree over token ids in which every node is a page.

Keys and values depend on all tokens before them, so the path from the root identifies a page: the
root's children are first pages of sequences, and so on. Inner nodes are full pages. A leaf can have
free slots, and a match can end inside any page.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from axattn._typing import present

_INT64_MAX = np.iinfo(np.int64).max


def parse_token_ids(name: str, tokens: Iterable[int] | int) -> tuple[int, array | None]:
    """Return the number of tokens and, if ``tokens`` has them, their ids as an ``array("q")``.

    Args:
      name: name of the argument in errors.
      tokens: token ids (any iterable of integers, a one-dimensional array) or, as a Python int,
        their number.

    Raises:
      TypeError: anything else. The scalar of an array, such as ``sampled[0]``, is refused: it is
        meant as an id, and would be taken for a number of tokens.
      ValueError: a negative number of tokens, an array with another number of dimensions, or an id
        beyond int64.
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


class PrefixMatch(NamedTuple):
    """The longest prefix of some tokens that is in a tree.

    Attributes:
      pages: full pages that match.
      partial: the page after them that matches in part, or None.
      partial_tokens: how many of its first tokens match, less than a page; 0 for None.
    """

    pages: list[int]
    partial: int | None
    partial_tokens: int


class _Node:
    """A page, its tokens, and the pages after it, sorted by their tokens."""

    __slots__ = ("children", "key", "keys", "page", "parent")

    def __init__(self, key: array, page: int, parent: _Node | None):
        self.key = key
        self.page = page
        self.parent = parent
        self.keys: list[array] = []
        self.children: list[_Node] = []

    def add(self, child: _Node) -> None:
        index = bisect_left(self.keys, child.key)
        self.keys.insert(index, child.key)
        self.children.insert(index, child)

    def discard(self, child: _Node) -> None:
        index = bisect_left(self.keys, child.key)
        assert self.children[index] is child, "siblings have different keys"
        del self.keys[index], self.children[index]

    def find_closest(self, key: array) -> tuple[_Node | None, int]:
        """Return the child that shares the most first tokens with ``key``, and their number."""
        # In sorted order the neighbors of a key share the most tokens with it.
        index = bisect_left(self.keys, key)
        best, most = None, 0
        for child in self.children[max(index - 1, 0) : index + 1]:
            common = _count_common(child.key, key)
            if common > most:
                best, most = child, common
        return best, most


def _count_common(a: array, b: array) -> int:
    """Return the length of the common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


class RadixTree:
    """A tree that finds the pages with the longest known prefix of some tokens.

    It does not know who uses the pages; `PagePool` decides what to remove. Token ids are
    ``array("q")``; see `parse_token_ids`.
    """

    def __init__(self, page_size: int):
        self._page_size = page_size
        self._root = _Node(array("q"), -1, None)
        self._nodes: dict[int, _Node] = {}

    def __len__(self) -> int:
        """Return the number of pages."""
        return len(self._nodes)

    def count_tokens(self, page: int) -> int:
        """Return how many tokens of ``page`` are in the tree; 0 if it is not there."""
        node = self._nodes.get(page)
        return len(node.key) if node else 0

    def list_path(self, page: int) -> list[tuple[int, tuple[int, ...]]]:
        """Return the pages from the first one down to ``page``, each with its token ids."""
        node, out = self._nodes[page], []
        while node.parent is not None:
            out.append((node.page, tuple(node.key)))
            node = node.parent
        return out[::-1]

    def match(self, tokens: array) -> PrefixMatch:
        """Return the longest prefix of ``tokens`` that is in the tree."""
        node = self._root
        pages: list[int] = []
        for start in range(0, len(tokens), self._page_size):
            child, common = node.find_closest(tokens[start : start + self._page_size])
            if child is None:
                break
            if common < self._page_size:
                return PrefixMatch(pages, child.page, common)
            pages.append(child.page)
            node = child
        return PrefixMatch(pages, None, 0)

    def insert(self, parent: int | None, key: array, page: int) -> int:
        """Enter ``page`` as the page with the tokens ``key`` after ``parent``.

        Nothing changes if another page begins with the same tokens.

        Args:
          parent: the full page before it, already in the tree; None for a first page.
          key: 1 to page_size tokens.
          page: a new page, or one that is after the same parent with the first of these tokens.

        Returns:
          ``page``, or the other page if ``key`` fills a page and that page has these tokens.
        """
        parent_node = self._root if parent is None else self._nodes[parent]
        child, common = parent_node.find_closest(key)
        if child is not None and common == len(key):
            return child.page if len(key) == self._page_size else page
        if page in self._nodes:
            self.remove(page)
        self._add(key, page, parent_node)
        return page

    def remove(self, page: int) -> None:
        """Forget ``page``, which no other page follows."""
        node = self._nodes[page]
        assert not node.children, f"page {page} has pages after it"
        present(node.parent).discard(node)
        del self._nodes[page]

    def trim(self, page: int, length: int) -> None:
        """Forget the tokens of ``page`` after the first ``length``; no other page follows it.

        Forget the whole page if another page begins with the remaining tokens.
        """
        node = self._nodes[page]
        parent_node, key = present(node.parent), node.key[:length]
        self.remove(page)
        if parent_node.find_closest(key)[1] < length:
            self._add(key, page, parent_node)

    def _add(self, key: array, page: int, parent: _Node) -> None:
        self._nodes[page] = _Node(key, page, parent)
        parent.add(self._nodes[page])
