"""Text from a model and a cache of any kind: a prompt in chunks, then token by token.

    generated = jit_generate(model, caches, prompts, prompt_lengths, max_new_tokens=32,
                             stop_token=data.STOP)

All of it is one program: the prompt is a loop over chunks, and the new tokens are a
``lax.while_loop`` that ends when every row has stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from axattn._typing import Array, Bool, Int
from axattn.cache import Cache, prefill
from examples.sampling import GREEDY, Sampling, sample


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: int32 [B, max_new_tokens]; behind a row's length, the stop token (0 without one).
      lengths: int32 [B], new tokens per row, a stop token included.
      caches: hold prompts and new tokens except the newest one of each row, which no layer has
        seen yet: it goes in front of what comes next. Where a row's ``overflowed`` is set, the row
        ended for want of room.
    """

    tokens: Int[Array, "B M"]
    lengths: Int[Array, " B"]
    caches: Any


def overflowed(caches: Any, batch: int) -> Bool[Array, " B"]:
    """Which rows did not fit into one of the caches in a pytree, bool [B]."""
    leaves = jax.tree.leaves(caches, is_leaf=lambda x: isinstance(x, Cache))
    flags = [leaf.overflowed for leaf in leaves if isinstance(leaf, Cache)]
    return jnp.stack(flags).any(0) if flags else jnp.zeros((batch,), bool)


def generate(
    model: Callable[..., tuple[Array, Any]],
    caches: Any,
    prompts: Int[Array, "B T"],
    prompt_lengths: Int[Array, " B"] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    rng: Array | None = None,
    stop_token: int | None = None,
    chunk_size: int = 128,
) -> Generated:
    """Continues each prompt until its stop token, or for ``max_new_tokens``.

    A row that has stopped, or that had no prompt, appends nothing to its caches while the others
    go on. Caches that are not empty are continued from.

    Args:
      model: ``model(tokens [B, C], caches=, lengths= [B]) -> (logits [B, C, V], caches)``, such as
        `examples.decoder.Decoder`; it must not change itself.
      caches: what ``model`` takes: see `examples.caches.make_caches`. They need room for a row's
        prompt and all but one of its new tokens.
      prompts, prompt_lengths: right-padded tokens, and how many are real in each row; all by
        default.
      max_new_tokens, sampling, chunk_size: static under ``jit``. Chunks change how much memory a
        prompt takes, not the result.
      rng: a PRNG key, where ``sampling`` draws.
      stop_token: ends a row; None: no token does.

    Raises:
      ValueError: max_new_tokens < 1, or no rng to draw with; and as the caches do.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens takes at least 1, got {max_new_tokens}")
    if sampling.temperature != 0 and rng is None:
        raise ValueError(f"rng takes a PRNG key with temperature {sampling.temperature}, got None")
    batch, length = prompts.shape
    if prompt_lengths is None:
        prompt_lengths = jnp.full((batch,), length, jnp.int32)
    filling = 0 if stop_token is None else stop_token

    def step(caches, tokens, lengths):
        return model(tokens, caches=caches, lengths=lengths)

    def add(i, logits, state):
        """Draws token i of the rows that go on."""
        tokens, lengths, stopped, caches = state
        stopped |= overflowed(caches, batch)
        token = sample(logits, sampling, None if rng is None else jax.random.fold_in(rng, i))
        token = jnp.where(stopped, filling, token)
        tokens = lax.dynamic_update_slice(tokens, token[:, None], (0, i))
        lengths += (~stopped).astype(jnp.int32)
        if stop_token is not None:
            stopped |= token == stop_token
        return tokens, lengths, stopped, caches

    def goes_on(loop):
        i, (_, _, stopped, _) = loop
        return (i < max_new_tokens) & ~stopped.all()

    def body(loop):
        i, (tokens, lengths, stopped, caches) = loop
        newest = lax.dynamic_slice(tokens, (0, i - 1), (batch, 1))
        logits, caches = step(caches, newest, (~stopped).astype(jnp.int32))
        return i + 1, add(i, logits[:, 0], (tokens, lengths, stopped, caches))

    logits, caches = prefill(step, caches, prompts, prompt_lengths, chunk_size=chunk_size)
    state = (
        jnp.full((batch, max_new_tokens), filling, jnp.int32),
        jnp.zeros((batch,), jnp.int32),
        jnp.asarray(prompt_lengths) == 0,
        caches,
    )
    _, (tokens, lengths, _, caches) = lax.while_loop(goes_on, body, (1, add(0, logits, state)))
    return Generated(tokens, lengths, caches)


# For models that are NNX modules. The caches are donated: they are updated in place.
jit_generate = nnx.jit(
    generate,
    static_argnames=("max_new_tokens", "sampling", "chunk_size"),
    donate_argnames="caches",
)


@nnx.jit(static_argnames="max_new_tokens")
def generate_without_cache(
    model: Callable[..., Array], prompts: Int[Array, "B T"], *, max_new_tokens: int
) -> Int[Array, "B M"]:
    """The same greedily, with all of the text through the model for each token: int32 [B, M].

    What caches are compared with. ``model(tokens [B, T]) -> logits [B, T, V]`` must be causal: the
    text is padded to its final length.
    """
    length = prompts.shape[1]
    texts = jnp.pad(jnp.asarray(prompts, jnp.int32), ((0, 0), (0, max_new_tokens)))

    def body(i, texts):
        logits = lax.dynamic_slice_in_dim(model(texts), i - 1, 1, 1)
        newest = jnp.argmax(logits, -1).astype(jnp.int32)
        return lax.dynamic_update_slice_in_dim(texts, newest, i, 1)

    texts = lax.fori_loop(length, length + max_new_tokens, body, texts)
    return texts[:, length:]
