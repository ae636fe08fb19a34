"""Attention over parts of the keys, merged by the log-sum-exp of their scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Partial = tuple[jax.Array, jax.Array]  # output [..., h] float32, LSE [...] float32


def merged(one: Partial, other: Partial) -> Partial:
    """Attention over the keys of both. A part without any key has the LSE -inf."""
    (out, lse), (out2, lse2) = one, other
    top = jnp.maximum(lse, lse2)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weight, weight2 = jnp.exp(lse - top), jnp.exp(lse2 - top)
    total = weight + weight2
    safe = jnp.where(total == 0, 1.0, total)
    out = (out * weight[..., None] + out2 * weight2[..., None]) / safe[..., None]
    return out, jnp.where(total == 0, -jnp.inf, jnp.log(safe) + top)


def merged_over(axis, part: Partial) -> Partial:
    """The same over all shards of a mesh axis (or several), inside ``shard_map``."""
    out, lse = part
    top = lax.pmax(lse, axis)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weight = jnp.exp(lse - top)
    # Asked for together, which XLA makes one step on the wire of.
    out, total = lax.psum((out.astype(jnp.float32) * weight[..., None], weight), axis)
    safe = jnp.where(total == 0, 1.0, total)
    return out / safe[..., None], jnp.where(total == 0, -jnp.inf, jnp.log(safe) + top)


def with_sinks(part: Partial, sinks: jax.Array | None) -> Partial:
    """Attention with one more score per head, float32 ``[N]``, that has no value."""
    if sinks is None:
        return part
    out, lse = part
    total = jnp.logaddexp(lse, sinks.astype(jnp.float32)[None, None])
    share = jnp.exp(lse - jnp.where(total == -jnp.inf, 0.0, total))
    return out * share[..., None], total
