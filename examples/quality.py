"""What a cache's precision costs a model: divergence and perplexity against the cache-free pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from axattn._typing import Array, Bool, Float, Int
from examples import data
from examples.decoder import Decoder
from examples.generation import jit_generate


@nnx.jit
def logits_of(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Without a cache."""
    return model(tokens)


@nnx.jit(static_argnames="chunk_size")
def logits_over(
    model: Decoder, caches: Any, tokens: Int[Array, "B T"], *, chunk_size: int
) -> Float[Array, "B T V"]:
    """Of all tokens, read into caches chunk by chunk. T must be a multiple of ``chunk_size``."""
    batch, length = tokens.shape
    chunks = tokens.reshape(batch, length // chunk_size, chunk_size).swapaxes(0, 1)

    def step(caches, chunk):
        logits, caches = model(chunk, caches=caches)
        return caches, logits

    _, logits = lax.scan(step, caches, chunks)
    return logits.swapaxes(0, 1).reshape(batch, length, -1)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of next-token distributions q from others p, over the positions of texts.

    Attributes:
      divergence: mean of KL(p || q), in nats.
      worst: its largest value.
      perplexity_ratio: perplexity of the text under q, over that under p.
      agreement: share of positions with the same likeliest token.
    """

    divergence: float
    worst: float
    perplexity_ratio: float
    agreement: float


def difference(
    p: Float[Array, "B T V"],
    q: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    where: Bool[Array, "B T"] | None = None,
) -> Difference:
    """From logits p and q of ``tokens``; of the predictions of those tokens ``where`` it is true,
    by default of all but the first, which nothing predicts."""
    p, q, tokens = p[:, :-1], q[:, :-1], tokens[:, 1:]
    where = jnp.ones(tokens.shape, bool) if where is None else where[:, 1:]
    log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    divergences = optax.losses.kl_divergence_with_log_targets(log_q, log_p)
    loss_p, loss_q = (
        optax.softmax_cross_entropy_with_integer_labels(x, tokens).mean(where=where) for x in (p, q)
    )
    return Difference(
        divergence=float(divergences.mean(where=where)),
        worst=float(divergences.max(where=where, initial=0.0)),
        perplexity_ratio=float(jnp.exp(loss_q - loss_p)),
        agreement=float(jnp.mean(p.argmax(-1) == q.argmax(-1), where=where)),
    )


def answered(model: Decoder, prompts: Int[Array, "B T"], answers: Int[Array, "B A"]) -> float:
    """The share of prompts whose every answer token is the likeliest one; without a cache."""
    tokens = np.concatenate([prompts, answers[:, :-1]], axis=1)
    likeliest = np.asarray(logits_of(model, tokens).argmax(-1))[:, prompts.shape[1] - 1 :]
    return float((likeliest == answers).all(1).mean())


def answered_over(
    model: Decoder,
    caches: Any,
    prompts: Int[Array, "B T"],
    answers: Int[Array, "B A"],
    *,
    chunk_size: int = 128,
) -> float:
    """The share of prompts that `jit_generate` answers right over caches, which it takes."""
    generated = jit_generate(
        model,
        caches,
        prompts,
        max_new_tokens=answers.shape[1],
        stop_token=data.STOP,
        chunk_size=chunk_size,
    )
    return float((np.asarray(generated.tokens) == answers).all(1).mean())
