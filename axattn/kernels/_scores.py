"""The scores of a tile in a kernel: everything between Q K^T and the softmax, and the softmax.

The order is that of `axattn._implementations.scores`, in units of log2 so that the softmax is exp2:

    scores = log2(e) * (soft_cap(scale * q.k) + bias + alibi), then the mask

A tile has queries along one axis and keys along the other, whichever way: vectors over rows and
over keys come in the shape that broadcasts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from axattn._dropout import compute_threefry
from axattn.kernels._problem import LOG2E, Problem


class ScoreBlock(Protocol):
    """A block of queries and of keys of one key/value head, as a kernel has loaded it."""

    def has(self, name: str) -> bool: ...

    def load_rows(self, name: str) -> jax.Array:
        """Load a vector over the query rows."""
        ...

    def load_keys(self, name: str) -> jax.Array:
        """Load a vector over the keys, or a tile where heads differ."""
        ...

    def load_tile(self, name: str) -> jax.Array: ...

    def make_slots(self) -> jax.Array:
        """Return the key slots, int32, as a tile."""
        ...

    def load_dropout_words(self) -> tuple[jax.Array, jax.Array]: ...


@dataclasses.dataclass(frozen=True)
class ScoreComputer:
    """Computes the scores of one block; ``tanh`` is that of the soft cap."""

    problem: Problem
    block: ScoreBlock
    tanh: Callable[[jax.Array], jax.Array] = jnp.tanh

    def shift(self, dots: jax.Array) -> jax.Array:
        """Return products with whole keys, where a cache has subtracted their center."""
        if self.block.has("row_shift"):
            dots = dots + self.block.load_rows("row_shift")
        return dots

    def compute(self, dots: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Compute scores before the mask, and tanh(scaled products / cap) if there is a cap."""
        problem, ratio = self.problem, None
        dots = self.shift(dots)
        if problem.logits_soft_cap is None:
            scores = dots * (problem.scale * LOG2E)
        else:
            cap = problem.logits_soft_cap
            ratio = self.tanh(dots * (problem.scale / cap))
            scores = ratio * (cap * LOG2E)
        for bias in self._biases():
            scores = scores + bias * LOG2E
        return scores, ratio

    def _biases(self):
        block = self.block
        if block.has("bias"):
            yield block.load_tile("bias")
        if block.has("key_bias"):
            yield block.load_keys("key_bias")
        if block.has("row_bias"):
            yield block.load_rows("row_bias")
        if block.has("slopes"):
            # Press et al., arXiv 2108.12409, symmetric: -slope * |i - j|.
            distance = block.load_rows("q_positions") - self._kv_positions()
            yield jnp.abs(distance).astype(jnp.float32) * -block.load_rows("slopes")

    def compute_mask(self) -> jax.Array:
        """Compute the mask of a partial block."""
        block, positions = self.block, self._kv_positions()
        allowed = positions < block.load_rows("high")
        if block.has("low"):
            allowed &= positions >= block.load_rows("low")
        if block.has("q_segments"):
            allowed &= block.load_keys("kv_segments") == block.load_rows("q_segments")
        if block.has("allowed"):
            allowed &= block.load_tile("allowed") != 0
        return allowed

    def compute_kept(self) -> jax.Array | None:
        """Find the weights that dropout leaves, as `_dropout.compute_keep_tile` does; None: all."""
        if not self.block.has("dropout_rows"):
            return None
        rows, slots = jnp.broadcast_arrays(
            self.block.load_rows("dropout_rows"), self.block.make_slots()
        )
        bits = compute_threefry(*self.block.load_dropout_words(), rows, slots)
        # bits >= rate * 2^32 of unsigned numbers, compared as signed ones.
        threshold = min(round(self.problem.dropout_rate * 2**32), 2**32 - 1) - 2**31
        return (bits ^ jnp.int32(-(2**31))) >= jnp.int32(threshold)

    def apply_dropout(self, weights: jax.Array, kept: jax.Array | None) -> jax.Array:
        """Drop weights, or their gradients, and scale the others."""
        if kept is None:
            return weights
        return jnp.where(kept, weights * (1.0 / (1.0 - self.problem.dropout_rate)), 0.0)

    def _kv_positions(self) -> jax.Array:
        if self.block.has("kv_positions"):
            return self.block.load_keys("kv_positions")
        return self.block.make_slots()


class SoftmaxState(NamedTuple):
    """Online softmax: running maximum and sum per row, in units of log2."""

    top: jax.Array
    total: jax.Array


class SoftmaxWeights(NamedTuple):
    weights: jax.Array
    decay: jax.Array  # of earlier sums, per row
    state: SoftmaxState


def add_softmax_block(scores: jax.Array, state: SoftmaxState, key_axis: int) -> SoftmaxWeights:
    """Add a block to an online softmax (Milakov & Gimelshein, arXiv 1805.02867)."""
    top = jnp.maximum(state.top, scores.max(key_axis, keepdims=True))
    # An empty row's maximum is -inf and must not shift.
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp2(scores - shift)
    decay = jnp.exp2(state.top - shift)
    total = state.total * decay + weights.sum(key_axis, keepdims=True)
    return SoftmaxWeights(weights, decay, SoftmaxState(top, total))


def finish_softmax(state: SoftmaxState) -> tuple[jax.Array, jax.Array]:
    """Return the factor on the summed values, and the LSE (natural log), per row."""
    empty = state.total == 0
    total = jnp.where(empty, 1.0, state.total)
    lse = jnp.where(empty, -jnp.inf, state.top + jnp.log2(total)) * (1.0 / LOG2E)
    return 1.0 / total, lse


def contract(a: jax.Array, b: jax.Array, axes: tuple[int, int], precision: Any) -> jax.Array:
    """Multiply, with float32 sums over axis ``axes[0]`` of a and ``axes[1]`` of b."""
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=choose_precision(a, precision),
        preferred_element_type=jnp.float32,
    )


def choose_precision(operand: jax.Array, precision: Any) -> Any:
    """Return the precision of a product: 16-bit numbers take the default, which is exact."""
    return precision if operand.dtype == jnp.float32 else lax.Precision.DEFAULT
