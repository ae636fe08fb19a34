"""What a grid kernel has in VMEM for one key/value head of a step.

Scores lie with keys along the first axis and rows along the second, ``[keys, rows]``: then a row's
maximum and sum are taken down the sublanes, element by element, and vectors over rows (bounds, LSE,
the softmax's state) are lanes. Row g * block_q + t is token t of the group's head g.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from axattn.kernels._tpu.flash.grid import Cut, Place, Scalars
from axattn.kernels._tpu.layout import column


@dataclasses.dataclass(frozen=True)
class Tile:
    """A `scores.Block`: refs of a step by name, and the head of the step."""

    cut: Cut
    refs: Mapping[str, Any]
    place: Place
    head: jax.Array | int
    words: Any  # of dropout, in scalar memory

    def has(self, name: str) -> bool:
        return name in self.refs

    def of_rows(self, name: str) -> jax.Array:
        """``[1, rows]``."""
        ref = self.refs[name]
        return ref[0, self.head if ref.shape[1] > 1 else 0, 0]

    def of_keys(self, name: str) -> jax.Array:
        """``[keys, 1]``, or ``[keys, rows]`` where query heads have their own."""
        ref, cut = self.refs[name], self.cut
        if ref.shape[1] == 1:
            return column(ref[0, 0, 0])
        first = self.head * cut.problem.group
        each = (column(ref[0, first + g, 0]) for g in range(cut.problem.group))
        shape = (cut.block_kv, cut.block_q)
        return jnp.concatenate([jnp.broadcast_to(vector, shape) for vector in each], axis=1)

    def tile(self, name: str) -> jax.Array:
        """``[keys, rows]``."""
        ref, group = self.refs[name], self.cut.problem.group
        kind = jnp.float32 if jnp.issubdtype(ref.dtype, jnp.floating) else jnp.int32

        def of_head(n):
            return ref[0, n].astype(kind).T

        if ref.shape[1] == 1:
            return jnp.concatenate([of_head(0)] * group, axis=1)
        first = self.head * group
        return jnp.concatenate([of_head(first + g) for g in range(group)], axis=1)

    def slots(self) -> jax.Array:
        shape = (self.cut.block_kv, self.cut.rows)
        return self.place.kv * self.cut.block_kv + lax.broadcasted_iota(jnp.int32, shape, 0)

    def dropout_words(self) -> tuple[jax.Array, jax.Array]:
        return self.words[0], self.words[1]


# A block of queries is ``[block_q, heads, size]``, or ``[heads, block_q, size]`` where heads are
# first in HBM.


def packed(cut: Cut, block: jax.Array) -> jax.Array:
    """A block of queries as rows, ``[kv_heads, rows, size]``."""
    by_head = block if cut.heads_first else jnp.swapaxes(block, 0, 1)
    return by_head.reshape(cut.kv_heads, cut.rows, block.shape[-1])


def cleaned(cut: Cut, block: jax.Array, q: jax.Array) -> jax.Array:
    """Block ``q`` of queries, zero behind the last query."""
    if cut.problem.q_len % cut.block_q == 0:
        return block
    tokens = lax.broadcasted_iota(jnp.int32, block.shape, 1 if cut.heads_first else 0)
    there = q * cut.block_q + tokens < cut.problem.q_len
    return jnp.where(there, block, jnp.zeros((), block.dtype))


def unpacked(cut: Cut, rows: jax.Array) -> jax.Array:
    """Columns ``[kv_heads, size, rows]`` as a block of queries."""
    size = rows.shape[1]
    by_head = jnp.swapaxes(rows, 1, 2).reshape(cut.heads, cut.block_q, size)
    return by_head if cut.heads_first else jnp.swapaxes(by_head, 0, 1)


def for_each_head(cut: Cut, body) -> None:
    """``body(head)`` for the key/value heads of a step."""
    if cut.kv_heads == 1:
        body(0)
        return

    def step(head, _):
        body(head)
        return _

    lax.fori_loop(0, cut.kv_heads, step, 0)


def here(cut: Cut, scalars: Scalars) -> Place:
    """The blocks of this step of the grid."""
    b, h, tile, n = (pl.program_id(axis) for axis in range(4))
    return cut.place(b, h, tile, n, *scalars)


def when_visited(cut: Cut, scalars: Scalars, step) -> None:
    """Runs ``step(place, partial=...)`` if this step of the grid has work."""
    n, place = pl.program_id(3), here(cut, scalars)
    visit = cut.visit(pl.program_id(0), pl.program_id(2), scalars.spans, scalars.order)
    pl.when(n < visit.full)(lambda: step(place, partial=False))
    pl.when((n >= visit.full) & (n < visit.total))(lambda: step(place, partial=True))
