"""Chunked prefill: memory does not grow with the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from axattn import _jax_compat
from axattn._jax_compat import find_varying_axes, vary_over
from axattn._typing import Array, ArrayLike
from axattn.cache._base import Cache
from axattn.cache._checks import check_counts, check_positive, is_concrete

Step = Callable[[Any, Array, Array], tuple[Any, Any]]


def prefill(
    step: Step,
    cache: Any,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    chunk_size: int,
) -> tuple[Any, Any]:
    """Run prompts through a model chunk by chunk, and return its outputs at the last tokens.

    All chunks have one shape and shorter rows are padded, so memory does not depend on the prompt.
    The longest row decides how many chunks run. Call it under ``jax.jit``, where prompts padded to
    one T share a program; an eager call compiles every time.

    Args:
      step: ``step(cache, tokens [B, C, ...], lengths [B]) -> (outputs [B, C, ...], cache)``: the
        model on the next C tokens of each row, of which ``lengths`` are real. The outputs can be a
        pytree.
      cache: whatever ``step`` takes and returns: a cache, or a tuple with one per layer.
      tokens: ``[B, T, ...]``, right-padded: token ids, or embeddings.
      lengths: int ``[B]``, real tokens per row; T by default. A row without tokens gives zeros.
      chunk_size: C, tokens of a chunk.

    Returns:
      ``(last, cache)``; ``last`` are the outputs ``[B, ...]`` at the last token of each row.

    Raises:
      ValueError: wrong shapes; tokens that do not fit into a cache, where this can be known. Under
        ``jit`` ``overflowed`` is set, and the row keeps the chunks that did fit.
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
    check_positive("chunk_size", chunk_size)
    tokens = jnp.asarray(tokens)
    if tokens.ndim < 2 or 0 in tokens.shape:
        raise ValueError(f"tokens takes [B, T, ...] with B, T >= 1, got shape {tokens.shape}")
    batch, length = tokens.shape[:2]
    lengths = check_counts("lengths", length if lengths is None else lengths, batch, at_most=length)
    lengths = jnp.asarray(lengths)
    chunk = min(chunk_size, length)
    count = -(-length // chunk)
    tokens = jnp.pad(tokens, ((0, 0), (0, count * chunk - length), *[(0, 0)] * (tokens.ndim - 2)))

    def run_chunk(i, cache):
        chunk_tokens = lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, 1)
        counts = jnp.clip(lengths - i * chunk, 0, chunk)
        return counts, *step(cache, chunk_tokens, counts)

    def advance(i, carry):
        last, cache = carry
        # XLA for TPUs would choose the layout of the new tokens for the caches of this loop, and
        # copy them before and after it.
        counts, outputs, cache = run_chunk(i, jax.tree.map(_jax_compat.keep_layout, cache))
        cache = jax.tree.map(_jax_compat.keep_layout, cache)
        index = jnp.maximum(counts - 1, 0)

        def pick_newest(output, last):
            newest = jax.vmap(lambda x, n: lax.dynamic_index_in_dim(x, n, 0, keepdims=False))(
                output, index
            )
            has_tokens = (counts > 0).reshape(batch, *(1 for _ in newest.shape[1:]))
            return jnp.where(has_tokens, newest, last)

        return jax.tree.map(pick_newest, outputs, last), cache

    shapes = jax.eval_shape(lambda cache: run_chunk(0, cache)[1], cache)
    last = jax.tree.map(lambda x: jnp.zeros((batch, *x.shape[2:]), x.dtype), shapes)
    last = vary_over(last, find_varying_axes(*jax.tree.leaves((cache, tokens, lengths, shapes))))
    needed = jnp.minimum(-(-lengths.max() // chunk), count)
    last, cache = lax.fori_loop(0, needed, advance, (last, cache))
    for leaf in jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, Cache)):
        if isinstance(leaf, Cache) and is_concrete(leaf.overflowed) and bool(leaf.overflowed.any()):
            raise ValueError(
                f"tokens takes prompts that fit into the cache, of {leaf.capacity} tokens per row; "
                f"rows {np.nonzero(leaf.overflowed)[0].tolist()} overflowed"
            )
    return last, cache
