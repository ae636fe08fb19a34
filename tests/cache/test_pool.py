"""The page pool: each behaviour by itself. Any mix of them: test_pool_states.py."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from axattn.cache._pool import PagePool, PoolExhaustedError, PoolStatistics, UnknownSequenceError

PROMPT = list(range(10))  # of pages of 4: two full ones and half of a third


def pages(pool: PagePool, sequence: int) -> list[int]:
    row = pool.block_table([sequence], 64)[0]
    return row[row >= 0].tolist()


def copies(pool: PagePool) -> list[tuple[int, int]]:
    sources, targets = pool.take_copies()
    assert sources.dtype == targets.dtype == np.int32
    return list(zip(sources.tolist(), targets.tolist(), strict=True))


def stored(pool: PagePool, tokens) -> int:
    """A sequence whose tokens were computed and published."""
    sequence = pool.allocate(tokens)
    pool.take_copies()
    pool.publish(sequence)
    return sequence


def counts(pool: PagePool) -> tuple[int, int, int]:
    have = pool.statistics()
    return have.pages_free, have.pages_cached, have.pages_in_use


# Sequences by themselves.


def test_allocate_append_free():
    pool = PagePool(8, 4)
    a, b = pool.allocate(PROMPT), pool.allocate([7])
    assert pages(pool, a) == [0, 1, 2] and pages(pool, b) == [3]
    pool.append(a, [10, 11])
    assert pages(pool, a) == [0, 1, 2]
    pool.append(a, [12])
    assert pages(pool, a) == [0, 1, 2, 4]
    pool.append(b, [])
    assert pool.lengths([b, a]).tolist() == [1, 13]
    assert counts(pool) == (3, 0, 5)
    pool.free(a)
    assert counts(pool) == (7, 0, 1)
    assert pages(pool, b) == [3] and copies(pool) == []


def test_no_tokens_no_pages():
    pool = PagePool(1, 4)
    for tokens in ((), 0, [], np.zeros(0, np.int32)):
        a = pool.allocate(tokens)
        assert pool.lengths([a]).tolist() == [0] and pages(pool, a) == []
        pool.publish(a)
        pool.free(pool.fork(a))
    pool.append(a, [1])
    assert pages(pool, a) == [0]


def test_same_calls_same_pages():
    def play() -> list:
        pool, out = PagePool(9, 4), []
        for turn in range(12):
            a = pool.allocate(PROMPT[: 3 + turn % 7])
            b = pool.fork(a)
            pool.append(b, [turn])
            out.append(copies(pool))
            pool.publish(b)
            out += [pages(pool, a), pages(pool, b)]
            pool.free(a)
            pool.free(b)
        return out

    assert play() == play()


def test_ids_are_not_used_again():
    pool = PagePool(2, 4)
    seen = set()
    for _ in range(5):
        a = pool.allocate([1])
        seen |= {a, pool.fork(a)}
        for sequence in list(seen)[-2:]:
            pool.free(sequence)
    assert len(seen) == 10


def test_truncate_gives_pages_back():
    pool = PagePool(8, 4)
    a = pool.allocate(PROMPT)
    for length, left in ((9, 3), (8, 2), (5, 2), (5, 2), (0, 0)):
        pool.truncate(a, length)
        assert pool.lengths([a]).tolist() == [length]
        assert counts(pool) == (8 - left, 0, left)
    pool.append(a, [1])
    with pytest.raises(ValueError, match=r"length must be 0 to 1, the length of sequence 0, got 2"):
        pool.truncate(a, 2)
    with pytest.raises(ValueError, match=r"got -1"):
        pool.truncate(a, -1)
    assert pool.lengths([a]).tolist() == [1]


# Forks.


def test_fork_shares_and_copies_the_last_partial_page_only():
    pool = PagePool(8, 4)
    a = pool.allocate(PROMPT)
    b, c = pool.fork(a), pool.fork(a)
    assert pages(pool, a) == pages(pool, b) == pages(pool, c) == [0, 1, 2]
    assert counts(pool) == (5, 0, 3)
    pool.append(b, [1])
    assert copies(pool) == [(2, 3)] and pages(pool, b) == [0, 1, 3]
    pool.append(a, [2, 2, 2])
    assert copies(pool) == [(2, 4)] and pages(pool, a) == [0, 1, 4, 5]
    # The last one that holds the page writes in it.
    pool.append(c, [3])
    assert copies(pool) == [] and pages(pool, c) == [0, 1, 2]
    pool.free(a)
    pool.free(c)
    assert pages(pool, b) == [0, 1, 3] and counts(pool) == (5, 0, 3)


def test_fork_at_a_page_boundary_copies_nothing():
    pool = PagePool(8, 4)
    a = pool.allocate(PROMPT[:8])
    b = pool.fork(a)
    pool.append(a, [1])
    pool.append(b, [2])
    assert copies(pool) == [] and pages(pool, a) == [0, 1, 2] and pages(pool, b) == [0, 1, 3]


def test_fork_takes_no_page():
    pool = PagePool(3, 4)
    a = pool.allocate(PROMPT)
    b = pool.fork(a)
    with pytest.raises(PoolExhaustedError):
        pool.append(b, [1])
    pool.free(a)
    pool.append(b, [1])
    assert pages(pool, b) == [0, 1, 2]


def test_a_truncated_fork_copies_the_page_it_writes_in():
    pool = PagePool(8, 4)
    a = pool.allocate(PROMPT)
    b = pool.fork(a)
    pool.truncate(b, 6)
    pool.append(b, [1, 1, 1])
    assert copies(pool) == [(1, 3)]
    assert pages(pool, a) == [0, 1, 2] and pages(pool, b) == [0, 3, 4]


# Copies.


def test_no_table_and_no_publishing_while_copies_are_pending():
    pool = PagePool(8, 4)
    a = pool.allocate(PROMPT)
    b = pool.fork(a)
    pool.append(b, [1])
    with pytest.raises(RuntimeError, match=r"1 page copies are pending: give take_copies\(\)"):
        pool.block_table([a], 4)
    with pytest.raises(RuntimeError, match=r"sequence 1 has 1 pages whose copies are pending"):
        pool.publish(b)
    pool.publish(a)
    assert copies(pool) == [(2, 3)] and copies(pool) == []
    pool.publish(b)
    assert pages(pool, b) == [0, 1, 3]


def test_the_copy_of_a_copy_reads_the_first_source():
    pool = PagePool(8, 4)
    a = pool.allocate(PROMPT)
    b = pool.fork(a)
    pool.append(b, [1])
    c = pool.fork(b)
    pool.append(c, [1])
    # One gather does both: page 3 has nothing yet when page 4 is written.
    assert copies(pool) == [(2, 3), (2, 4)]


def test_a_source_waits_for_its_copy():
    pool = PagePool(4, 4)
    a = pool.allocate(PROMPT)
    b = pool.fork(a)
    pool.append(b, [1])
    pool.free(a)
    assert counts(pool) == (0, 0, 4)
    with pytest.raises(PoolExhaustedError):
        pool.allocate([5])
    assert copies(pool) == [(2, 3)]
    assert counts(pool) == (1, 0, 3)
    assert pages(pool, pool.allocate([5])) == [2]


def test_a_copy_nobody_needs_any_more_is_not_done():
    for undo in (lambda pool, b: pool.free(b), lambda pool, b: pool.truncate(b, 8)):
        pool = PagePool(4, 4)
        a = pool.allocate(PROMPT)
        b = pool.fork(a)
        pool.append(b, [1])
        pool.free(a)
        undo(pool, b)
        assert copies(pool) == []
        assert pool.statistics().pages_free >= 2


# Prefixes.


def test_a_published_prefix_is_shared():
    pool = PagePool(8, 4)
    a = stored(pool, PROMPT)
    assert pool.cached(a) == 10
    b = pool.allocate([*PROMPT[:8], 77, 78])
    assert pool.cached(b) == 8 and copies(pool) == []
    assert pages(pool, b) == [0, 1, 3] and counts(pool) == (4, 0, 4)


def test_nothing_is_found_before_it_is_published():
    pool = PagePool(8, 4)
    pool.allocate(PROMPT)
    assert pool.cached(pool.allocate(PROMPT)) == 0


def test_a_match_that_ends_inside_a_page_is_copied():
    pool = PagePool(8, 4)
    stored(pool, PROMPT)
    b = pool.allocate([*PROMPT[:6], 77])
    assert pool.cached(b) == 6
    assert copies(pool) == [(1, 3)] and pages(pool, b) == [0, 3]


def test_one_token_is_left_to_compute():
    pool = PagePool(8, 4)
    pool.free(stored(pool, PROMPT[:8]))
    b = pool.allocate(PROMPT[:8])
    assert pool.cached(b) == 7
    assert copies(pool) == [(1, 2)] and pages(pool, b) == [0, 2]
    # What it computes is there already: its page is given back.
    pool.publish(b)
    assert pages(pool, b) == [0, 1] and pool.cached(b) == 8


def test_a_partial_page_that_nobody_uses_is_continued_in_place():
    pool = PagePool(8, 4)
    pool.free(stored(pool, PROMPT))
    assert counts(pool) == (5, 3, 0)
    b = pool.allocate([*PROMPT, 10, 11, 12])
    assert pool.cached(b) == 10 and copies(pool) == [] and pages(pool, b) == [0, 1, 2, 3]
    # It is in use now, and still found: the next one gets a copy.
    c = pool.allocate([*PROMPT, 20])
    assert pool.cached(c) == 10 and copies(pool) == [(2, 4)] and pages(pool, c) == [0, 1, 4]


def test_a_partial_page_grows_under_its_owner():
    pool = PagePool(8, 4)
    a = stored(pool, PROMPT)
    for token in (10, 11, 12):
        pool.append(a, [token])
        assert copies(pool) == []
        pool.publish(a)
        b = pool.allocate([*range(token + 1), 77])
        assert pool.cached(b) == token + 1
        pool.free(b)
    assert pages(pool, a) == [0, 1, 2, 3]


def test_equal_pages_become_one():
    """Two that computed the same prompt at the same time, and a fork of one of them."""
    pool = PagePool(9, 4)
    a, b = pool.allocate(PROMPT), pool.allocate(PROMPT)
    c = pool.fork(b)
    assert counts(pool) == (3, 0, 6)
    pool.publish(a)
    pool.publish(b)
    assert pages(pool, a) == [0, 1, 2]
    assert pages(pool, b) == pages(pool, c) == [0, 1, 5]  # a page in part stays each one's own
    assert counts(pool) == (5, 0, 4)
    pool.free(a)
    pool.append(b, [77])
    assert copies(pool) == [(5, 4)] and pages(pool, c) == [0, 1, 5]


def test_a_page_that_another_one_overtook_is_given_back():
    pool = PagePool(8, 4)
    a = stored(pool, PROMPT)
    b = pool.allocate(range(12))
    assert copies(pool) == [(2, 3)]
    pool.publish(b)
    pool.append(a, [10, 11])  # in place, in a page that is found by its first two tokens
    assert copies(pool) == [] and pages(pool, a) == [0, 1, 2]
    pool.publish(a)
    assert pages(pool, a) == pages(pool, b) == [0, 1, 3]
    assert counts(pool) == (5, 0, 3)


def test_a_fork_keeps_the_pages_above_the_one_it_holds():
    """Its page enters the tree through its twin, under a page of a stranger, who then ends."""
    pool = PagePool(6, 4)
    a, b = pool.allocate(PROMPT[:4]), pool.allocate(PROMPT[:8])
    c = pool.fork(b)
    pool.publish(a)
    pool.publish(b)
    pool.free(a)
    pool.free(b)
    assert pages(pool, c) == [0, 2]
    pool.allocate(4 * 4)  # evicts whatever can be
    assert pages(pool, c) == [0, 2]


def test_publish_takes_ids_that_were_not_known():
    pool = PagePool(8, 4)
    a = pool.allocate(PROMPT[:6])
    pool.append(a, 4)
    with pytest.raises(
        ValueError, match="has 10 tokens, and only the ids of the first 6 are known"
    ):
        pool.publish(a)
    with pytest.raises(ValueError, match="must be the 10 tokens of sequence 0, got 9"):
        pool.publish(a, PROMPT[:9])
    with pytest.raises(ValueError, match="do not begin with the known tokens of sequence 0"):
        pool.publish(a, PROMPT[::-1])
    with pytest.raises(TypeError, match="got a number of tokens"):
        pool.publish(a, 10)
    assert pool.cached(a) == 0
    pool.publish(a, np.array(PROMPT))
    assert pool.cached(pool.allocate([*PROMPT, 77])) == 10
    # Ids after unknown ones are at an unknown place only until the unknown are cut off.
    b = pool.allocate(3)
    pool.append(b, [1])
    with pytest.raises(ValueError, match="has 4 tokens, and only the ids of the first 0 are known"):
        pool.publish(b)
    pool.truncate(b, 0)
    pool.append(b, [1])
    pool.publish(b)


def test_cached_is_what_is_known_to_be_stored():
    pool = PagePool(8, 4)
    a = stored(pool, PROMPT)
    pool.append(a, [1])
    assert pool.cached(a) == 10 == pool.cached(pool.fork(a))
    pool.truncate(a, 3)
    assert pool.cached(a) == 3


# Published tokens that are truncated and then written over.


def test_a_published_page_is_copied_before_it_is_written_over():
    pool = PagePool(8, 4)
    a = stored(pool, PROMPT)
    pool.truncate(a, 6)
    assert counts(pool) == (5, 1, 2)
    pool.append(a, [66, 77])
    assert copies(pool) == [(1, 3)] and pages(pool, a) == [0, 3]
    pool.publish(a)
    assert pool.cached(pool.allocate([*PROMPT, 10])) == 10
    assert pool.cached(pool.allocate([*PROMPT[:6], 66, 77, 88])) == 8


def test_without_a_page_for_the_copy_the_tree_forgets():
    pool = PagePool(3, 4)
    a = stored(pool, PROMPT)
    pool.truncate(a, 6)
    pool.append(a, [66, 77, 88])  # its second page, and the third one, which was only cached
    assert copies(pool) == [] and pages(pool, a) == [0, 1, 2]
    pool.free(a)
    b = pool.allocate([*PROMPT[:8]])
    assert pool.cached(b) == 6


def test_reuse_does_not_make_a_request_fail():
    """One page, published: no room for a copy of it, and room for the prompt all the same."""
    pool = PagePool(1, 4)
    pool.free(stored(pool, [1, 2, 3, 4]))
    b = pool.allocate([1, 2, 3, 5])
    assert pool.cached(b) == 3 and copies(pool) == [] and pages(pool, b) == [0]
    pool.free(b)
    assert pool.cached(pool.allocate([1, 2, 3, 4])) == 3


# Eviction.


@pytest.mark.parametrize("evicted", range(7))
def test_the_least_recently_used_goes_first_and_leaves_before_their_parents(evicted):
    pool = PagePool(7, 4)
    first, second = range(12), range(100, 112)
    pool.free(stored(pool, first))
    pool.free(stored(pool, second))
    pool.free(pool.allocate(first))  # used again, so the second is older now
    assert counts(pool) == (1, 6, 0)
    pool.free(pool.allocate(4 * (1 + evicted)))
    assert counts(pool) == (1 + evicted, 6 - evicted, 0)

    def found(tokens) -> int:
        probe = copy.deepcopy(pool)
        return probe.cached(probe.allocate([*tokens, 77]))

    assert found(second) == 4 * max(3 - evicted, 0)
    assert found(first) == 4 * min(6 - evicted, 3)


def test_only_as_much_as_needed_is_evicted():
    pool = PagePool(4, 4)
    pool.free(stored(pool, range(12)))
    a = pool.allocate(8)
    assert counts(pool) == (0, 2, 2)
    pool.free(a)
    assert pool.cached(pool.allocate(range(12))) == 8


def test_pages_in_use_are_not_evicted():
    pool = PagePool(4, 4)
    a = stored(pool, PROMPT)
    with pytest.raises(PoolExhaustedError):
        pool.allocate(5)
    pool.free(pool.allocate(4))
    assert pages(pool, a) == [0, 1, 2]
    # A prefix is not evicted to make room for the sequence that shares it.
    pool.free(a)
    with pytest.raises(
        PoolExhaustedError, match="needs 3 pages and the pool has 2: 1 free, 1 evict"
    ):
        pool.allocate([*range(8), *range(50, 62)])
    assert counts(pool) == (1, 3, 0)


# Errors.


def test_exhaustion_names_need_and_supply_and_changes_nothing():
    pool = PagePool(8, 4)
    a = stored(pool, PROMPT)
    pool.free(stored(pool, [50, 51, 52, 53, 54]))
    before = counts(pool), pages(pool, a), pool.lengths([a]).tolist()
    with pytest.raises(PoolExhaustedError) as error:
        pool.append(a, range(30))
    assert str(error.value) == (
        "appending 30 tokens to sequence 0 needs 7 pages and the pool has 5: 3 free, 2 evictable; "
        "3 are in use"
    )
    assert isinstance(error.value, RuntimeError)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    with pytest.raises(PoolExhaustedError, match=r"^allocating 999 tokens needs 250 pages"):
        pool.allocate(999)
    assert before == (counts(pool), pages(pool, a), pool.lengths([a]).tolist())
    pool.append(a, range(22))
    assert counts(pool) == (0, 0, 8)


@pytest.mark.parametrize("sequence", [1, 7, -1, None, "a", [0]])
def test_unknown_sequences_are_named(sequence):
    pool = PagePool(8, 4)
    a, b = pool.allocate(PROMPT), pool.allocate([1])
    pool.free(b)
    for call in (
        lambda: pool.free(sequence),
        lambda: pool.append(sequence, [1]),
        lambda: pool.publish(sequence),
        lambda: pool.fork(sequence),
        lambda: pool.truncate(sequence, 0),
        lambda: pool.cached(sequence),
    ):
        with pytest.raises(UnknownSequenceError) as error:
            call()
        assert str(error.value) == (
            f"sequence {sequence!r} is unknown: freed before, or never allocated"
        )
    assert isinstance(error.value, KeyError)
    assert pages(pool, a) == [0, 1, 2] and counts(pool) == (5, 0, 3)


def test_wrong_arguments():
    for sizes, error in (((0, 4), ValueError), ((4, -1), ValueError), ((4, 2.0), TypeError)):
        with pytest.raises(error, match=r"^(num_pages|page_size) must be "):
            PagePool(*sizes)
    pool = PagePool(4, 4)
    a = pool.allocate([1])
    for call in (lambda: pool.append(a, np.int32(3)), lambda: pool.allocate("ab")):
        with pytest.raises(TypeError, match="^tokens takes token ids"):
            call()
    assert pool.lengths([a]).tolist() == [1]


# What comes out.


def test_block_table():
    pool = PagePool(8, 4)
    a, b = pool.allocate(PROMPT), pool.allocate([1])
    table = pool.block_table([b, None, a], 4)
    assert table.dtype == np.int32
    assert table.tolist() == [[3, -1, -1, -1], [-1] * 4, [0, 1, 2, -1]]
    lengths = pool.lengths([b, None, a])
    assert lengths.dtype == np.int32 and lengths.tolist() == [1, 0, 10]
    assert pool.block_table([], 2).shape == (0, 2) and pool.lengths([]).shape == (0,)
    assert pool.block_table([a], 3).tolist() == [[0, 1, 2]]
    with pytest.raises(
        ValueError, match="sequence 0 has 10 tokens in 3 pages of 4; pages_per_row is 2"
    ):
        pool.block_table([b, a], 2)
    with pytest.raises(ValueError, match="sequence 1 is in the table twice; fork it"):
        pool.block_table([b, a, b], 4)
    with pytest.raises(ValueError, match="pages_per_row must be positive, got 0"):
        pool.block_table([b], 0)
    # The table is the caller's own.
    table[:] = 9
    assert pool.block_table([a], 3).tolist() == [[0, 1, 2]]


def test_statistics():
    pool = PagePool(8, 4)
    assert pool.statistics() == PoolStatistics(8, 4, 8, 0, 0, 0, 0)
    assert pool.statistics().overhead == 1.0
    a = stored(pool, PROMPT)
    b = pool.fork(a)
    pool.append(b, [1])
    pool.take_copies()
    c = pool.allocate([*PROMPT[:4], 77])
    assert pool.statistics() == PoolStatistics(
        num_pages=8,
        page_size=4,
        pages_free=3,
        pages_cached=0,
        pages_in_use=5,
        tokens_stored=4 + 4 + 2 + 3 + 1,
        tokens_logical=10 + 11 + 5,
    )
    assert pool.statistics().overhead == 20 / 14
    for sequence in (a, b, c):
        pool.free(sequence)
    assert pool.statistics() == PoolStatistics(8, 4, 5, 3, 0, 0, 0)
    assert repr(pool) == "PagePool(num_pages=8, page_size=4): 0 sequences, 5 pages free, 3 cached"
    assert (pool.num_pages, pool.page_size) == (8, 4)
