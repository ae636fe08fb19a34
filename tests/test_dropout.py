"""Attention dropout: one pattern per key, whatever computes it, forward and backward."""

from __future__ import annotations

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from tests import reference
from tests.precision import dropout_words
from tests.tiers import ci

B, T, N, K, S = 2, 40, 4, 2, 50
RATE = 0.3
KEY = jax.random.key(11)


def attend(q, k, v, *, rng=KEY, rate=RATE, **kwargs):
    return axattn.dot_product_attention(q, k, v, dropout_rate=rate, dropout_rng=rng, **kwargs)


def pattern(rng=KEY, implementation="xla", *, lead=(B,), heads=N, q_len=T, kv_len=S, **kwargs):
    """What is kept, ``[..., N, T, S]``, read off the output: weights 1 / S, and one-hot values."""
    q = jnp.ones((*lead, q_len, heads, 4))
    k = jnp.zeros((*lead, kv_len, K, 4))
    v = jnp.broadcast_to(jnp.eye(kv_len)[:, None], (*lead, kv_len, K, kv_len))
    out = jax.jit(lambda *x: attend(*x[:-1], rng=x[-1], implementation=implementation, **kwargs))(
        q, k, v, rng
    )
    rate = kwargs.get("rate", RATE)
    out = np.asarray(out).swapaxes(-3, -2)
    kept = out > 0.5 / kv_len
    # What is kept is scaled up so that its expectation is the weight.
    np.testing.assert_allclose(out[kept], 1 / kv_len / (1 - rate), rtol=1e-5)
    assert np.all(out[~kept] == 0)
    return kept


@pytest.fixture(scope="module")
def usual():
    return pattern()


def expected(rng=KEY, rate=RATE, lead=(B,), heads=N, q_len=T, kv_len=S, broadcast=False):
    kept = reference.kept(dropout_words(rng), lead, heads, q_len, kv_len, rate, broadcast=broadcast)
    return np.broadcast_to(kept, (*lead, heads, q_len, kv_len))


def test_pattern_is_a_function_of_key_and_indices(usual):
    """Pinned: the same in every version, so that a run can be resumed."""
    np.testing.assert_array_equal(usual, expected())


@pytest.mark.parametrize(
    "blocks, by_row",
    [
        ((16, 24), True),
        *ci(*((b, False) for b in ((16, 24), (7, 11), (40, 50)))),
    ],
)
def test_same_pattern_in_any_blocks(force_blocks, usual, blocks, by_row):
    force_blocks(*blocks, by_row=by_row)
    np.testing.assert_array_equal(pattern(implementation="xla_chunked"), usual)


def test_statistics(usual):
    many = expected(kv_len=400, q_len=200)
    for axis in range(4):
        # Independent draws: means along the others scatter as a binomial's do.
        rest = tuple(a for a in range(4) if a != axis)
        means, n = many.mean(rest), many.size / many.shape[axis]
        assert np.abs(means - (1 - RATE)).max() < 6 * np.sqrt(RATE * (1 - RATE) / n)
    assert abs(usual.mean() - (1 - RATE)) < 6 * np.sqrt(RATE * (1 - RATE) / usual.size)
    flat = usual.reshape(-1, T * S).astype(float)
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 6 / np.sqrt(T * S)


def test_other_keys_other_patterns(usual):
    other = pattern(jax.random.key(12))
    assert 0.3 < (other != usual).mean() < 0.55  # 2 * 0.3 * 0.7 = 0.42


def test_raw_and_typed_keys():
    raw = jax.random.PRNGKey(11)
    np.testing.assert_array_equal(pattern(raw), expected(raw))
    np.testing.assert_array_equal(expected(raw), expected())
    rbg = jax.random.key(3, impl="rbg")
    np.testing.assert_array_equal(pattern(rbg), expected(rbg))


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
def test_broadcast_shares_one_pattern(force_blocks, implementation):
    force_blocks(16, 24, by_row=True)
    kept = pattern(implementation=implementation, broadcast_dropout=True)
    assert np.all(kept == kept[:1, :1])
    np.testing.assert_array_equal(kept, expected(broadcast=True))
    assert 0.65 < kept[0, 0].mean() < 0.75


def test_batch_dimensions_are_rows():
    np.testing.assert_array_equal(
        pattern(lead=(2, 3), q_len=5, kv_len=6), expected(lead=(2, 3), q_len=5, kv_len=6)
    )


@pytest.mark.parametrize(
    "implementation, T",
    [
        ("xla", 5),
        *ci(("xla", 40), ("xla_chunked", 5)),
        ("xla_chunked", 40),
    ],
)
def test_backward_drops_what_forward_dropped(force_blocks, implementation, T):
    force_blocks(16, 24)
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(B, n, heads, 8)).astype(jnp.float32))
        for n, heads in ((T, N), (S, K), (S, K))
    )
    dout = jnp.asarray(rng.normal(size=q.shape).astype(jnp.float32))

    @jax.jit
    def program(q, k, v):
        out, pull = jax.vjp(lambda *x: attend(*x, implementation=implementation), q, k, v)
        return out, pull(dout)

    out, gradients = program(q, k, v)
    exact = reference.attend(q, k, v, dropout_rate=RATE, kept=expected(q_len=T))
    wanted = exact.gradients(dout)
    np.testing.assert_allclose(out, exact.out, atol=1e-5)
    for got, name in zip(gradients, ("query", "key", "value"), strict=True):
        np.testing.assert_allclose(got, wanted[name], atol=2e-5, err_msg=name)
    # And it is no gradient of attention without dropout.
    plain = reference.attend(q, k, v).gradients(dout)
    assert np.abs(plain["value"] - wanted["value"]).max() > 0.1


@pytest.mark.parametrize(
    "implementation, broadcast, tiles",
    [
        ("xla", False, [(B, K, N // K, T, S)]),
        ("xla", True, [(1, 1, 1, T, S)]),
        ("xla_chunked", False, [(B, K, N // K, 16, S), (B, K, S, N // K, 16)]),
    ],
)
def test_drawn_once_on_cpu(force_blocks, implementation, broadcast, tiles):
    """The generator's 20 rounds are once in the program of a pass, of no more than the pattern.

    XLA would draw in every loop that reads the pattern, and a broadcast one for every head.
    """
    force_blocks(16, S)

    def program(q, k, v, rng):
        options = {"implementation": implementation, "broadcast_dropout": broadcast}
        return jax.vjp(lambda *x: attend(*x, rng=rng, **options), q, k, v)[1](q)

    q = jax.ShapeDtypeStruct((B, T, N, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((B, S, K, 8), jnp.float32)
    hlo = jax.jit(program).lower(q, k, k, KEY).compile().as_text()
    drawn = re.findall(rf"= u32\[((?:\d+,)*{S}\b[\d,]*)\]\S* xor\(", hlo)
    # One xor a round; the last one is of the word that has no use.
    assert collections.Counter(drawn) == {",".join(map(str, tile)): 19 for tile in tiles}


def test_expectation_is_attention_without_dropout():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 6, 2, 8)).astype(jnp.float32)) for _ in range(3))
    keys = jax.random.split(KEY, 2000)
    mean = jax.jit(jax.vmap(lambda key: attend(q, k, v, rng=key, rate=0.5)))(keys).mean(0)
    np.testing.assert_allclose(mean, reference.attend(q, k, v).out, atol=0.12)


def test_vmap_over_keys_differs_row_by_row():
    q = jnp.ones((3, 1, 8, N, 4))
    keys = jax.random.split(KEY, 3)
    v = jnp.arange(8.0)[None, None, :, None, None] * jnp.ones((3, 1, 8, K, 1))

    def one(q, v, key):
        return attend(q, q[..., :K, :], v, rng=key)

    out = jax.jit(jax.vmap(one))(q, v, keys)
    assert not np.allclose(out[0], out[1]) and not np.allclose(out[1], out[2])
    alone = jax.jit(one)(q[1], v[1], keys[1])
    np.testing.assert_allclose(out[1], alone, rtol=1e-6)


def test_rate_zero_needs_no_key_and_does_nothing():
    q = jnp.ones((1, 3, 2, 4))
    np.testing.assert_array_equal(
        axattn.dot_product_attention(q, q, q, dropout_rate=0.0, dropout_rng=KEY),
        axattn.dot_product_attention(q, q, q),
    )


def test_lse_does_not_know_of_dropout():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 6, 2, 8)).astype(jnp.float32)) for _ in range(2))
    _, lse = jax.jit(lambda q, k: attend(q, k, k, return_residual=True))(q, k)
    plain = reference.attend(q, k, k).lse
    np.testing.assert_allclose(lse, plain, rtol=1e-5)
