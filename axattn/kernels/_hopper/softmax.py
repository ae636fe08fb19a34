"""Online softmax over blocks of keys, in units of log2: what the forward kernels share.

Milakov and Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from axattn._typing import present
from axattn.kernels._hopper.kv_loader import ScaleLoaders
from axattn.kernels._hopper.primitives import (
    ROWS,
    broadcast_vector,
    fill_vector,
    make_opaque,
    make_zeros,
)
from axattn.kernels._hopper.scores import ScoreOperands, ScoreTiles
from axattn.kernels._problem import LOG2E


class OnlineSoftmax(NamedTuple):
    """The state of a warpgroup's rows between two blocks of keys."""

    values: jax.Array  # [64, h], weighted and summed
    top: jax.Array  # [64], the largest score
    total: jax.Array  # [64], the sum of the weights

    @classmethod
    def create(cls, value_head_dim: int) -> OnlineSoftmax:
        """Return the state before the first block."""
        return cls(make_zeros((ROWS, value_head_dim)), fill_vector(-jnp.inf), fill_vector(0.0))


class SoftmaxStep(NamedTuple):
    """What one block of keys changes."""

    weights: jax.Array  # [64, block], float32
    decay: jax.Array  # [64], the factor on all values before
    top: jax.Array
    total: jax.Array


def update_softmax(
    operands: ScoreOperands,
    state: OnlineSoftmax,
    dots: jax.Array,
    kv_slot: jax.Array | None,
    tiles: ScoreTiles,
    scales: ScaleLoaders,
    *,
    partial: bool,
) -> SoftmaxStep:
    """Return the weights of a block's values, from the products of queries and keys.

    ``kv_slot`` is the first slot of the block, which partial blocks need and some scores.
    """
    shape, scores = dots.shape, operands.select_block(kv_slot, tiles)
    if scales.key is not None:
        dots = dots * broadcast_vector(scales.key(), shape, 1)
    if operands.is_plain:
        dots, factor = scores.shift(dots), operands.problem.scale * LOG2E
    else:
        (dots, _), factor = scores.compute(dots), 1.0
    if partial:
        dots = jnp.where(scores.compute_mask(), dots, -jnp.inf)
    top = jnp.maximum(state.top, dots.max(axis=1) * factor)
    # The maximum of a row without keys is -inf, and must not shift.
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp2(dots * factor - broadcast_vector(shift, shape, 0))
    decay = jnp.exp2(state.top - shift)
    total = state.total * decay + weights.sum(axis=1)
    kept = scores.compute_kept()
    if kept is not None:
        weights = jnp.where(kept, weights, 0.0)
    if scales.value is not None:
        weights = weights * broadcast_vector(scales.value(), shape, 1)
        if partial:
            # The scale of an unused slot may be NaN. The mask is computed again: keeping it would
            # take registers.
            scores = operands.select_block(make_opaque(present(kv_slot)), tiles)
            weights = jnp.where(scores.compute_mask(), weights, 0.0)
    return SoftmaxStep(weights, decay, top, total)
