"""Which tokens can be drawn, and how often they are: against plain numpy."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.sampling import GREEDY, Sampling, candidates, sample

pytestmark = pytest.mark.ci
LOGITS = np.array([1.0, -2.0, 3.5, 0.25, 3.0, -0.5, 2.0], np.float32)


def expected(logits, temperature, top_k, top_p):
    """Probabilities [V], token by token in Python."""
    scaled = logits.astype(np.float64) / temperature
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])[:top_k]
    weights = {i: np.exp(scaled[i] - scaled.max()) for i in order}
    total = sum(weights.values())
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if top_p is not None and mass >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return np.array([weights[i] / total if i in kept else 0.0 for i in range(len(scaled))])


def offered(logits, sampling):
    """Probabilities [..., V] that `candidates` leaves."""
    kept, tokens = candidates(jnp.asarray(logits), sampling)
    probabilities = np.zeros(logits.shape)
    np.put_along_axis(probabilities, np.asarray(tokens), np.asarray(jax.nn.softmax(kept)), -1)
    return probabilities


def test_the_probabilities_are_those_of_plain_code():
    rows = np.stack([LOGITS, LOGITS[::-1]])
    settings = itertools.product([0.3, 2.5], [None, 1, 3, 50], [None, 1e-9, 0.6, 1.0])
    for given in settings:
        got = offered(rows, Sampling(*given))
        want = np.stack([expected(row, *given) for row in rows])
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=str(given))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7, top_k=3), Sampling(1.5, top_p=0.8), Sampling(1.2, 4, 0.9)],
)
def test_tokens_are_drawn_as_often_as_they_should_be(sampling):
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.vmap(lambda key: sample(jnp.asarray(LOGITS), sampling, key))(keys)
    share = np.bincount(np.asarray(drawn), minlength=len(LOGITS)) / count
    want = expected(LOGITS, sampling.temperature, sampling.top_k, sampling.top_p)
    assert (share[want == 0] == 0).all()
    np.testing.assert_allclose(share, want, atol=4 * np.sqrt(0.25 / count))  # four deviations


def test_greedy_takes_the_likeliest_without_a_key():
    assert sample(jnp.asarray([LOGITS, -LOGITS]), GREEDY).tolist() == [2, 1]


def test_top_k_keeps_no_more_tokens_where_logits_are_equal():
    kept, tokens = candidates(jnp.zeros((5,)), Sampling(1.0, top_k=2))
    assert tokens.tolist() == [0, 1] and jnp.isfinite(kept).all()


def test_equally_likely_tokens_under_top_p():
    kept, _ = candidates(jnp.zeros((4,)), Sampling(1.0, top_p=0.5))
    assert jnp.isfinite(kept).tolist() == [True, True, False, False]


def test_tokens_that_are_ruled_out_stay_out():
    logits = jnp.asarray([0.0, -jnp.inf, 1.0, -jnp.inf])
    keys = jax.random.split(jax.random.key(1), 200)
    drawn = jax.vmap(lambda key: sample(logits, Sampling(3.0, top_p=1.0), key))(keys)
    assert set(drawn.tolist()) == {0, 2}


def test_wrong_settings_are_refused():
    wrong = {"temperature": [-0.1, float("nan")], "top_k": [0], "top_p": [0.0, 1.1]}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} takes"):
                Sampling(**{name: value})
    with pytest.raises(ValueError, match="^key takes"):
        sample(jnp.asarray(LOGITS), Sampling(1.0))
