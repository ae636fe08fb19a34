"""The page pool against a plain model: any calls in any order (hypothesis).

The model is a list of tokens per sequence and a device: an array of pages into which every token
is written where the block table says, and in which page copies are done. What is stored for a
token is a hash of the whole prefix up to it, as keys and values depend on all tokens before, so a
page that is reused after other tokens is as wrong as one that was overwritten.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from axattn.cache._pool import PagePool, PoolExhaustedError, UnknownSequenceError
from tests.tiers import ci, exhaustive

SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

POISON = -2  # in free pages; no hash of a prefix is negative


def prefix_hashes(tokens) -> list[int]:
    """For each token, a number that stands for it and all tokens before it."""
    out, last = [], 0
    for token in tokens:
        last = hash((last, token)) % 2**62
        out.append(last)
    return out


def common(a, b) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def snapshot(pool: PagePool):
    """All that a pool knows, as values that compare."""
    pages = pool._pages
    return (
        pool._next_id,
        {
            i: (s.pages.tolist(), s.length, s.ids.tolist(), s.cached)
            for i, s in pool._sequences.items()
        },
        list(pages._free),
        list(pages._holders),
        list(pages._readers),
        list(pages._copies.items()),
        list(pages._evictable),
        {page: pages.tree.list_path(page) for page in pages.tree._nodes},
    )


@dataclasses.dataclass
class Row:
    """A live sequence of the model."""

    tokens: list[int]
    stored: int  # leading tokens that the device was given
    known: int  # leading tokens whose ids the pool was told


some_tokens = st.lists(st.integers(0, 1), max_size=9)


class PoolMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.sampled_from([1, 3, 6, 9, 14, 20, 1000]),
        page_size=st.integers(1, 5),
        first=some_tokens,
    )
    def start(self, num_pages, page_size, first):
        self.pool = PagePool(num_pages, page_size)
        self.roomy = num_pages == 1000  # nothing is ever evicted
        self.device = np.full((num_pages, page_size), POISON, np.int64)
        self.rows: dict[int, Row] = {}
        self.dead: list[int] = []
        self.past: list[list[int]] = [first]  # tokens to draw prefixes from
        self.published: list[list[int]] = []
        self.tick = 0
        self.released: dict[int, int] = {}  # cached page -> when it was last used
        self.tree_before: set[int] = set()
        for _ in range(2):
            self.allocate_tokens(first, "list")

    # The device.

    def copy_pages(self):
        sources, targets = self.pool.take_copies()
        assert sources.dtype == targets.dtype == np.int32
        assert len(set(targets)) == len(targets) and not set(targets) & set(sources)
        self.device[targets] = self.device[sources]

    def store(self, ids):
        """A step of the model: copies, then the tokens that are not stored yet."""
        self.copy_pages()
        size = self.pool.page_size
        width = max([1] + [-(-len(self.rows[i].tokens) // size) for i in ids])
        table = self.pool.block_table(ids, width)
        lengths = self.pool.lengths(ids)
        for pages, length, i in zip(table, lengths, ids, strict=True):
            row = self.rows[i]
            assert length == len(row.tokens)
            hashes = prefix_hashes(row.tokens)
            for at in range(row.stored, len(row.tokens)):
                assert pages[at // size] >= 0
                self.device[pages[at // size], at % size] = hashes[at]
            assert (pages[-(-len(row.tokens) // size) :] == -1).all()
            row.stored = len(row.tokens)

    # Requests.

    def request(self, call, most: int):
        """``call()``, or None if the pool is exhausted; ``most`` pages must be enough for it."""
        before, statistics = snapshot(self.pool), self.pool.statistics()
        try:
            return call()
        except PoolExhaustedError as error:
            assert snapshot(self.pool) == before
            assert most > statistics.pages_free + statistics.pages_cached
            assert error.needed > error.free + error.evictable
            assert error.free == statistics.pages_free
            assert error.free + error.evictable + error.in_use == self.pool.num_pages
            assert str(error.needed) in str(error)
            return None

    def choose(self, data, label="sequence"):
        return data.draw(st.sampled_from(sorted(self.rows)), label=label)

    @rule(data=st.data(), more=some_tokens)
    def allocate(self, data, more):
        old = data.draw(st.sampled_from(self.past[-8:]), label="prefix of")
        tokens = old[: data.draw(st.just(len(old)) | st.integers(0, len(old)))] + more
        form = data.draw(st.sampled_from(["list", "iterator", "array", "list", "number"]))
        self.allocate_tokens(tokens, form)

    def allocate_tokens(self, tokens, form):
        tree = self.pool._pages.tree
        known = [[t for _, key in tree.list_path(page) for t in key] for page in tree._nodes]
        longest = max([common(tokens[:-1], each) for each in known], default=0)
        if self.roomy:
            assert longest == max([common(tokens[:-1], p) for p in self.published], default=0)
        given = {
            "list": lambda: list(tokens),
            "iterator": lambda: iter(tokens),
            "array": lambda: np.array(tokens, np.int32),
            "number": lambda: len(tokens),
        }
        most = -(-len(tokens) // self.pool.page_size)
        made = self.request(lambda: self.pool.allocate(given[form]()), most)
        if made is None:
            assert not self.roomy
            return
        assert made not in self.rows and made not in self.dead
        known = 0 if form == "number" else len(tokens)
        cached = min(longest, known)
        assert self.pool.cached(made) == cached
        self.rows[made] = Row(tokens, cached, known)
        self.past.append(tokens)

    def room_to_append(self, row: Row, count: int) -> int:
        size = self.pool.page_size
        new = -(-(len(row.tokens) + count) // size) - -(-len(row.tokens) // size)
        return new + 1 if count else 0

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), more=some_tokens, by_number=st.integers(0, 5))
    def append(self, data, more, by_number):
        self.append_to(self.choose(data), more, by_number == 0)

    def append_to(self, i, more, by_number=False):
        row = self.rows[i]
        before = self.pool.statistics()
        last = self.last_page(i)
        shared = last is not None and self.holders()[last] > 1
        found = 0 if last is None else self.pool._pages.tree.count_tokens(last)
        pending = len(self.pool._pages.pending_copies)
        given = len(more) if by_number else more
        done = self.request(
            lambda: self.pool.append(i, given) or True, self.room_to_append(row, len(more))
        )
        if done is None:
            assert not self.roomy
            # One page more than the new ones is only needed to copy a shared page.
            spare = before.pages_free + before.pages_cached
            assert shared or self.room_to_append(row, len(more)) - 1 > spare
            return
        if last is not None and more:
            at = len(row.tokens)
            moved = self.pool._sequences[i].pages[at // self.pool.page_size] != last
            copied = len(self.pool._pages.pending_copies) > pending
            if shared:
                assert moved and copied
            elif found <= at % self.pool.page_size:
                assert not moved and not copied
        if row.known == len(row.tokens) and not by_number:
            row.known += len(more)
        row.tokens = row.tokens + more

    def publish(self, i):
        row = self.rows[i]
        if row.stored < len(row.tokens) or self.pool._pages.pending_copies:
            self.store([i])
        if row.known < len(row.tokens):
            before = snapshot(self.pool)
            with pytest.raises(ValueError, match="ids of the first"):
                self.pool.publish(i)
            assert snapshot(self.pool) == before
            self.pool.publish(i, row.tokens)
            row.known = len(row.tokens)
        else:
            self.pool.publish(i)
        assert self.pool.cached(i) == len(row.tokens)
        self.published.append(row.tokens)
        self.past.append(row.tokens)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def publish_one(self, data):
        self.publish(self.choose(data))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def publish_all(self, data):
        for i in data.draw(st.permutations(sorted(self.rows))):
            self.publish(i)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def finish(self, data):
        i = self.choose(data)
        self.publish(i)
        self.the_least_recently_used_goes_first()  # What publishing used is used before the end.
        self.free(i)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data):
        i = self.choose(data)
        before = self.pool.statistics()
        self.fork_of(i)
        after = self.pool.statistics()
        assert after.pages_in_use == before.pages_in_use
        assert after.tokens_stored == before.tokens_stored

    def fork_of(self, i) -> int:
        made = self.pool.fork(i)
        assert made not in self.rows and made not in self.dead
        self.rows[made] = dataclasses.replace(self.rows[i])
        return made

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), times=st.integers(1, 4))
    def branch(self, data, times):
        i = self.choose(data)
        for token in range(times):
            i = self.fork_of(i)
            self.append_to(i, [token % 2])

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def truncate(self, data):
        self.truncate_one(self.choose(data), data)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), more=some_tokens, published=st.booleans(), all_there_is=st.booleans())
    def rewrite(self, data, more, published, all_there_is):
        i = self.choose(data)
        if published:
            self.publish(i)
        self.truncate_one(i, data)
        if all_there_is and not self.roomy:
            have, size = self.pool.statistics(), self.pool.page_size
            rest = -len(self.rows[i].tokens) % size
            more = [0] * (rest + size * (have.pages_free + have.pages_cached))
        self.append_to(i, more)

    def truncate_one(self, i, data):
        row = self.rows[i]
        length = data.draw(st.integers(0, len(row.tokens)), label="length")
        self.pool.truncate(i, length)
        row.tokens = row.tokens[:length]
        row.stored, row.known = min(row.stored, length), min(row.known, length)

    def free(self, i):
        self.pool.free(i)
        del self.rows[i]
        self.dead.append(i)
        self.refuse_the_dead()

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def free_one(self, data):
        self.free(self.choose(data))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def step(self, data):
        self.store(data.draw(st.lists(st.sampled_from(sorted(self.rows)), unique=True)))

    @precondition(lambda self: self.tick % 4 == 0)
    @rule(beyond=st.integers(1, 3))
    def refuse_too_many(self, beyond):
        have = self.pool.statistics()
        pages = have.pages_free + have.pages_cached + beyond
        assert self.request(lambda: self.pool.allocate(pages * self.pool.page_size), pages) is None

    def refuse_the_dead(self):
        i = self.dead[-1]
        before, pool = snapshot(self.pool), self.pool
        for call in (
            lambda: pool.append(i, [1]),
            lambda: pool.publish(i),
            lambda: pool.fork(i),
            lambda: pool.truncate(i, 0),
            lambda: pool.free(i),
            lambda: pool.cached(i),
            lambda: pool.lengths([i]),
            lambda: pool.block_table([i], 100),
        ):
            with pytest.raises(UnknownSequenceError, match=f"sequence {i} is unknown"):
                call()
        assert snapshot(pool) == before

    # What must hold after every step.

    def last_page(self, i):
        """The page that the next token of ``i`` goes to, if it is there already."""
        sequence = self.pool._sequences[i]
        return sequence.pages[-1] if sequence.length % self.pool.page_size else None

    def holders(self) -> list[int]:
        counts = [0] * self.pool.num_pages
        for sequence in self.pool._sequences.values():
            for page in sequence.pages:
                counts[page] += 1
        return counts

    @invariant()
    def every_page_is_somewhere(self):
        pages, holders = self.pool._pages, self.holders()
        readers = [0] * self.pool.num_pages
        for source in pages._copies.values():
            readers[source] += 1
        assert holders == pages._holders and readers == pages._readers
        free, cached = pages._free, list(pages._evictable)
        used = [p for p in range(self.pool.num_pages) if holders[p] or readers[p]]
        assert sorted([*free, *cached, *used]) == list(range(self.pool.num_pages))
        assert not set(free) & set(pages.tree._nodes)
        assert set(cached) == set(pages.tree._nodes) - set(used)
        for sequence in self.pool._sequences.values():
            assert len(set(sequence.pages)) == len(sequence.pages)
            assert len(sequence.pages) == -(-sequence.length // self.pool.page_size)
        self.device[free] = POISON

    @invariant()
    def sequences_read_their_own_tokens(self):
        assert self.pool._sequences.keys() == self.rows.keys()
        copies = self.pool._pages._copies
        for i, row in self.rows.items():
            assert self.pool.lengths([i]).tolist() == [len(row.tokens)]
            assert self.pool.cached(i) <= row.stored
            sequence = self.pool._sequences[i]
            assert sequence.ids.tolist() == row.tokens[: row.known]
            # A copy that is still to be done will bring what its source holds now.
            stored = self.device[[copies.get(page, page) for page in sequence.pages]]
            assert stored.ravel()[: row.stored].tolist() == prefix_hashes(row.tokens)[: row.stored]

    @invariant()
    def the_tree_finds_what_is_stored(self):
        pages, size = self.pool._pages, self.pool.page_size
        order = {page: at for at, page in enumerate(pages._evictable)}
        assert len(pages.tree) == len(pages.tree._nodes)
        held_after = {}
        for i, sequence in self.pool._sequences.items():
            for at, page in enumerate(sequence.pages):
                held_after.setdefault(page, sequence.pages[:at])
                assert held_after[page] == sequence.pages[:at], (i, page)
        for page in pages.tree._nodes:
            assert page not in pages._copies
            path = pages.tree.list_path(page)
            assert path[-1][0] == page and all(len(key) == size for _, key in path[:-1])
            tokens = [t for _, key in path for t in key]
            stored = self.device[[p for p, _ in path]].ravel()[: len(tokens)]
            assert stored.tolist() == prefix_hashes(tokens)
            if page in held_after:
                assert held_after[page].tolist() == [p for p, _ in path[:-1]]
            for above, _ in path[:-1]:
                assert page in order or above not in order
                assert above not in order or order[page] < order[above]

    @invariant()
    def the_least_recently_used_goes_first(self):
        pages = self.pool._pages
        self.tick += 1
        tree = set(pages.tree._nodes)
        evicted = [self.released[p] for p in self.tree_before - tree if p in self.released]
        kept = [self.released[p] for p in pages._evictable if p in self.released]
        if evicted:
            assert not self.roomy
            assert max(evicted) <= min(kept, default=self.tick)
        self.released = {p: self.released.get(p, self.tick) for p in pages._evictable}
        self.tree_before = tree

    @invariant()
    def statistics_count(self):
        have, pages = self.pool.statistics(), self.pool._pages
        assert have.pages_free + have.pages_cached + have.pages_in_use == self.pool.num_pages
        assert (have.pages_free, have.pages_cached) == (len(pages._free), len(pages._evictable))
        assert have.tokens_logical == sum(len(row.tokens) for row in self.rows.values())
        slots = {
            (page, at)
            for sequence in self.pool._sequences.values()
            for index, page in enumerate(sequence.pages)
            for at in range(min(self.pool.page_size, sequence.length - index * self.pool.page_size))
        }
        assert have.tokens_stored == len(slots)


@pytest.mark.parametrize(
    "examples, steps",
    [
        (40, 40),
        *ci((100, 40)),
        *exhaustive((600, 60)),
    ],
)
def test_pool_against_a_model(examples, steps):
    more = settings(SETTINGS, max_examples=examples, stateful_step_count=steps)
    run_state_machine_as_test(PoolMachine, settings=more)
