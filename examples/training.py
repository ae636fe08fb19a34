"""How the example model is trained: stages of text, the optimizer, one update."""

from __future__ import annotations

import random
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples import data
from examples.decoder import Decoder

# (updates, texts per update, tokens per text, the least and the largest share of filler).
# Texts get longer and thinner: at first many facts and questions next to each other, so that
# guessing among few facts does not pay; then filler between them.
STAGES = (
    (700, 32, 128, (0.0, 0.2)),
    (500, 16, 256, (0.1, 0.9)),
    (300, 4, 1024, (0.1, 0.95)),
)
UPDATES = sum(stage[0] for stage in STAGES)
LEARNING_RATE = 2e-3
# Most other tokens cannot be foreseen: without a weight, their noise is what the gradients show.
ANSWER_WEIGHT = 5.0


def optimizer(updates: int = UPDATES) -> optax.GradientTransformation:
    """AdamW with clipped gradients and a rate that rises for 100 updates, then falls."""
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, 100, updates, LEARNING_RATE / 20)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05)
    )


def texts(seed: int) -> Iterator[np.ndarray]:
    """The tokens of each update, int32 [B, T + 1]."""
    rng = random.Random(seed)
    for updates, batch, length, filler_share in STAGES:
        for _ in range(updates):
            yield data.documents(rng, batch, length + 1, filler_share)


def loss_of(
    model: Decoder,
    inputs: jax.Array,
    targets: jax.Array,
    is_answer: jax.Array,
    positions: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What is minimized, and the mean losses of (answers, other tokens), in nats.

    Args:
      inputs, targets: int32 [B, T], tokens and those that follow them.
      is_answer: bool [B, T], which targets are digits asked for.
      positions: as `Decoder` takes them.
    """
    logits = model(inputs, positions=positions)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    loss = jnp.average(losses, weights=jnp.where(is_answer, ANSWER_WEIGHT, 1.0))
    return loss, (jnp.mean(losses, where=is_answer), jnp.mean(losses, where=~is_answer))


@nnx.jit
def update(
    model: Decoder, state: nnx.Optimizer, tokens: jax.Array, is_answer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One update of the model on tokens [B, T + 1], of which bool ``is_answer`` are digits asked
    for; returns the mean losses of (answers, other tokens), in nats."""
    gradients, losses = nnx.grad(loss_of, has_aux=True)(
        model, tokens[:, :-1], tokens[:, 1:], is_answer[:, 1:]
    )
    state.update(model, gradients)
    return losses
