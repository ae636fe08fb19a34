"""From logits to a token: greedy, temperature, top-k and top-p, in this order."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from axattn._typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Static under ``jit``.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: draw from this many of the likeliest tokens only; None: from all.
      top_p: draw from the likeliest tokens only, as few as have this much of the probability
        together (nucleus sampling, arXiv:1904.09751); after temperature and top_k.

    Raises:
      ValueError: temperature < 0, top_k < 1, or top_p outside (0, 1].
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature takes a number of at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k takes None or at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p takes None or a number in (0, 1], got {self.top_p}")


GREEDY = Sampling()


def candidates(
    logits: Float[Array, "*batch V"], sampling: Sampling
) -> tuple[Float[Array, "*batch C"], Int[Array, "*batch C"]]:
    """The tokens that can be drawn, likeliest first, and their logits.

    Of tokens with equal logits the lower id comes first. The likeliest token is always kept.

    Returns:
      logits [..., C], divided by the temperature, -inf for tokens that top_p leaves out; token ids
      [..., C]. C is top_k, or V without it.
    """
    vocabulary = logits.shape[-1]
    count = vocabulary if sampling.top_k is None else min(sampling.top_k, vocabulary)
    kept, tokens = jax.lax.top_k(logits.astype(jnp.float32) / sampling.temperature, count)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(kept, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The first always counts: where all before is 0, rounding must not decide.
        inside = (before < sampling.top_p).at[..., 0].set(True)
        kept = jnp.where(inside, kept, -jnp.inf)
    return kept, tokens


def sample(
    logits: Float[Array, "*batch V"], sampling: Sampling, key: Array | None = None
) -> Int[Array, "*batch"]:
    """Token ids, int32, drawn with ``key`` (which greedy sampling does without).

    Raises:
      ValueError: no key, and the temperature is not 0.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError(f"key takes a PRNG key with temperature {sampling.temperature}, got None")
    kept, tokens = candidates(logits, sampling)
    chosen = jax.random.categorical(key, kept, axis=-1)
    return jnp.take_along_axis(tokens, chosen[..., None], axis=-1)[..., 0]
