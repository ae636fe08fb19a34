"""The einsum's own derivative, where the features of tests/test_attention.py do not reach."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn

B, T, N, K, H = 1, 96, 4, 2, 64


def attend(query, key, value, bias, **options):
    return axattn.dot_product_attention(
        query, key, value, bias, is_causal=True, implementation="xla", **options
    )


def attend_exactly(query, key, value, bias):
    """In float64, and in plain JAX."""
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * H**-0.5 + bias
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf))
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def attend_plainly(query, key, value, bias):
    """What the error is compared with: plain attention in the same precision."""
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    scores = scores * H**-0.5 + bias.astype(jnp.float32)
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores).astype(value.dtype), value)


def pull_back(attend, arrays, dout):
    found = jax.jit(lambda arrays, dout: jax.vjp(attend, *arrays)[1](dout))(arrays, dout)
    return [np.asarray(x, np.float64) for x in found]


@pytest.mark.parametrize("keys, values", [(0.0, 0.0), (8.0, 0.0), (0.0, 8.0), (8.0, 8.0)])
def test_offsets_cancel(keys, values):
    """Rounded weights do not add up to 1, and a common offset would be multiplied by the rest.

    A bias that is the same for all keys has almost no gradient.
    """
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    query, key, value, dout = (rng.normal(size=shape) for shape in shapes)
    bias = np.zeros((1, N, T, 1))
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (query, key + keys, value + values, bias, dout)]
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        want = pull_back(attend_exactly, exact[:4], exact[4])
    got, plain = (pull_back(fn, arrays[:4], arrays[4]) for fn in (attend, attend_plainly))
    for own, other, true in zip(got, plain, want, strict=True):
        error, allowed = (np.sqrt(np.mean((x - true) ** 2)) for x in (own, other))
        assert error <= 2 * allowed + 1e-6


def test_second_derivatives_of_an_empty_row():
    """A bias of -inf empties it; the LSE is in the loss, where it is finite."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(1, 5, heads, 8)), jnp.float32) for heads in (2, 1, 1)
    )
    bias = jnp.zeros((1, 2, 5, 5)).at[0, 0, 3].set(-jnp.inf)

    def loss(query):
        out, lse = attend(query, key, value, bias, return_residual=True)
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) ** 2)

    found = jax.jit(jax.grad(lambda query: jnp.sum(jnp.sin(jax.grad(loss)(query)))))(query)
    assert np.isfinite(found).all() and np.abs(found).max() > 0
    np.testing.assert_array_equal(found[0, 3, 0], 0.0)
