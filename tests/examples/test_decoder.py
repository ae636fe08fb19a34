"""The example model: over a cache it is the model without one, whatever the cache and the chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from axattn.cache import RingCache
from examples import checkpoint, data
from examples.caches import KINDS, make_caches
from examples.decoder import Config, Decoder

pytestmark = pytest.mark.ci
LENGTH = 63


def small(kv_heads=2, **fields):
    config = Config(
        31,
        features=32,
        heads=4,
        kv_heads=kv_heads,
        head_dim=8,
        windows=(7, None),
        hidden=48,
        **fields,
    )
    return Decoder(config, rngs=nnx.Rngs(0))


@nnx.jit
def whole(model, tokens):
    return model(tokens)


@nnx.jit
def step(model, tokens, caches, lengths=None):
    return model(tokens, caches=caches, lengths=lengths)


def in_chunks(model, tokens, caches, chunk):
    logits = []
    for start in range(0, tokens.shape[1], chunk):
        some, caches = step(model, tokens[:, start : start + chunk], caches)
        logits.append(some)
    return np.concatenate(logits, axis=1), caches


def tokens_of(vocabulary, batch=3, length=LENGTH):
    return np.random.default_rng(1).integers(0, vocabulary, (batch, length), np.int32)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(
    "kind, kv_heads, chunk",
    [("dense", 1, LENGTH), ("dense", 2, 1), ("ring", 4, 7), ("paged", 2, 21)],
)
def test_chunks_agree_with_the_whole(kind, kv_heads, chunk):
    model = small(kv_heads)
    tokens = tokens_of(31)
    caches = make_caches(model.config, kind, 3, LENGTH, page_size=16, max_append=5)
    got, caches = in_chunks(model, tokens, caches, chunk)
    assert_close(got, whole(model, tokens))
    assert caches[1].lengths.tolist() == [LENGTH] * 3


def test_the_trained_model_in_chunks(trained):
    tokens = tokens_of(len(data.VOCABULARY), batch=2)
    caches = make_caches(trained.config, "dense", 2, LENGTH)
    got, _ = in_chunks(trained, tokens, caches, 21)
    assert_close(got, whole(trained, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths(kind):
    """Each row's logits are those it has alone; what is behind its length is nothing."""
    model = small()
    tokens = tokens_of(31)
    lengths = np.array([[20, 0, 5], [3, 9, 20]])  # two chunks of 20, right-padded
    caches = make_caches(model.config, kind, 3, 40, page_size=16, max_append=20)
    parts, at = [[], [], []], np.zeros(3, int)
    for counts in lengths:
        chunk = np.zeros((3, 20), np.int32)
        for row, count in enumerate(counts):
            chunk[row, :count] = tokens[row, at[row] : at[row] + count]
        logits, caches = step(model, chunk, caches, counts)
        for row, count in enumerate(counts):
            parts[row].append(np.asarray(logits)[row, :count])
        at += counts
    want = np.asarray(whole(model, tokens))
    for row in range(3):
        assert_close(np.concatenate(parts[row]), want[row, : at[row]])
        assert int(caches[0].lengths[row]) == at[row]


def test_a_ring_as_long_as_the_text_serves_a_global_layer():
    model = small()
    tokens = tokens_of(31)
    caches = tuple(
        RingCache.create(3, LENGTH, 2, 8, max_append=8, dtype=jnp.float32) for _ in range(2)
    )
    got, _ = in_chunks(model, tokens, caches, 9)
    assert_close(got, whole(model, tokens))


def test_a_model_in_bfloat16():
    model = small(dtype=jnp.bfloat16)
    tokens = tokens_of(31)
    want = whole(model, tokens)
    caches = make_caches(model.config, "dense", 3, LENGTH, dtype=jnp.bfloat16)
    got, _ = in_chunks(model, tokens, caches, 21)
    assert want.dtype == got.dtype == np.float32
    exact = whole(small(), tokens)
    assert np.abs(got - exact).mean() <= 2 * np.abs(want - exact).mean()


def test_no_token_sees_a_later_one():
    model = small()
    tokens = tokens_of(31)
    other = tokens.copy()
    other[:, 40:] = (tokens[:, 40:] + 1) % 31
    first, second = (np.asarray(whole(model, given)) for given in (tokens, other))
    np.testing.assert_array_equal(first[:, :40], second[:, :40])
    assert np.abs(first[:, 40] - second[:, 40]).max() > 1e-3


def test_ring_caches_do_not_grow_with_the_text():
    config = small().config
    short, long = (make_caches(config, "ring", 2, n) for n in (100, 10_000))
    assert short[0].nbytes == long[0].nbytes < short[1].nbytes < long[1].nbytes


def test_other_kinds_of_caches_are_refused():
    with pytest.raises(ValueError, match="^kind takes one of dense, ring, paged, got 'round'"):
        make_caches(small().config, "round", 1, 10)


def test_checkpoints_come_back_in_float16(tmp_path):
    model = small()
    checkpoint.save(tmp_path / "model.npz", model)
    loaded = checkpoint.load(tmp_path / "model.npz")
    assert loaded.config == model.config
    before, after = (jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (model, loaded))
    for a, b in zip(before, after, strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(a.astype(jnp.float16), b)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "model.npz"
    checkpoint.save(path, small())
    with np.load(path) as file:
        arrays = dict(file)
    arrays["norm/scale"] = arrays["norm/scale"][:-1]
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="norm/scale"):
        checkpoint.load(path)


def test_the_checkpoint_is_small():
    assert checkpoint.TRAINED.stat().st_size < 2**20
