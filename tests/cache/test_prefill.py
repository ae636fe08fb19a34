"""Prompts in chunks give what one pass gives, and stop where the longest row ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn.cache import prefill
from tests import caches, reference
from tests.caches import B, N, h
from tests.tiers import ci

LENGTHS = np.array([37, 11, 0])


def model(embedding):
    """A one-layer model: token ids to outputs, through a cache."""

    def step(cache, tokens, lengths):
        q, k, v = (embedding[name][tokens] for name in ("q", "k", "v"))
        out, cache = cache.extend(q, k, v, lengths=lengths)
        return {"out": out, "ids": tokens}, cache

    return step


def inputs():
    rng = np.random.default_rng(0)
    q, k, v = caches.tokens(50, batch=1)
    tokens = rng.integers(0, 50, (B, 40))
    return {"q": q[0], "k": k[0], "v": v[0]}, jnp.asarray(tokens)


@pytest.mark.parametrize(
    "kind, chunk_size",
    [
        ("dense", 7),
        ("ring", 40),
        ("paged", 1),
        *ci(("dense", 64), ("paged", 16), ("ring", 1)),
    ],
)
def test_chunks_do_not_matter(kind, chunk_size):
    embedding, tokens = inputs()
    cache = caches.make(kind, max_append=4)
    run = jax.jit(lambda c, t, n: prefill(model(embedding), c, t, n, chunk_size=chunk_size))
    last, cache = run(cache, tokens, LENGTHS)
    q, k, v = (embedding[name][tokens] for name in ("q", "k", "v"))
    full = reference.attend(q, k, v, is_causal=True).out
    for b, n in enumerate(LENGTHS):
        want = full[b, n - 1] if n else np.zeros((N, h))
        np.testing.assert_allclose(last["out"][b], want, atol=1e-6)
        assert int(last["ids"][b]) == (int(tokens[b, n - 1]) if n else 0)
    np.testing.assert_array_equal(cache.lengths, LENGTHS)
    assert not cache.overflowed.any()


def test_only_as_many_chunks_as_are_needed():
    chunks = []

    def step(cache, tokens, lengths):
        jax.debug.callback(lambda n: chunks.append(n), lengths)
        return tokens, cache

    for longest, want in ((0, 0), (1, 1), (8, 1), (9, 2), (40, 5)):
        chunks.clear()
        prefill(step, (), jnp.zeros((2, 40), int), np.array([longest, 0]), chunk_size=8)
        jax.effects_barrier()
        assert len(chunks) == want


@pytest.mark.parametrize(
    "tokens, lengths, chunk_size, message",
    [
        (np.zeros((2, 4)), [5, 1], 2, "lengths takes"),
        (np.zeros((2, 4)), [1], 2, "lengths takes"),
        (np.zeros(4), None, 2, "tokens takes"),
        (np.zeros((2, 0)), None, 2, "tokens takes"),
        (np.zeros((2, 4)), None, 0, "chunk_size takes"),
    ],
)
def test_refused(tokens, lengths, chunk_size, message):
    with pytest.raises(ValueError, match=message):
        prefill(lambda c, t, n: (t, c), (), tokens, lengths, chunk_size=chunk_size)


@pytest.mark.ci
def test_a_prompt_that_does_not_fit():
    embedding, tokens = inputs()
    cache = caches.make("paged", capacity=24)
    with pytest.raises(ValueError, match=r"24 tokens per row; rows \[0\] overflowed"):
        prefill(model(embedding), cache, tokens, LENGTHS, chunk_size=7)
    run = jax.jit(lambda c, t, n: prefill(model(embedding), c, t, n, chunk_size=7))
    _, full = run(cache, tokens, LENGTHS)
    np.testing.assert_array_equal(full.overflowed, [True, False, False])
    np.testing.assert_array_equal(full.lengths, [21, 11, 0])  # and no later token in a hole


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["dense", *ci(("ring",))])
def test_in_shard_map(kind):
    """Rows over devices: each prefills its own."""
    embedding, tokens = inputs()
    tokens, lengths = jnp.tile(tokens[:2], (2, 1)), jnp.array([40, 11, 3, 29])
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("rows")
    cache = caches.make(kind, batch=4, max_append=8)
    run = lambda c, t, n: prefill(model(embedding), c, t, n, chunk_size=8)  # noqa: E731
    want, _ = jax.jit(run)(cache, tokens, lengths)
    specs = jax.tree.map(lambda _: rows, cache)
    got, grown = jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(specs, rows, rows),
            out_specs=({"out": rows, "ids": rows}, specs),
        )
    )(cache, tokens, lengths)
    np.testing.assert_allclose(got["out"], want["out"], atol=1e-6)
    np.testing.assert_array_equal(grown.lengths, lengths)
