"""One tile of scores in registers: what happens between Q K^T and the softmax, on the device.

The order is that of `axattn._implementations.scores`, in units of log2 so that the softmax is exp2:

    scores = log2(e) * (soft_cap(scale * q.k) + bias + alibi), then the mask

A tile is [64 rows, n] with queries along one axis (`q_axis`: 0 in the forward and the query's
gradient, 1 in the keys' gradient) and keys along the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from axattn._dropout import threefry
from axattn._typing import present
from axattn.kernels._hopper.primitives import (
    broadcast_vector,
    load_row_major,
    load_vector,
    make_index_tile,
)
from axattn.kernels._problem import LOG2E, Problem

# Vectors over rows that each head has of its own, [B or 1, heads or 1, T'].
_PER_HEAD = ("row_bias", "row_slopes", "row_shift")


class QueryRows(NamedTuple):
    """The query rows of a tile: rows of one head, or equal slots of several heads after another."""

    batch: jax.Array
    head: jax.Array  # the first one
    slot: jax.Array  # of the first row
    place: jax.Array  # of the first row in the vectors over rows
    heads: int = 1

    def select_scores(self, ref, *part):
        """Return a tile of ``[B or 1, N or 1, T, S]`` (or ``[..., S, T]``) in HBM."""
        return ref.at[_index(ref, 0, self.batch), _index(ref, 1, self.head), *part]


class ScoreTiles(NamedTuple):
    """Tiles of bias and mask in shared memory, as the scores lie."""

    bias: Any = None
    allowed: Any = None

    @classmethod
    def select_dtypes(cls, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Return the dtypes of the bias and the mask over queries and keys that a call has."""
        return {name: arrays[name].dtype for name in cls._fields if name in arrays}

    @classmethod
    def wait(cls, smem: Mapping[str, Any], n: jax.Array, part) -> ScoreTiles:
        """Wait for the tiles of step ``n``, and return their rows ``part``."""
        pipelines = {name: smem[name] for name in cls._fields if smem[name] is not None}
        return cls(**{name: one.wait(n).at[part] for name, one in pipelines.items()})

    @classmethod
    def release(cls, smem: Mapping[str, Any], n: jax.Array, *others: str) -> None:
        """Release the tiles of step ``n``, and ``others`` that threads have read."""
        pipelines = [smem[name] for name in (*cls._fields, *others) if smem[name] is not None]
        if pipelines:
            # Threads have read these, and TMA writes them next.
            plgpu.commit_smem()
        for one in pipelines:
            one.release(n)


@dataclasses.dataclass(frozen=True)
class TileScores:
    """Scores of one tile of rows against any block of keys."""

    problem: Problem
    gmem: Mapping[str, Any]
    rows: QueryRows
    vectors: Mapping[str, jax.Array]
    shape: tuple[int, int]
    q_axis: int

    @classmethod
    def load(cls, problem: Problem, gmem: Mapping[str, Any], rows: QueryRows, shape, q_axis: int):
        """Load all vectors over the rows, for many blocks of keys."""
        return cls.load_for_full_blocks(problem, gmem, rows, shape, q_axis).load_bounds()

    @classmethod
    def load_for_full_blocks(
        cls, problem: Problem, gmem: Mapping[str, Any], rows: QueryRows, shape, q_axis: int
    ):
        """Load the vectors that full blocks need, for kernels short of registers."""
        return cls(problem, gmem, rows, {}, shape, q_axis)._load(*_PER_HEAD, "q_positions")

    def load_bounds(self) -> TileScores:
        """Load the vectors that partial blocks need besides."""
        return self._load("low", "high", "q_segments")

    def _load(self, *names: str) -> TileScores:
        loaded = {name: self._load_rows(name) for name in names if name in self.gmem}
        return dataclasses.replace(self, vectors={**self.vectors, **loaded})

    @property
    def kv_axis(self) -> int:
        return 1 - self.q_axis

    @property
    def is_plain(self) -> bool:
        """Whether scores are a positive multiple of the products: the scale can wait."""
        additive = {"bias", "key_bias", "row_bias", "slopes", "row_slopes"} & set(self.gmem)
        return not additive and self.problem.logits_soft_cap is None and self.problem.scale > 0

    @property
    def reads_keys(self) -> bool:
        """Whether full blocks, too, need to know which keys they have."""
        return bool({"key_bias", "slopes", "row_slopes", "dropout"} & set(self.gmem))

    # ---- the scores ---------------------------------------------------------------------------

    def shift(self, dots: jax.Array) -> jax.Array:
        """Return the products with whole keys, where a cache has subtracted their center."""
        if "row_shift" not in self.gmem:
            return dots
        return dots + self._over_queries(self._load_rows("row_shift"))

    def score(
        self, dots: jax.Array, kv_slot: jax.Array | None, tiles: ScoreTiles
    ) -> tuple[jax.Array, Any]:
        """Return scores before the mask, and tanh(scaled products / cap) where there is a cap.

        ``kv_slot`` is the block's first slot, which is not needed unless `reads_keys`.
        """
        problem, ratio = self.problem, None
        if problem.logits_soft_cap is None:
            scores = dots * (problem.scale * LOG2E)
        else:
            cap = problem.logits_soft_cap
            ratio = _tanh(dots * (problem.scale / cap))
            scores = ratio * (cap * LOG2E)
        for bias in self._biases(kv_slot, tiles):
            scores = scores + bias * LOG2E
        return scores, ratio

    def _biases(self, kv_slot: jax.Array | None, tiles: ScoreTiles):
        if tiles.bias is not None:
            yield load_row_major(tiles.bias).astype(jnp.float32)
        if "key_bias" in self.gmem:
            ref = _vector_of_head(self.gmem["key_bias"], self.rows.batch, self.rows.head)
            yield self._over_keys(ref.at[pl.ds(present(kv_slot), self.shape[self.kv_axis])])
        if "row_bias" in self.gmem:
            yield self._over_queries(self._load_rows("row_bias"))
        if "slopes" in self.gmem or "row_slopes" in self.gmem:
            # Press et al., arXiv 2108.12409, symmetric: -slope * |i - j|.
            positions = self._kv_positions(present(kv_slot))
            distance = self._over_queries(self._load_rows("q_positions")) - positions
            yield jnp.abs(distance).astype(jnp.float32) * -self._slopes()

    def allow(self, kv_slot: jax.Array, tiles: ScoreTiles) -> jax.Array:
        """Return the mask of a partial tile."""
        positions = self._kv_positions(kv_slot)
        allowed = positions < self._over_queries(self._load_rows("high"))
        if "low" in self.gmem:
            allowed &= positions >= self._over_queries(self._load_rows("low"))
        if "q_segments" in self.gmem:
            ids = self._over_keys(self._of_batch("kv_segments", kv_slot))
            allowed &= ids == self._over_queries(self._load_rows("q_segments"))
        if tiles.allowed is not None:
            allowed &= load_row_major(tiles.allowed).astype(jnp.int32) != 0
        return allowed

    # ---- the weights and their gradients, from the LSE ----------------------------------------

    def weigh(self, dots, lse, kv_slot, tiles: ScoreTiles, kept, *, partial: bool) -> TileWeights:
        """Return the softmax's weights; ``lse`` is a vector over the rows, in units of log2."""
        if self.is_plain:
            scores, ratio = dots * (self.problem.scale * LOG2E), None
        else:
            scores, ratio = self.score(dots, kv_slot, tiles)
        weights = jnp.exp2(scores - self._over_queries(lse))
        if partial:
            weights = jnp.where(self.allow(kv_slot, tiles), weights, 0.0)
        return TileWeights(self, weights, ratio, kept)

    # ---- dropout ------------------------------------------------------------------------------

    def keep(self, kv_slot: jax.Array | None) -> jax.Array | None:
        """Return which weights dropout leaves, as `axattn._dropout.keep_tile` does; None: all."""
        if "dropout" not in self.gmem:
            return None
        problem, ref = self.problem, self.gmem["dropout"]
        size = self.shape[self.q_axis] // self.rows.heads
        index = make_index_tile(self.shape, self.q_axis)
        slots = self.rows.slot + (index if self.rows.heads == 1 else index & (size - 1))
        if not problem.broadcast_dropout:
            row = (self.rows.batch + ref[jnp.int32(2)]) * problem.num_heads + self.rows.head
            head = row if self.rows.heads == 1 else row + lax.div(index, jnp.int32(size))
            slots = head * problem.q_len + slots
        columns = present(kv_slot) + make_index_tile(self.shape, self.kv_axis)
        bits = threefry(ref[jnp.int32(0)], ref[jnp.int32(1)], slots, columns)
        # Unsigned bits >= rate * 2^32, as a signed comparison.
        threshold = min(round(problem.dropout_rate * 2**32), 2**32 - 1) - 2**31
        return (bits ^ jnp.int32(-(2**31))) >= jnp.int32(threshold)

    # ---- places -------------------------------------------------------------------------------

    def _slopes(self) -> jax.Array:
        """Of the tile's head a scalar; of its heads or rows a tile."""
        if "row_slopes" in self.gmem:
            return self._over_queries(self._load_rows("row_slopes"))
        rows = self.rows
        slopes = self.gmem["slopes"].at[_index(self.gmem["slopes"], 0, rows.batch)]
        if rows.heads == 1:
            return slopes[rows.head]
        return self._over_queries(make_head_vector(slopes, rows, self.shape[self.q_axis]))

    def _kv_positions(self, kv_slot: jax.Array) -> jax.Array:
        if "kv_positions" in self.gmem:
            return self._over_keys(self._of_batch("kv_positions", kv_slot))
        return kv_slot + make_index_tile(self.shape, self.kv_axis)

    def _load_rows(self, name: str) -> jax.Array:
        """A vector over the rows of this tile."""
        if name in self.vectors:
            return self.vectors[name]
        ref, rows = self.gmem[name], self.rows
        if name in _PER_HEAD:
            ref = _vector_of_head(ref, rows.batch, rows.head)
        else:
            ref = ref.at[_index(ref, 0, rows.batch)]
        slots = pl.ds(rows.place, self.shape[self.q_axis])
        return load_vector(ref.at[slots], self.q_axis)

    def _of_batch(self, name: str, kv_slot: jax.Array):
        ref = self.gmem[name]
        size = self.shape[self.kv_axis]
        return ref.at[_index(ref, 0, self.rows.batch), pl.ds(kv_slot, size)]

    def _over_keys(self, ref) -> jax.Array:
        return broadcast_vector(load_vector(ref, self.kv_axis), self.shape, self.kv_axis)

    def _over_queries(self, vector: jax.Array) -> jax.Array:
        return broadcast_vector(vector, self.shape, self.q_axis)


class TileWeights(NamedTuple):
    """Softmax weights of one tile, and what their gradients need."""

    scores: TileScores
    weights: jax.Array
    ratio: jax.Array | None  # tanh of the capped scores
    kept: jax.Array | None

    def drop(self) -> jax.Array:
        """Return the weights after dropout, which the values were multiplied with."""
        return self._drop(self.weights)

    def differentiate(self, dweights: jax.Array, delta: jax.Array) -> jax.Array:
        """Return gradients of the scaled products, from those of the weights after dropout."""
        dweights = self._drop(dweights)
        dscores = self.weights * (dweights - self.scores._over_queries(delta))
        return dscores if self.ratio is None else dscores * (1.0 - self.ratio * self.ratio)

    def _drop(self, weights: jax.Array) -> jax.Array:
        if self.kept is None:
            return weights
        share = 1.0 / (1.0 - self.scores.problem.dropout_rate)
        return jnp.where(self.kept, weights * share, 0.0)


def make_head_vector(ref, rows: QueryRows, size: int) -> jax.Array:
    """Return a vector over the rows of a tile with several heads, from a number per head."""
    each = size // rows.heads
    shape = (size, 8)
    head = lax.div(make_index_tile(shape, 0), jnp.int32(each))
    values = jnp.zeros(shape, jnp.float32)
    for member in range(rows.heads):
        values = jnp.where(head == member, ref[rows.head + member], values)
    # A tile of equal columns: its maximum along them is the vector.
    return values.max(axis=1)


def _index(ref, axis: int, index: jax.Array) -> jax.Array:
    """Return ``index``, or 0 for an axis that broadcasts."""
    return index if ref.shape[axis] > 1 else jnp.int32(0)


def _vector_of_head(ref, batch: jax.Array, head: jax.Array):
    return ref.at[_index(ref, 0, batch), _index(ref, 1, head)]


def _tanh(x: jax.Array) -> jax.Array:
    # The hardware's approximate tanh has 11 bits; times a cap of 50 that would show in the weights.
    return 1.0 - 2.0 / (jnp.exp2(x * (2.0 * LOG2E)) + 1.0)
