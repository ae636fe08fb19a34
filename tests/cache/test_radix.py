"""The radix tree of pages, and what counts as token ids."""

from __future__ import annotations

from array import array

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axattn.cache._radix import PrefixMatch, RadixTree, parse_token_ids

SIZE = 3


def ids(*tokens) -> array:
    return array("q", tokens)


def add(tree: RadixTree, tokens, first: int) -> list[int]:
    """Inserts all tokens as pages ``first``, ``first + 1``, ...; returns the pages that have them."""
    parent, out = None, []
    for at in range(0, len(tokens), SIZE):
        parent = tree.insert(parent, ids(*tokens[at : at + SIZE]), first + at // SIZE)
        out.append(parent)
    return out


def test_an_empty_tree_finds_nothing():
    tree = RadixTree(SIZE)
    assert len(tree) == 0 and tree.count_tokens(0) == 0
    for tokens in (ids(), ids(1), ids(1, 2, 3, 4)):
        assert tree.match(tokens) == PrefixMatch([], None, 0)


def test_match_ends_anywhere():
    tree = RadixTree(SIZE)
    assert add(tree, [1, 2, 3, 4, 5, 6, 7], 10) == [10, 11, 12]
    assert [tree.count_tokens(page) for page in (10, 11, 12, 13)] == [3, 3, 1, 0]
    for tokens, match in (
        ((9,), ([], None, 0)),
        ((1,), ([], 10, 1)),
        ((1, 2, 9, 4), ([], 10, 2)),
        ((1, 2, 3), ([10], None, 0)),
        ((1, 2, 3, 9), ([10], None, 0)),
        ((1, 2, 3, 4, 5), ([10], 11, 2)),
        ((1, 2, 3, 4, 5, 6), ([10, 11], None, 0)),
        ((1, 2, 3, 4, 5, 6, 7, 8, 9), ([10, 11], 12, 1)),
        ((4, 5, 6), ([], None, 0)),  # the tokens of page 11, but not after those of page 10
    ):
        assert tree.match(ids(*tokens)) == match, tokens
    assert tree.list_path(12) == [(10, (1, 2, 3)), (11, (4, 5, 6)), (12, (7,))]


def test_a_full_page_that_is_there_is_kept():
    tree = RadixTree(SIZE)
    add(tree, [1, 2, 3, 4, 5, 6], 10)
    assert add(tree, [1, 2, 3, 4, 5, 7], 20) == [10, 21]
    assert len(tree) == 3 and tree.count_tokens(20) == 0
    assert tree.match(ids(1, 2, 3, 4, 5, 7)) == ([10, 21], None, 0)


def test_a_page_that_filled_up():
    tree = RadixTree(SIZE)
    add(tree, [1], 10)
    assert tree.insert(None, ids(1, 5), 10) == 10
    assert tree.insert(None, ids(1, 5, 3), 10) == 10
    assert tree.match(ids(1, 5, 3)) == ([10], None, 0) and len(tree) == 1
    # Fewer tokens than it has say nothing new.
    assert tree.insert(None, ids(1, 5), 10) == 10 and tree.count_tokens(10) == 3
    # Another page took the place meanwhile.
    add(tree, [2], 20)
    add(tree, [2, 2, 2], 21)
    assert tree.insert(None, ids(2, 2, 2), 20) == 21 and tree.count_tokens(20) == 1


def test_tokens_that_another_page_begins_with_are_not_entered_twice():
    tree = RadixTree(SIZE)
    add(tree, [1, 2, 3], 10)
    assert add(tree, [1, 2], 20) == [20]
    assert tree.count_tokens(20) == 0 and len(tree) == 1


def test_remove_leaves_the_rest():
    tree = RadixTree(SIZE)
    add(tree, [1, 2, 3, 4, 5, 6], 10)
    add(tree, [1, 2, 3, 4, 9], 20)
    tree.remove(11)
    assert tree.match(ids(1, 2, 3, 4, 5, 6)) == ([10], 21, 1)
    with pytest.raises(AssertionError, match="page 10 has pages after it"):
        tree.remove(10)
    tree.remove(21)
    tree.remove(10)
    assert len(tree) == 0 and tree.match(ids(1)) == ([], None, 0)


def test_trim_forgets_tokens():
    tree = RadixTree(SIZE)
    add(tree, [1, 2, 3, 4, 5, 6], 10)
    with pytest.raises(AssertionError, match="page 10 has pages after it"):
        tree.trim(10, 2)
    tree.trim(11, 2)
    assert tree.match(ids(1, 2, 3, 4, 5, 6)) == ([10], 11, 2)
    tree.trim(11, 1)
    assert tree.match(ids(1, 2, 3, 4, 5, 6)) == ([10], 11, 1) and len(tree) == 2
    # What remains is in another page too.
    add(tree, [1, 2, 3, 7, 7], 20)
    add(tree, [1, 2, 3, 7, 8, 8], 30)
    tree.trim(31, 1)
    assert tree.match(ids(1, 2, 3, 7, 8)) == ([10], 21, 1)
    assert len(tree) == 3 and tree.count_tokens(31) == 0


def test_a_chain_longer_than_the_stack():
    tree = RadixTree(1)
    parent = None
    for page in range(20_000):
        parent = tree.insert(parent, ids(page % 7), page)
    assert len(tree.match(array("q", [t % 7 for t in range(20_000)])).pages) == 20_000


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(-1, 1), min_size=1, max_size=9), max_size=12),
    st.lists(st.integers(-1, 1), max_size=10),
)
def test_match_is_the_longest_prefix(sequences, query):
    tree = RadixTree(SIZE)
    for number, tokens in enumerate(sequences):
        add(tree, tokens, 100 * number)
    lengths = [
        next(
            (i for i in range(min(len(s), len(query))) if s[i] != query[i]), min(len(s), len(query))
        )
        for s in sequences
    ]
    match = tree.match(ids(*query))
    assert len(match.pages) * SIZE + match.partial_tokens == max(lengths, default=0)
    assert (match.partial is None) == (match.partial_tokens == 0)


@pytest.mark.parametrize(
    "tokens",
    [
        [5, -6, 7],
        (5, -6, 7),
        iter([5, -6, 7]),
        np.array([5, -6, 7], np.int16),
        jnp.array([5, -6, 7]),
        [np.int32(5), -6, 7],
    ],
    ids=lambda x: type(x).__name__,
)
def test_token_ids(tokens):
    assert parse_token_ids("tokens", tokens) == (3, ids(5, -6, 7))


def test_token_ids_of_nothing_and_of_a_number():
    assert (
        parse_token_ids("tokens", ())
        == parse_token_ids("tokens", np.zeros(0, np.uint8))
        == (0, ids())
    )
    assert parse_token_ids("tokens", 12) == (12, None)
    assert parse_token_ids("tokens", np.array([2**63 - 1], np.uint64)) == (1, ids(2**63 - 1))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (-1, ValueError, "a number of tokens >= 0, got -1"),
        (True, TypeError, "got bool"),
        (2.0, TypeError, "got float"),
        (None, TypeError, "got NoneType"),
        ("12", TypeError, "got str"),
        ([1.0], TypeError, "ids of type float64"),
        ([True], TypeError, "ids of type bool"),
        ([2**70], TypeError, "ids of type object"),
        (np.int32(7), TypeError, "got a scalar of type int32"),
        (np.array(7), TypeError, "got a scalar of type ndarray"),
        (jnp.int32(7), TypeError, "got a scalar of type ArrayImpl"),
        (np.zeros((1, 2), int), ValueError, r"got shape \(1, 2\)"),
        (
            np.array([2**63], np.uint64),
            ValueError,
            "must be int64, got an id of 9223372036854775808",
        ),
    ],
)
def test_what_token_ids_are_not(tokens, error, message):
    with pytest.raises(error, match=f"^prompt .*{message}"):
        parse_token_ids("prompt", tokens)
