"""Attention dropout: one random bit string for each (batch, head, query, key).

Each score has its own counter in a counter-based generator, Threefry-2x32-20 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011). So a tile can be drawn alone, in any order,
and again in the backward pass, and all implementations draw the same pattern for the same key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from axattn._call import AttentionCall
from axattn._jax_compat import call_once
from axattn._mask_parts import Span
from axattn._typing import present

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def make_dropout_key(rng: jax.Array) -> jax.Array:
    """Make the uint32 ``[2]`` key of the counters from any JAX key (typed or raw)."""
    # fold_in keeps these bits apart from what the user draws with the same key.
    return jax.random.bits(jax.random.fold_in(rng, 0), (2,), jnp.uint32)


def compute_keep_tile(
    call: AttentionCall, q: Span, kv: Span, *, turn: Callable[[jax.Array], jax.Array] | None = None
) -> jax.Array:
    """Find the scores that survive: bool, broadcastable to ``[B, K, G, q.size, kv.size]``.

    ``turn`` gives the tile another order of its axes, in which it is drawn.
    """
    if call.broadcast_dropout:
        rows = q.slots.astype(jnp.uint32)[None, None, None, :]
    else:
        batch = jnp.arange(call.batch, dtype=jnp.uint32) + jnp.asarray(call.first_row, jnp.uint32)
        heads = jnp.arange(call.num_heads, dtype=jnp.uint32)
        heads = heads + jnp.asarray(call.first_head, jnp.uint32)
        rows = batch[:, None] * jnp.uint32(call.dropout_heads or call.num_heads) + heads[None, :]
        rows = rows.reshape(call.batch, call.num_kv_heads, call.group, 1)
        rows = rows * jnp.uint32(call.q_len) + q.slots.astype(jnp.uint32)[None, None, None]
    rows, columns = rows[..., None], kv.slots.astype(jnp.uint32)[None, None, None, None]
    if turn is not None:
        rows, columns = turn(rows), turn(columns)
    # Keep where bits >= rate * 2^32: the drop probability is exact to 2^-32.
    threshold = min(round(call.dropout_rate * 2**32), 2**32 - 1)
    draw = functools.partial(_draw_kept, threshold=threshold)
    return call_once(draw, present(call.dropout_key), rows, columns)


@functools.partial(jax.jit, static_argnames="threshold")
def _draw_kept(key: jax.Array, rows: jax.Array, columns: jax.Array, *, threshold: int) -> jax.Array:
    return compute_threefry(key[0], key[1], rows, columns) >= jnp.uint32(threshold)


def compute_threefry(key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array) -> jax.Array:
    """Compute the first word at counter (x0, x1), all uint32, or, in kernels, int32.

    JAX's own primitive is not in all kernels, and XLA:CPU runs its rounds as a loop over memory, at
    a seventh of the speed. int32 wraps around as uint32 does.
    """
    keys = (key0, key1, key0 ^ key1 ^ key0.dtype.type(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            high = lax.shift_left(x1, jnp.full_like(x1, rotation))
            low = lax.shift_right_logical(x1, jnp.full_like(x1, 32 - rotation))
            x1 = (high | low) ^ x0
        x0 = x0 + keys[(block + 1) % 3]
        x1 = x1 + (keys[(block + 2) % 3] + (block + 1))
    return x0
