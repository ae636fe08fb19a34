"""The reference itself: its gradients by finite differences, its generator by published numbers."""

from __future__ import annotations

import numpy as np
import pytest

from tests import reference

B, T, S, N, K, H, h = 2, 5, 7, 4, 2, 3, 2


def call(seed=0):
    rng = np.random.default_rng(seed)
    arrays = dict(
        query=rng.normal(size=(B, T, N, H)),
        key=rng.normal(size=(B, S, K, H)),
        value=rng.normal(size=(B, S, K, h)),
        bias=rng.normal(size=(1, N, T, 1)),
        sinks=rng.normal(size=N),
    )
    options = dict(
        mask=rng.random((B, 1, T, S)) < 0.6,
        is_causal=True,
        key_value_seq_lengths=np.array([6, 0]),
        logits_soft_cap=1.5,
        scale=0.7,
        dropout_rate=0.25,
        kept=rng.random((B, N, T, S)) < 0.75,
    )
    return arrays, options, rng.normal(size=(B, T, N, h)), rng.normal(size=(B, T, N))


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "sinks", "scale"])
def test_gradients_are_finite_differences(name):
    arrays, options, dout, dlse = call()
    gradients = reference.attend(**arrays, **options).gradients(dout, dlse)

    def loss(step):
        moved = {**arrays, **options}
        moved[name] = moved[name] + step
        result = reference.attend(**moved)
        return (dout * result.out).sum() + (dlse * result.lse).sum()

    direction = np.random.default_rng(1).normal(size=np.shape({**arrays, **options}[name]))
    slope = (loss(1e-5 * direction) - loss(-1e-5 * direction)) / 2e-5
    np.testing.assert_allclose((gradients[name] * direction).sum(), slope, rtol=1e-7)


def test_one_row_by_hand():
    # One query, two keys with scores 0 and log 3, and a sink at log 4: weights 1/8, 3/8, 4/8.
    result = reference.attend(
        np.ones((1, 1, 1)),
        np.array([0.0, np.log(3)]).reshape(2, 1, 1),
        np.array([8.0, 16.0]).reshape(2, 1, 1),
        sinks=np.log([4.0]),
    )
    np.testing.assert_allclose(result.out, [[[7.0]]])
    np.testing.assert_allclose(result.lse, [[np.log(8)]])


def test_rows_without_keys():
    arrays, options, dout, dlse = call()
    result = reference.attend(**{**arrays, "sinks": None}, **options)
    assert np.all(result.out[1] == 0)
    assert np.all(np.isneginf(result.lse[1]))
    assert all(np.isfinite(g).all() for g in result.gradients(dout, dlse).values())


@pytest.mark.parametrize(
    "key, counter, word",
    [  # Random123's known answers for threefry2x32, 20 rounds.
        ((0, 0), (0, 0), 0x6B200159),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), 0x1CB996FC),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), 0xC4923A9C),
    ],
)
def test_threefry(key, counter, word):
    assert reference.threefry_2x32(key, *counter) == word
