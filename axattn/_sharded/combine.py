"""Combine attention over parts of the keys by the log-sum-exp (LSE) of their scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Results = tuple[jax.Array, jax.Array]  # output [..., h], LSE [...] in float32


def combine_pair(one: Results, other: Results) -> Results:
    """Return attention over the keys of both parts. A part without keys has the LSE -inf."""
    (out, lse), (out2, lse2) = one, other
    top = jnp.maximum(lse, lse2)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weight, weight2 = jnp.exp(lse - top), jnp.exp(lse2 - top)
    total = weight + weight2
    safe = jnp.where(total == 0, 1.0, total)
    out = (out * weight[..., None] + out2 * weight2[..., None]) / safe[..., None]
    return out, jnp.where(total == 0, -jnp.inf, jnp.log(safe) + top)


def combine_shards(axis, part: Results) -> Results:
    """Return attention over the keys of all shards of one or more mesh axes. In ``shard_map``."""
    out, lse = part
    top = lax.pmax(lse, axis)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weight = jnp.exp(lse - top)
    # One psum of both: XLA sends them in one all-reduce.
    out, total = lax.psum((out.astype(jnp.float32) * weight[..., None], weight), axis)
    safe = jnp.where(total == 0, 1.0, total)
    return out / safe[..., None], jnp.where(total == 0, -jnp.inf, jnp.log(safe) + top)


def add_sinks(part: Results, sinks: jax.Array | None) -> Results:
    """Add sinks, ``[N]``: one more score per head, without a value."""
    if sinks is None:
        return part
    out, lse = part
    total = jnp.logaddexp(lse, sinks.astype(jnp.float32)[None, None])
    share = jnp.exp(lse - jnp.where(total == -jnp.inf, 0.0, total))
    return out * share[..., None], total
