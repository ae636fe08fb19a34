"""`Server`: greedy's tokens, whatever is shared; common prefixes are read and stored once."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from examples.generation import generate_without_cache
from examples.serving import Server
from tests.examples.models import VOCABULARY, small

NEW, PAGE, COMMON = 3, 4, 10


def prompts():
    """Three that begin alike; their fourth pages differ."""
    tokens = np.array(jax.random.randint(jax.random.key(1), (3, 14), 0, VOCABULARY), np.int32)
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


def test_more_rows_than_there_are():
    made = server(rows=2)
    with pytest.raises(ValueError, match="sequences takes at most 2 rows, got 3"):
        made.start(prompts())
