"""What `axattn.kernels._scores` needs of one tile of scores, in registers.

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

from axattn._typing import present
from axattn.kernels._hopper.pipeline import Pipeline
from axattn.kernels._hopper.primitives import (
    broadcast_vector,
    declare_row_major,
    load_row_major,
    load_vector,
    make_index_tile,
)
from axattn.kernels._problem import LOG2E, Problem
from axattn.kernels._scores import ScoreComputer

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
        return ref.at[_index_or_zero(ref, 0, self.batch), _index_or_zero(ref, 1, self.head), *part]


class ScoreTiles(NamedTuple):
    """Tiles of bias and mask in shared memory, as the scores lie."""

    bias: Any = None
    allowed: Any = None

    @classmethod
    def select_dtypes(cls, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Return the dtypes of the bias and the mask over queries and keys that a call has."""
        return {name: arrays[name].dtype for name in cls._fields if name in arrays}

    @classmethod
    def declare(
        cls, shape: tuple[int, int, int], dtypes: Mapping[str, Any], *, consumers: int
    ) -> dict[str, Pipeline | None]:
        """Return pipelines for ``[stages, rows, columns]`` of each tile in ``dtypes``, by name."""
        found: dict[str, Pipeline | None] = dict.fromkeys(cls._fields)
        for name, dtype in dtypes.items():
            tile = declare_row_major(shape, dtype)
            found[name] = Pipeline.declare(shape[0], tile, consumers=consumers)
        return found

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
class ScoreOperands:
    """What the scores of one tile of rows need in registers, loaded at once or block by block.

    A `_scores.ScoreBlock`, once `select_block` has said which keys it has.
    """

    problem: Problem
    gmem: Mapping[str, Any]
    rows: QueryRows
    shape: tuple[int, int]
    q_axis: int
    vectors: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    kv_slot: jax.Array | None = None  # the block's first one
    tiles: ScoreTiles = ScoreTiles()

    def load_row_vectors(self) -> ScoreOperands:
        """Load what full blocks need, for many blocks of keys."""
        return self._load(*_PER_HEAD, "q_positions")

    def load_bounds(self) -> ScoreOperands:
        """Load what partial blocks need besides, for many blocks of keys."""
        return self._load("low", "high", "q_segments")

    def _load(self, *names: str) -> ScoreOperands:
        loaded = {name: self._load_row_vector(name) for name in names if name in self.gmem}
        return dataclasses.replace(self, vectors={**self.vectors, **loaded})

    def select_block(self, kv_slot: jax.Array | None, tiles: ScoreTiles) -> ScoreComputer:
        """Return the scores of a block of keys.

        ``kv_slot`` is its first slot, which full blocks need only where `reads_keys`.
        """
        block = dataclasses.replace(self, kv_slot=kv_slot, tiles=tiles)
        return ScoreComputer(self.problem, block, _tanh)

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

    # ---- the protocol `ScoreBlock` ------------------------------------------------------------

    def has(self, name: str) -> bool:
        if name == "slopes":
            return "slopes" in self.gmem or "row_slopes" in self.gmem
        return ("dropout" if name == "dropout_rows" else name) in self.gmem

    def load_rows(self, name: str) -> jax.Array:
        """Return a tile of what each row has, or a number where all rows have the same."""
        if name == "dropout_rows":
            return self._count_dropout_rows()
        if name == "slopes" and "slopes" in self.gmem:
            return self._load_slopes()
        vector = self._load_row_vector("row_slopes" if name == "slopes" else name)
        return broadcast_vector(vector, self.shape, self.q_axis)

    def load_keys(self, name: str) -> jax.Array:
        """Return a tile of what each key has."""
        ref, rows = self.gmem[name], self.rows
        slots = pl.ds(present(self.kv_slot), self.shape[self.kv_axis])
        if name == "key_bias":
            ref = ref.at[_index_or_zero(ref, 0, rows.batch), _index_or_zero(ref, 1, rows.head)].at[
                slots
            ]
        else:
            ref = ref.at[_index_or_zero(ref, 0, rows.batch), slots]
        return broadcast_vector(load_vector(ref, self.kv_axis), self.shape, self.kv_axis)

    def load_tile(self, name: str) -> jax.Array:
        """Load the bias in float32, or the mask in int32."""
        dtype = jnp.float32 if name == "bias" else jnp.int32
        return load_row_major(getattr(self.tiles, name)).astype(dtype)

    def make_slots(self) -> jax.Array:
        return present(self.kv_slot) + make_index_tile(self.shape, self.kv_axis)

    def load_dropout_words(self) -> tuple[jax.Array, jax.Array]:
        ref = self.gmem["dropout"]
        return ref[jnp.int32(0)], ref[jnp.int32(1)]

    def _load_row_vector(self, name: str) -> jax.Array:
        """Return a vector over the rows of this tile."""
        if name in self.vectors:
            return self.vectors[name]
        ref, rows = self.gmem[name], self.rows
        if name in _PER_HEAD:
            ref = ref.at[_index_or_zero(ref, 0, rows.batch), _index_or_zero(ref, 1, rows.head)]
        else:
            ref = ref.at[_index_or_zero(ref, 0, rows.batch)]
        slots = pl.ds(rows.place, self.shape[self.q_axis])
        return load_vector(ref.at[slots], self.q_axis)

    def _load_slopes(self) -> jax.Array:
        """Return the slope of the tile's head, or a tile of its heads' slopes."""
        rows, ref = self.rows, self.gmem["slopes"]
        slopes = ref.at[_index_or_zero(ref, 0, rows.batch)]
        if rows.heads == 1:
            return slopes[rows.head]
        vector = make_head_vector(slopes, rows, self.shape[self.q_axis])
        return broadcast_vector(vector, self.shape, self.q_axis)

    def _count_dropout_rows(self) -> jax.Array:
        """Return each row's number among all that dropout has bits for."""
        problem, rows = self.problem, self.rows
        size = self.shape[self.q_axis] // rows.heads
        index = make_index_tile(self.shape, self.q_axis)
        slots = rows.slot + (index if rows.heads == 1 else index & (size - 1))
        if problem.broadcast_dropout:
            return slots
        first_row = self.gmem["dropout"][jnp.int32(2)]
        head = (rows.batch + first_row) * problem.num_heads + rows.head
        if rows.heads > 1:
            head = head + lax.div(index, jnp.int32(size))
        return head * problem.q_len + slots

    # ---- the weights and their gradients, from the LSE ----------------------------------------

    def weigh(self, scores: ScoreComputer, dots, lse, kept, *, partial: bool) -> TileWeights:
        """Return the softmax's weights; ``lse`` is a vector over the rows, in units of log2."""
        ratio = None
        if self.is_plain:
            found = dots * (self.problem.scale * LOG2E)
        else:
            found, ratio = scores.compute(dots)
        weights = jnp.exp2(found - broadcast_vector(lse, self.shape, self.q_axis))
        if partial:
            weights = jnp.where(scores.compute_mask(), weights, 0.0)
        return TileWeights(scores, weights, ratio, kept, self.q_axis)


class TileWeights(NamedTuple):
    """Softmax weights of one tile, and what their gradients need."""

    scores: ScoreComputer
    weights: jax.Array
    ratio: jax.Array | None  # tanh of the capped scores
    kept: jax.Array | None
    q_axis: int

    def drop(self) -> jax.Array:
        """Return the weights after dropout, which the values were multiplied with."""
        return self.scores.apply_dropout(self.weights, self.kept)

    def differentiate(self, dweights: jax.Array, delta: jax.Array) -> jax.Array:
        """Return gradients of the scaled products, from those of the weights after dropout."""
        dweights = self.scores.apply_dropout(dweights, self.kept)
        delta = broadcast_vector(delta, dweights.shape, self.q_axis)
        dscores = self.weights * (dweights - delta)
        return dscores if self.ratio is None else dscores * (1.0 - self.ratio * self.ratio)


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


def _index_or_zero(ref, axis: int, index: jax.Array) -> jax.Array:
    """Return ``index``, or 0 for an axis that broadcasts."""
    return index if ref.shape[axis] > 1 else jnp.int32(0)


def _tanh(x: jax.Array) -> jax.Array:
    # The hardware's approximate tanh has 11 bits; times a cap of 50 that would show in the weights.
    return 1.0 - 2.0 / (jnp.exp2(x * (2.0 * LOG2E)) + 1.0)
