"""Online softmax over blocks of keys, in units of log2: what the forward kernels share.

Milakov and Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from axattn._typing import present
from axattn.kernels._hopper import primitives
from axattn.kernels._hopper.kv_loader import KeyScales
from axattn.kernels._hopper.rows import ROWS
from axattn.kernels._hopper.scores import Scores, Tiles
from axattn.kernels._problem import LOG2E


class State(NamedTuple):
    """Online softmax of a warpgroup's rows."""

    values: jax.Array  # [64, h], weighted and summed
    top: jax.Array  # [64], the largest score
    total: jax.Array  # [64], of the weights

    @classmethod
    def empty(cls, value_head_dim: int) -> State:
        values = primitives.zeros((ROWS, value_head_dim))
        return cls(values, primitives.per_row(-jnp.inf), primitives.per_row(0.0))


class Update(NamedTuple):
    """What a block of keys changes."""

    weights: jax.Array  # [64, block], float32: for its values
    decay: jax.Array  # [64], for the values before it
    top: jax.Array
    total: jax.Array


_NO_TILES, _NO_SCALES = Tiles(), KeyScales()


def update(
    scores: Scores,
    top: jax.Array,
    total: jax.Array,
    dots: jax.Array,
    kv_slot: jax.Array | None,
    tiles: Tiles = _NO_TILES,
    scales: KeyScales = _NO_SCALES,
    *,
    partial: bool,
) -> Update:
    """One block: from the products of queries and keys to the weights of its values.

    ``kv_slot`` is the first slot of the block, which partial blocks need and some scores.
    """
    shape = dots.shape
    if scales.key is not None:
        dots = dots * primitives.spread(scales.key(), shape, 1)
    dots, factor = scores.shifted(dots), 1.0
    if scores.plain:
        factor = scores.problem.scale * LOG2E
    else:
        dots, _ = scores.scores(dots, kv_slot, tiles)
    if partial:
        dots = jnp.where(scores.allowed(present(kv_slot), tiles), dots, -jnp.inf)
    new = jnp.maximum(top, dots.max(axis=1) * factor)
    # While a row has seen nothing, its maximum is -inf and must not shift.
    shift = jnp.where(new == -jnp.inf, 0.0, new)
    weights = jnp.exp2(dots * factor - primitives.spread(shift, shape, 0))
    decay = jnp.exp2(top - shift)
    total = total * decay + weights.sum(axis=1)
    kept = scores.kept(kv_slot)
    if kept is not None:
        weights = jnp.where(kept, weights, 0.0)
    if scales.value is not None:
        weights = weights * primitives.spread(scales.value(), shape, 1)
        if partial:
            # The scale of a slot that holds nothing may be NaN. (Computed again, not kept.)
            allowed = scores.allowed(primitives.unknown(present(kv_slot)), tiles)
            weights = jnp.where(allowed, weights, 0.0)
    return Update(weights, decay, new, total)
