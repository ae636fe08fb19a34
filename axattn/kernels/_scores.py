"""One tile of scores: what happens between Q K^T and the softmax, on the device.

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

from axattn._dropout import threefry
from axattn.kernels._problem import LOG2E, Problem


class Block(Protocol):
    """What a kernel has loaded for a block of queries and a block of keys of one key/value head."""

    def has(self, name: str) -> bool: ...

    def of_rows(self, name: str) -> jax.Array:
        """A vector over the query rows."""
        ...

    def of_keys(self, name: str) -> jax.Array:
        """A vector over the keys, or (of heads that differ) a tile."""
        ...

    def tile(self, name: str) -> jax.Array: ...

    def slots(self) -> jax.Array:
        """The key slots, int32, as a tile."""
        ...

    def dropout_words(self) -> tuple[jax.Array, jax.Array]: ...


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of one block. ``tanh``: what a soft cap takes, where a device's own is not exact."""

    problem: Problem
    block: Block
    tanh: Callable[[jax.Array], jax.Array] = jnp.tanh

    def shift(self, dots: jax.Array) -> jax.Array:
        """Return products with whole keys, where a cache has subtracted their center."""
        if self.block.has("row_shift"):
            dots = dots + self.block.of_rows("row_shift")
        return dots

    def scores(self, dots: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scores before the mask, and tanh(scaled products / cap) where there is a cap."""
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
            yield block.tile("bias")
        if block.has("key_bias"):
            yield block.of_keys("key_bias")
        if block.has("row_bias"):
            yield block.of_rows("row_bias")
        if block.has("slopes"):
            # Press et al., arXiv 2108.12409, symmetric: -slope * |i - j|.
            distance = block.of_rows("q_positions") - self._kv_positions()
            yield jnp.abs(distance).astype(jnp.float32) * -block.of_rows("slopes")

    def allowed(self) -> jax.Array:
        """The mask of a partial block."""
        block, positions = self.block, self._kv_positions()
        allowed = positions < block.of_rows("high")
        if block.has("low"):
            allowed &= positions >= block.of_rows("low")
        if block.has("q_segments"):
            allowed &= block.of_keys("kv_segments") == block.of_rows("q_segments")
        if block.has("allowed"):
            allowed &= block.tile("allowed") != 0
        return allowed

    def kept(self) -> jax.Array | None:
        """Find the weights that dropout leaves, as `axattn._dropout.keep_tile` does; None: all."""
        if not self.block.has("dropout_rows"):
            return None
        rows, slots = jnp.broadcast_arrays(self.block.of_rows("dropout_rows"), self.block.slots())
        bits = threefry(*self.block.dropout_words(), rows, slots)
        # bits >= rate * 2^32 of unsigned numbers, compared as signed ones.
        threshold = min(round(self.problem.dropout_rate * 2**32), 2**32 - 1) - 2**31
        return (bits ^ jnp.int32(-(2**31))) >= jnp.int32(threshold)

    def thinned(self, weights: jax.Array, kept: jax.Array | None) -> jax.Array:
        """Weights, or their gradients, after dropout."""
        if kept is None:
            return weights
        return jnp.where(kept, weights * (1.0 / (1.0 - self.problem.dropout_rate)), 0.0)

    def _kv_positions(self) -> jax.Array:
        if self.block.has("kv_positions"):
            return self.block.of_keys("kv_positions")
        return self.block.slots()


class State(NamedTuple):
    """Online softmax: running maximum and sum per row, in units of log2."""

    top: jax.Array
    total: jax.Array


class Weights(NamedTuple):
    weights: jax.Array
    decay: jax.Array  # of earlier sums, per row
    state: State


def softmax(scores: jax.Array, state: State, key_axis: int) -> Weights:
    """Weights of one more block (Milakov & Gimelshein, arXiv 1805.02867)."""
    top = jnp.maximum(state.top, scores.max(key_axis, keepdims=True))
    # An empty row's maximum is -inf and must not shift.
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp2(scores - shift)
    decay = jnp.exp2(state.top - shift)
    total = state.total * decay + weights.sum(key_axis, keepdims=True)
    return Weights(weights, decay, State(top, total))


def finished(state: State) -> tuple[jax.Array, jax.Array]:
    """The factor on the summed values, and the LSE (natural log), per row."""
    empty = state.total == 0
    total = jnp.where(empty, 1.0, state.total)
    lse = jnp.where(empty, -jnp.inf, state.top + jnp.log2(total)) * (1.0 / LOG2E)
    return 1.0 / total, lse


def contract(a: jax.Array, b: jax.Array, axes: tuple[int, int], precision: Any) -> jax.Array:
    """A matrix product with float32 sums over axis ``axes[0]`` of a and ``axes[1]`` of b."""
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=precision_of(a, precision),
        preferred_element_type=jnp.float32,
    )


def precision_of(operand: jax.Array, precision: Any) -> Any:
    """Products of 16-bit numbers are exact, and the compiler takes no other word for them."""
    return precision if operand.dtype == jnp.float32 else lax.Precision.DEFAULT
