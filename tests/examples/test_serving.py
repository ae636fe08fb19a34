"""`Server`: greedy's tokens, whatever is shared; common prefixes are read and stored once."""

from __future__ import annotations

import numpy as np
import pytest

from axattn.cache import PoolExhaustedError
from examples.generation import generate_without_cache
from examples.serving import Server
from tests.examples.models import VOCABULARY, small

pytestmark = pytest.mark.ci
NEW, PAGE, COMMON = 3, 4, 10


def prompts():
    """Three that begin alike; their fourth pages differ."""
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (3, 14), np.int32)
    tokens[:, :COMMON] = tokens[0, :COMMON]
    tokens[:, COMMON] = [1, 2, 3]
    return tokens


def server(**sizes):
    sizes = dict(rows=3, num_pages=20, page_size=PAGE, pages_per_row=6) | sizes
    return Server(small(), **sizes)


def greedy():
    return np.asarray(generate_without_cache(small(), prompts(), max_new_tokens=NEW))


def continued(made, sequences):
    return np.array([made.step(sequences) for _ in range(NEW)]).T


def test_a_common_prefix_is_read_once():
    made = server()
    first = made.start(prompts()[:1])
    assert made.tokens_read == 14
    others = made.start(prompts()[1:])
    assert made.tokens_read == 14 + 2 * (14 - COMMON)
    now = made.pool.statistics()
    assert now.tokens_logical == 3 * 14
    # Pages of COMMON's full pages once; the page in which they part is each one's own.
    assert now.pages_in_use == COMMON // PAGE + 3 * 2
    np.testing.assert_array_equal(continued(made, first + others), greedy())


def test_a_fork_copies_when_it_parts():
    made = server()
    (one,) = made.start(prompts()[:1])
    other = made.fork(one)
    assert made.pool.statistics().pages_in_use == 4
    tokens = made.newest[one], (made.newest[one] + 1) % VOCABULARY
    made.step([one, other], tokens)
    tables = made.pool.block_table([one, other], 6)
    assert (tables[0] == tables[1]).tolist() == [True] * 3 + [False] + [True] * 2
    # Neither has written into the other's page.
    text = np.array([[*prompts()[0], token] for token in tokens])
    want = np.asarray(generate_without_cache(small(), text, max_new_tokens=NEW))
    np.testing.assert_array_equal(continued(made, [one, other]), want)


def test_what_has_ended_is_found_again():
    made = server()
    (one,) = made.start(prompts()[:1])
    newest = made.newest[one]
    made.pool.free(one)
    (again,) = made.start(prompts()[:1])
    assert made.tokens_read == 14 + 1
    assert made.newest[again] == newest


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda made, _: made.start(prompts()), "a call takes 1 to 2 rows, got 3"),
        (lambda made, _: made.start([[1], []]), r"a row takes 1 to 24 tokens, got \[1, 0\]"),
        (lambda made, _: made.start([[1] * 25]), r"a row takes 1 to 24 tokens, got \[25\]"),
        (lambda made, own: made.step([*own, *own]), "sequences takes each once"),
        (lambda made, own: made.step(own, [1, 2]), "tokens takes one for each of 1, got 2"),
    ],
)
def test_what_is_refused_changes_nothing(bad, message):
    made = server(rows=2)
    own = made.start(prompts()[:1])
    before = made.pool.statistics()
    with pytest.raises(ValueError, match=message):
        bad(made, own)
    assert made.pool.statistics() == before
    np.testing.assert_array_equal(continued(made, own), greedy()[:1])


def test_too_few_pages_change_nothing():
    made = server(rows=2, num_pages=7)  # of 4 tokens: the two have 6 pages and need 7, then 8
    texts = prompts()[:2, :12]
    want = np.asarray(generate_without_cache(small(), texts[:1], max_new_tokens=NEW))
    texts[1] = (texts[1] + 5) % VOCABULARY  # nothing in common
    first, second = made.start(texts)
    with pytest.raises(PoolExhaustedError):
        made.start([texts[0][::-1]])
    assert made.pool.lengths([first, second]).tolist() == [12, 12]
    with pytest.raises(PoolExhaustedError):
        made.step([first, second])
    assert made.pool.lengths([first, second]).tolist() == [12, 12]
    made.pool.free(second)
    np.testing.assert_array_equal(continued(made, [first]), want)
