"""A model for tests that is new, small, and says different things."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from examples.decoder import Config, Decoder

VOCABULARY = 23


@functools.cache
def small() -> Decoder:
    config = Config(VOCABULARY, features=32, head_dim=8, windows=(7, None), hidden=48)
    model = Decoder(config, rngs=nnx.Rngs(3))
    # Larger weights: a new model's likeliest token is nearly always the one it has just read.
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: 2.5 * x if x.ndim > 1 else x, state))
    return model
