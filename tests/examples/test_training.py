from __future__ import annotations

import random

import jax
import numpy as np
import pytest
from flax import nnx

from examples import data, training
from examples.decoder import Config, Decoder

pytestmark = pytest.mark.ci


def test_updates_lower_both_losses():
    config = Config(len(data.VOCABULARY), features=16, head_dim=8, windows=(7, None), hidden=32)
    model = Decoder(config, rngs=nnx.Rngs(0))
    state = nnx.Optimizer(model, training.optimizer(), wrt=nnx.Param)
    tokens = data.documents(random.Random(0), 4, 65)
    losses = [training.update(model, state, tokens, data.is_answer(tokens)) for _ in range(80)]
    losses = np.array(losses)
    assert np.isfinite(losses).all()
    assert (losses[-1] < 0.8 * losses[0]).all()
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_texts_are_those_of_the_stages(monkeypatch):
    monkeypatch.setattr(training, "STAGES", ((2, 3, 20, (0.0, 0.1)), (1, 2, 50, (0.5, 0.9))))
    made = list(training.texts(0))
    assert [x.shape for x in made] == [(3, 21), (3, 21), (2, 51)]
    again = list(training.texts(0))
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))
    assert not np.array_equal(made[0], next(training.texts(1)))
