"""Gradients of "xla_chunked" where a cotangent, a dtype or a shape is out of the ordinary."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn

ATTEND = {
    name: functools.partial(axattn.dot_product_attention, implementation=name)
    for name in ("xla", "xla_chunked")
}


def arrays(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def both(loss, *args):
    argnums = tuple(range(len(args) - 1))
    return [jax.jit(jax.grad(functools.partial(loss, a), argnums))(*args) for a in ATTEND.values()]


def test_partial_results_merged_by_lse_with_an_empty_row():
    """Both parts are -inf in row 0, so the merge sends NaN back into the LSE."""

    def loss(attend, q, k, bias, weights):
        parts = [
            attend(q, k[:, s], k[:, s], bias[..., s], return_residual=True)
            for s in (slice(0, 30), slice(30, 60))
        ]
        total = jnp.logaddexp(parts[0][1], parts[1][1])
        share = [jnp.where(jnp.isfinite(lse), jnp.exp(lse - total), 0.0) for _, lse in parts]
        return sum(
            (out * s[..., None] * weights).sum() for (out, _), s in zip(parts, share, strict=True)
        )

    q, k, weights = arrays((1, 9, 4, 8), (1, 60, 2, 8), (1, 9, 4, 8))
    bias = jnp.zeros((1, 1, 9, 60)).at[:, :, 0].set(-jnp.inf)
    want, got = both(loss, q, k, bias, weights)
    for w, g in zip(want[:2], got[:2], strict=True):
        assert np.isfinite(g).all()
        np.testing.assert_allclose(g, w, atol=1e-5)


def test_a_rounded_output_moves_no_bias():
    """The same bias for all keys of a row has no effect; an output of bfloat16 would give it one."""
    q, k, v, dout = arrays(*[(1, 20, 2, 16)] * 4, dtype=jnp.bfloat16)
    bias = jnp.zeros((1, 2, 20, 1))
    _, pull = jax.vjp(lambda bias: ATTEND["xla_chunked"](q, k, v, bias), bias)
    np.testing.assert_allclose(pull(dout)[0], bias, atol=1e-5)


def test_sink_of_minus_infinity_is_no_sink():
    def loss(attend, q, k, sinks, mask):
        return (attend(q, k, k, mask=mask, sinks=sinks) ** 2).sum()

    q, k = arrays((1, 9, 4, 8), (1, 60, 2, 8))
    mask = jnp.ones((1, 1, 9, 60), bool).at[:, :, :3].set(False)
    want, got = both(loss, q, k, jnp.full(4, -jnp.inf), mask)
    np.testing.assert_array_equal(got[2], np.zeros(4))
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize("batch", [1, 2])
def test_x64(batch):
    """Several blocks, a bias, and float64 accuracy: the saved LSE is not rounded to float32."""
    with jax.enable_x64(True):
        q, k, bias = arrays(
            (batch, 300, 4, 8), (batch, 600, 2, 8), (1, 4, 300, 600), dtype=jnp.float64
        )

        def loss(attend, q, k, bias, _):
            return (attend(q, k, k, bias, is_causal=True, q_offset=300) ** 2).sum()

        for want, got in zip(*both(loss, q, k, bias, None), strict=True):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, want, atol=1e-12)


def test_gradients_of_gradients_name_the_implementation_that_has_them():
    q, k = arrays((1, 9, 4, 8), (1, 60, 2, 8))

    def loss(q):
        return (ATTEND["xla_chunked"](q, k, k) ** 2).sum()

    for second in (lambda q: jax.grad(loss)(q).sum(), lambda q: jax.jvp(loss, (q,), (q,))[1]):
        with pytest.raises(NotImplementedError, match='gradient of gradients.*ask for "xla"'):
            jax.grad(second)(q)


def test_output_cotangents_of_empty_rows_do_not_count():
    q, k, v = arrays((1, 9, 4, 8), (1, 20, 2, 8), (1, 20, 2, 8))
    attend = functools.partial(ATTEND["xla_chunked"], is_causal=True, q_offset=-4)
    _, pull = jax.vjp(attend, q, k, v)
    dout = jnp.ones(q.shape)
    for got, want in zip(pull(dout.at[:, :4].set(jnp.nan)), pull(dout), strict=True):
        np.testing.assert_array_equal(got, want)
