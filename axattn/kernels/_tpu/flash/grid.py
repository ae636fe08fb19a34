"""How a call is cut into steps of the grid, and which step has which blocks.

A step has a block of queries and a block of keys for some key/value heads at a time: one where HBM
has heads first, and as many as it takes for their query heads to be whole tiles of 8 where it has
them as ``[T, N, H]``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from axattn._call import AttentionCall
from axattn.kernels import _block_map
from axattn.kernels._block_bounds import blocks_per_tile
from axattn.kernels._problem import Problem, cdiv

# Query heads that lie together in HBM where tokens are first.
HEAD_TILE = 8

# Rows of queries for a step: heads join where one has fewer, or steps would be what takes time.
STEP_ROWS = 512

# Lists of blocks live in scalar memory (1 MiB), with the spans. Longer ones are not made.
MAX_LISTED = 2**16


class Scalars(NamedTuple):
    """What a kernel reads as scalars; one-dimensional, since scalar memory pads the last axis."""

    spans: jax.Array  # int32 [B or 1, tiles, 4]: see `visits.Plan`
    order: jax.Array  # int32 [B or 1, tiles, blocks], or one number
    dropout: jax.Array  # int32 [3]: the key's words, and whatever


@dataclasses.dataclass(frozen=True)
class Cut:
    """Static facts; hashable. ``major`` is what the outer loop of a kernel runs over."""

    problem: Problem
    block_q: int
    block_kv: int
    kv_heads: int  # in one step
    major: str  # "q" or "kv"
    steps: int  # of the inner loop
    listed: bool
    rows_vary: bool  # batch rows visit different blocks
    heads_first: bool  # queries and what is like them lie as [B, N, T, size] in HBM

    @property
    def rows(self) -> int:
        """Rows of a tile of queries: row g * block_q + t is token t of a group's head g."""
        return self.problem.group * self.block_q

    @property
    def heads(self) -> int:
        """Query heads in one step."""
        return self.kv_heads * self.problem.group

    @property
    def num_q(self) -> int:
        return cdiv(self.problem.q_len, self.block_q)

    @property
    def num_kv(self) -> int:
        return cdiv(self.problem.kv_len, self.block_kv)

    @property
    def tiles(self) -> int:
        """Of the outer loop."""
        return self.num_q if self.major == "q" else self.num_kv

    @property
    def grid(self) -> tuple[int, int, int, int]:
        problem = self.problem
        return problem.batch, problem.num_kv_heads // self.kv_heads, self.tiles, self.steps

    def place(self, b, h, tile, n, spans, order, _) -> Place:
        """The blocks of a step: a function of grid indices and scalars, for index maps."""
        visit = self.visit(b, tile, spans, order)
        after = jnp.minimum(tile + 1, self.tiles - 1)
        following = self.visit(b, after, spans, order)
        # Steps without work name the next tile's first block, which is so on its way.
        last = jnp.maximum(following.total - 1, 0)
        block = jnp.where(
            n < visit.total,
            visit.block(n),
            following.block(jnp.where(after == tile, last, 0)),
        )
        block = jnp.clip(block, 0, (self.num_kv if self.major == "q" else self.num_q) - 1)
        return Place(b, h, tile, block) if self.major == "q" else Place(b, h, block, tile)

    def visit(self, b, tile, spans, order) -> _block_map.Visits:
        row = (b if self.rows_vary else 0) * self.tiles + tile
        first, before, full, total = (spans[row * 4 + i] for i in range(4))
        if not self.listed:
            return _block_map.Visits(first, before, full, total, None)
        blocks = self.num_kv if self.major == "q" else self.num_q
        return _block_map.Visits(first, before, full, total, _Listed(order, row * blocks))


class _Listed(NamedTuple):
    order: Any
    first: jax.Array

    def __getitem__(self, n):
        return self.order[self.first + n]


class Place(NamedTuple):
    """Block indices of one step."""

    batch: jax.Array
    heads: jax.Array
    q: jax.Array
    kv: jax.Array


def heads_together(call: AttentionCall) -> int:
    """Key/value heads of one step."""
    if call.heads_first:
        most = cdiv(STEP_ROWS, call.group * call.q_len)
        return max(n for n in range(1, most + 1) if call.num_kv_heads % n == 0)
    heads = math.lcm(HEAD_TILE, call.group)
    whole = heads < call.num_heads and call.num_heads % heads == 0
    return heads // call.group if whole else call.num_kv_heads


def of_call(
    call: AttentionCall, problem: Problem, block_q: int, block_kv: int, major: str
) -> tuple[Cut, Scalars]:
    """``call`` without key masks (`masks.fold_key_masks`)."""
    make = _block_map.of_queries if major == "q" else _block_map.of_keys
    plan = make(call, block_q, block_kv, longest_list=MAX_LISTED)
    cut = Cut(
        problem,
        block_q,
        block_kv,
        heads_together(call),
        major,
        max(1, int(blocks_per_tile(call, block_q, block_kv, major).max())),
        plan.order is not None,
        plan.spans.shape[0] > 1,
        call.heads_first,
    )
    order = jnp.zeros(1, jnp.int32) if plan.order is None else plan.order.reshape(-1)
    words = jnp.zeros(2, jnp.int32)
    if call.dropout_key is not None:
        words = jax.lax.bitcast_convert_type(call.dropout_key, jnp.int32)
    return cut, Scalars(plan.spans.reshape(-1), order, words)


def spec(cut: Cut, block: tuple[int, ...], index) -> pl.BlockSpec:
    """A block of an operand; ``index`` is a function of the `Place` of a step."""

    def index_map(*arguments):
        return index(cut.place(*arguments))

    return pl.BlockSpec(block, functools.wraps(index)(index_map))
