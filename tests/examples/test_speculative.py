"""Speculative decoding: greedy's tokens whatever is drafted, and fewer calls where drafts are right."""

from __future__ import annotations

import numpy as np
import pytest

from examples.caches import make_caches
from examples.generation import generate_without_cache
from examples.speculative import ngram_draft, speculate
from tests.examples.models import VOCABULARY, small

pytestmark = pytest.mark.ci
NEW, SIZE, LENGTH = 12, 3, 9


def prompts():
    return np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH), np.int32)


def greedy():
    return np.asarray(generate_without_cache(small(), prompts(), max_new_tokens=NEW))


def run(draft, kind="dense", **options):
    caches = make_caches(small().config, kind, 2, LENGTH + NEW + SIZE, page_size=8, max_append=8)
    options = dict(draft_size=SIZE, max_new_tokens=NEW) | options
    return speculate(small(), caches, prompts(), draft=draft, **options)


def oracle(text, count):
    """What greedy decoding says next."""
    row = prompts()[:, : len(text)].tolist().index(text[:LENGTH])
    behind = len(text) - LENGTH
    return ([*greedy()[row], *[0] * count])[behind : behind + count]


@pytest.mark.parametrize("kind", ["dense", "ring", "paged"])
def test_right_drafts_save_calls(kind):
    got = run(oracle, kind)
    np.testing.assert_array_equal(got.tokens, greedy())
    # The prompt gives one token, each call 1 + SIZE.
    assert got.calls == -(-(NEW - 1) // (1 + SIZE))
    assert got.accepted >= got.drafted - 2 * SIZE


def test_wrong_drafts_cost_calls_and_nothing_else():
    got = run(lambda text, count: [(t + 1) % VOCABULARY for t in oracle(text, count)])
    np.testing.assert_array_equal(got.tokens, greedy())
    assert got.calls == NEW - 1 and got.accepted == 0
    assert got.drafted == 2 * SIZE * (NEW - 1)


def test_rows_part():
    """One row's drafts are right, the other's are not."""

    def draft(text, count):
        right = oracle(text, count)
        first = text[:LENGTH] == prompts()[0].tolist()
        return right if first else [(t + 1) % VOCABULARY for t in right]

    got = run(draft, "ring")
    np.testing.assert_array_equal(got.tokens, greedy())
    assert got.calls == NEW - 1
    assert 0 < got.accepted < got.drafted


@pytest.mark.parametrize(
    "text, count, want",
    [
        ([1, 2, 3, 9, 1, 2, 3], 2, [9, 1]),
        ([1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3], 1, [9]),  # the longest match, not the last
        ([5, 3, 6, 3, 7, 3], 1, [7]),  # the last of equal ones
        ([4, 4, 4], 3, [4, 4, 4]),
        ([1, 2, 3], 2, [3, 3]),  # nothing found
        ([1], 2, [1, 1]),
    ],
)
def test_ngram_draft(text, count, want):
    assert ngram_draft(text, count) == want


@pytest.mark.parametrize("kind, sizes", [("dense", (LENGTH + 3, 8)), ("ring", (64, 1))])
def test_caches_without_the_room(kind, sizes):
    """A text that is silently another one would be the worst of answers."""
    length, max_append = sizes
    caches = make_caches(small().config, kind, 2, length, max_append=max_append)

    def wrong(text, count):
        return [(t + 1) % VOCABULARY for t in oracle(text, count)]

    with pytest.raises(ValueError, match=r"caches takes room .* rows \[0, 1\] overflowed"):
        speculate(small(), caches, prompts(), draft=wrong, draft_size=10, max_new_tokens=NEW)


def test_what_is_accepted_is_in_the_text():
    got = run(oracle, max_new_tokens=2)  # the prompt's token, and one of three drafted
    assert (got.calls, got.accepted, got.drafted) == (1, 2, 2 * SIZE)
    np.testing.assert_array_equal(got.tokens, greedy()[:, :2])


def test_a_draft_of_another_size():
    with pytest.raises(ValueError, match="draft takes 3 tokens to say, said 2"):
        run(lambda text, count: [1] * (count - 1))


@pytest.mark.parametrize("name", ["draft_size", "max_new_tokens"])
def test_sizes(name):
    with pytest.raises(ValueError, match=f"{name} takes at least 1, got 0"):
        run(oracle, **{name: 0})
