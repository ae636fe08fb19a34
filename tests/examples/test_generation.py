"""`generate`: the tokens of a plain loop without a cache, rows that stop, and room that ends."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.caches import KINDS, make_caches
from examples.generation import generate, generate_without_cache, jit_generate
from examples.sampling import Sampling, candidates
from tests.examples.models import VOCABULARY, small

pytestmark = pytest.mark.ci
LENGTHS = (17, 1, 9)
NEW = 12
NEVER = VOCABULARY  # a stop token that no row says
ROOM = max(LENGTHS) + NEW - 1  # the newest token is in no cache


def prompts():
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (3, max(LENGTHS)), np.int32)
    for row, length in enumerate(LENGTHS):
        tokens[row, length:] = -1  # padding is not read
    return tokens


@nnx.jit
def whole(model, tokens):
    return model(tokens)


def logits_of(text):
    """[T, V] of a text of T tokens, in one pass; padded, so that there is one program."""
    padded = np.zeros((1, max(LENGTHS) + NEW), np.int32)
    padded[0, : len(text)] = text
    return whole(small(), padded)[0, : len(text)]


@functools.cache
def plain(stop=None):
    """Greedy tokens by full passes, each row alone."""
    rows = []
    for row, length in zip(prompts(), LENGTHS, strict=True):
        text = list(row[:length])
        while len(text) < length + NEW and (len(text) == length or text[-1] != stop):
            text.append(int(logits_of(text)[-1].argmax()))
        rows.append(text[length:])
    return rows


def caches(kind="dense", length=ROOM, batch=3, **options):
    return make_caches(small().config, kind, batch, length, page_size=8, max_append=4, **options)


def run(kind="dense", stop_token=NEVER, given=None, lengths=LENGTHS, **options):
    """`generate` with arguments that let tests share its programs."""
    options = dict(max_new_tokens=NEW, stop_token=stop_token, chunk_size=7) | options
    given = caches(kind) if given is None else given
    return jit_generate(small(), given, prompts(), np.array(lengths), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_a_plain_loop_without_a_cache(kind):
    got = run(kind)
    assert got.tokens.tolist() == plain()
    assert got.lengths.tolist() == [NEW] * 3
    # The newest token is not in the caches yet.
    for cache in got.caches:
        assert cache.lengths.tolist() == [length + NEW - 1 for length in LENGTHS]
    # Three rows that say different things, and more than one.
    assert len({tuple(row) for row in plain()}) == 3 and len(set(plain()[0])) > 2


def test_without_a_cache_in_one_program():
    """Whole prompts only: rows of one length."""
    got = generate_without_cache(small(), prompts()[:1], max_new_tokens=NEW)
    assert got.tolist() == [plain()[0]]


@pytest.mark.parametrize("kind", ["dense", "ring"])
def test_rows_stop_by_themselves(kind):
    # A token that one row says early, and that another does not, or says later.
    stop = next(t for t in plain()[0][1:4] if plain()[1][:6].count(t) == 0)
    want = plain(stop)
    lengths = [len(row) for row in want]
    assert len(set(lengths)) > 1 and min(lengths) < NEW
    got = run(kind, stop)
    assert got.lengths.tolist() == lengths
    for row, tokens in zip(want, got.tokens.tolist(), strict=True):
        assert tokens == row + [stop] * (NEW - len(row))
    # A row that has stopped appends nothing, not even its stop token.
    for cache in got.caches:
        assert cache.lengths.tolist() == [p + n - 1 for p, n in zip(LENGTHS, lengths, strict=True)]


def test_the_loop_ends_when_all_rows_have_stopped():
    class Counting:
        """A model that says the number of tokens in the cache, and notes its calls."""

        def __init__(self):
            self.calls = []

        def __call__(self, tokens, *, caches, lengths):
            jax.debug.callback(lambda n: self.calls.append(n.tolist()), lengths)
            caches = caches + lengths
            return jax.nn.one_hot(jnp.broadcast_to(caches[:, None], tokens.shape), 50), caches

    model = Counting()
    got = generate(
        model,
        jnp.zeros(2, int),
        jnp.zeros((2, 8), int),
        np.array([8, 5]),
        max_new_tokens=30,
        stop_token=10,
    )
    jax.effects_barrier()
    assert got.tokens[:, :6].tolist() == [[8, 9, 10, 10, 10, 10], [5, 6, 7, 8, 9, 10]]
    assert got.lengths.tolist() == [3, 6]
    assert model.calls == [[8, 5], [1, 1], [1, 1], [0, 1], [0, 1], [0, 1]]
    assert (got.tokens == 10).sum() == 30 - 2 + 30 - 5


def test_a_row_without_a_prompt_says_nothing():
    got = run(lengths=(LENGTHS[0], 0, LENGTHS[2]))
    assert got.lengths.tolist() == [NEW, 0, NEW]
    assert [got.tokens[0].tolist(), got.tokens[2].tolist()] == [plain()[0], plain()[2]]
    assert got.tokens[1].tolist() == [NEVER] * NEW
    assert got.caches[0].lengths[1] == 0


def test_a_conversation_goes_on_in_the_same_caches():
    """Prompts in one chunk, and without a stop token."""
    half = NEW // 2
    first = jit_generate(small(), caches(), prompts(), np.array(LENGTHS), max_new_tokens=half)
    newest = np.zeros((3, max(LENGTHS)), np.int32)
    newest[:, 0] = first.tokens[:, -1]
    second = jit_generate(small(), first.caches, newest, np.ones(3, int), max_new_tokens=half)
    both = np.concatenate([first.tokens, second.tokens], axis=1)
    assert both.tolist() == plain()


def test_rows_that_run_out_of_room_end_and_say_so():
    """Prompts of 17, 1 and 9 tokens, and room for 16 tokens."""
    got = run(given=caches("paged", length=16))
    # A prompt that does not fit is not answered; a row ends with the token that no longer does.
    lengths = [0, NEW, 16 - 9 + 1]
    assert got.lengths.tolist() == lengths
    for row, tokens, length in zip(plain(), got.tokens.tolist(), lengths, strict=True):
        assert tokens == row[:length] + [NEVER] * (NEW - length)
    for cache in got.caches:
        assert cache.overflowed.tolist() == [True, False, True]
        assert cache.lengths[1:].tolist() == [1 + NEW - 1, 16]


def test_sampling():
    """Every token is a candidate after those before it, and the key decides which."""
    sampling = Sampling(1.5, top_k=4, top_p=0.95)
    first, again, other = (
        run(sampling=sampling, rng=jax.random.key(seed)).tokens.tolist() for seed in (5, 5, 6)
    )
    assert first == again != other
    assert first != plain()
    for new, prompt, length in zip(first, prompts(), LENGTHS, strict=True):
        logits = logits_of([*prompt[:length], *new])[length - 1 : -1]
        kept, tokens = candidates(logits, sampling)
        for token, finite, ids in zip(new, jnp.isfinite(kept), np.asarray(tokens), strict=True):
            assert token in ids[np.asarray(finite)]


def test_caches_are_donated():
    given = caches()
    run(given=given)
    assert all(array.is_deleted() for array in jax.tree.leaves(given))


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="^max_new_tokens takes at least 1, got 0"):
        generate(small(), caches(), prompts(), max_new_tokens=0)
    with pytest.raises(ValueError, match="^rng takes a PRNG key"):
        generate(small(), caches(), prompts(), max_new_tokens=1, sampling=Sampling(1.0))
    with pytest.raises(TypeError, match="cache takes a cache"):
        generate(small(), (1, 2), prompts(), max_new_tokens=1)
