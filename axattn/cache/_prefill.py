"""Prompts in chunks: memory does not grow with the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from axattn import _jax_compat
from axattn._jax_compat import vary_over, varying_axes
from axattn._typing import Array, ArrayLike
from axattn.cache._base import Cache
from axattn.cache._checks import counts_of, is_concrete, positive

Step = Callable[[Any, Array, Array], tuple[Any, Any]]


def prefill(
    step: Step,
    cache: Any,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    chunk_size: int,
) -> tuple[Any, Any]:
    """Runs prompts through a model chunk by chunk, and returns what it says of their last tokens.

    Chunks have one shape, and rows that ended are padded, so memory does not depend on the prompt.
    Only as many chunks are run as the longest row needs. To be called under ``jax.jit``, where it
    is compiled once for prompts padded to one T; called eagerly it compiles every time.

    Args:
      step: ``step(cache, tokens [B, C, ...], lengths [B]) -> (outputs [B, C, ...], cache)``: the
        model on the next C tokens of each row, of which ``lengths`` are real. Its output may be a
        pytree.
      cache: whatever ``step`` takes and returns: a cache, or a tuple of one per layer.
      tokens: ``[B, T, ...]``, right-padded: token ids, or embeddings.
      lengths: int ``[B]``, real tokens per row; T by default. A row without tokens gives zeros.
      chunk_size: C, tokens of a chunk.

    Returns:
      ``(last, cache)``; last are the outputs ``[B, ...]`` at the last token of each row.

    Raises:
      ValueError: arguments of other shapes; tokens that do not fit into a cache, where that can
        be known. Under ``jit`` ``overflowed`` is set, and the row stays at the last chunk that fit.
      TypeError: ``lengths`` that are no integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn.cache import DenseCache, prefill
      >>> def step(cache, x, lengths):  # a model of one layer, x [B, C, 1, 4]
      ...     return cache.extend(x, x, x, lengths=lengths)
      >>> run = jax.jit(lambda cache, x, n: prefill(step, cache, x, n, chunk_size=4))
      >>> cache = DenseCache.create(2, 16, num_kv_heads=1, head_dim=4, dtype="float32")
      >>> prompts = jnp.ones((2, 10, 1, 4))
      >>> last, cache = run(cache, prompts, jnp.array([10, 7]))
      >>> last.shape, cache.lengths.tolist()
      ((2, 1, 4), [10, 7])
    """
    positive("chunk_size", chunk_size)
    tokens = jnp.asarray(tokens)
    if tokens.ndim < 2 or 0 in tokens.shape:
        raise ValueError(f"tokens takes [B, T, ...] with B, T >= 1, got shape {tokens.shape}")
    batch, length = tokens.shape[:2]
    lengths = counts_of("lengths", length if lengths is None else lengths, batch, at_most=length)
    lengths = jnp.asarray(lengths)
    chunk = min(chunk_size, length)
    count = -(-length // chunk)
    tokens = jnp.pad(tokens, ((0, 0), (0, count * chunk - length), *[(0, 0)] * (tokens.ndim - 2)))

    def run(i, cache):
        here = lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, 1)
        real = jnp.clip(lengths - i * chunk, 0, chunk)
        return real, *step(cache, here, real)

    def body(i, carry):
        last, cache = carry
        # XLA for TPUs would lay out the caches of this loop as their tokens come, and copy all of
        # them on the way in and out.
        real, outputs, cache = run(i, jax.tree.map(_jax_compat.keep_layout, cache))
        cache = jax.tree.map(_jax_compat.keep_layout, cache)
        at = jnp.maximum(real - 1, 0)

        def pick(output, last):
            newest = jax.vmap(lambda x, n: lax.dynamic_index_in_dim(x, n, 0, keepdims=False))(
                output, at
            )
            here = (real > 0).reshape(batch, *(1 for _ in newest.shape[1:]))
            return jnp.where(here, newest, last)

        return jax.tree.map(pick, outputs, last), cache

    shapes = jax.eval_shape(lambda cache: run(0, cache)[1], cache)
    last = jax.tree.map(lambda x: jnp.zeros((batch, *x.shape[2:]), x.dtype), shapes)
    last = vary_over(last, varying_axes(*jax.tree.leaves((cache, tokens, lengths, shapes))))
    needed = jnp.minimum(-(-lengths.max() // chunk), count)
    last, cache = lax.fori_loop(0, needed, body, (last, cache))
    for one in jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, Cache)):
        if isinstance(one, Cache) and is_concrete(one.overflowed) and bool(one.overflowed.any()):
            raise ValueError(
                f"tokens takes prompts that fit into the cache, of {one.capacity} tokens per row; "
                f"rows {np.nonzero(one.overflowed)[0].tolist()} overflowed"
            )
    return last, cache
