"""The grid of a flash kernel, and the blocks that each of its steps loads.

A step computes one block of queries and one block of keys, for some key/value heads. It has one
key/value head if heads are first in HBM. If tokens are first, ``[T, N, H]``, it has enough of them
for their query heads to fill whole memory tiles of 8.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn.kernels import _block_map
from axattn.kernels._block_bounds import bound_blocks
from axattn.kernels._problem import Problem, cdiv

# Query heads in one memory tile of HBM if tokens are first.
HEAD_TILE = 8

# Query rows that a step should have at least: with fewer, the overhead of steps would dominate.
STEP_ROWS = 512

# Block lists are kept in scalar memory (1 MiB). Longer ones are not made.
MAX_LISTED = 2**16


@dataclasses.dataclass(frozen=True)
class TpuBlockSizes:
    """Query tokens and keys of a block, and the bytes of VMEM that the kernel may take."""

    block_q: int
    block_kv: int
    vmem_limit: int | None = None


@dataclasses.dataclass(frozen=True)
class TpuBackwardBlockSizes:
    """Block sizes of the gradients: ``key`` is None if one fused kernel computes all of them."""

    query: TpuBlockSizes
    key: TpuBlockSizes | None = None


class GridScalars(NamedTuple):
    """Arrays that are prefetched to scalar memory; flat, as it pads the last axis."""

    spans: jax.Array  # int32 [B or 1, tiles, 4]: see `_block_map.BlockMap`
    order: jax.Array  # int32 [B or 1, tiles, blocks]; [1], unused, without a block list
    dropout: jax.Array  # int32 [2]: the words of the key; unused without dropout


class BlockIndices(NamedTuple):
    """Which blocks a step of the grid has."""

    batch: jax.Array
    heads: jax.Array
    q: jax.Array
    kv: jax.Array


@dataclasses.dataclass(frozen=True)
class TpuFlashTiling:
    """Static sizes of the blocks of one step; hashable."""

    problem: Problem
    block_q: int
    block_kv: int
    kv_heads: int  # key/value heads of one step
    heads_first: bool  # whether queries and their gradients are [B, N, T, size] in HBM

    @property
    def rows(self) -> int:
        """Rows of a tile: row g * block_q + t is token t of the group's head g."""
        return self.problem.group * self.block_q

    @property
    def heads(self) -> int:
        """Query heads of one step."""
        return self.kv_heads * self.problem.group

    @property
    def num_q(self) -> int:
        return cdiv(self.problem.q_len, self.block_q)

    @property
    def num_kv(self) -> int:
        return cdiv(self.problem.kv_len, self.block_kv)


@dataclasses.dataclass(frozen=True)
class TpuFlashGrid(TpuFlashTiling):
    """A grid over batch rows, key/value heads, blocks of ``major`` and blocks of the other side."""

    major: str  # the side of the outer loop, "q" or "kv"; its blocks are the tiles
    num_steps: int  # of the inner loop: the most blocks that any tile needs
    has_block_list: bool
    varies_by_row: bool  # whether batch rows need different blocks

    @property
    def num_tiles(self) -> int:
        return self.num_q if self.major == "q" else self.num_kv

    @property
    def num_inner_blocks(self) -> int:
        return self.num_kv if self.major == "q" else self.num_q

    @property
    def shape(self) -> tuple[int, int, int, int]:
        problem = self.problem
        return problem.batch, problem.num_kv_heads // self.kv_heads, self.num_tiles, self.num_steps

    def locate_blocks(self, b, h, tile, step, scalars: GridScalars) -> BlockIndices:
        """Return the blocks of a step of the grid, in index maps and in kernels.

        Idle steps point at the first block of the next tile, so that it is prefetched.
        """
        current = self.load_blocks(b, tile, scalars)
        next_tile = jnp.minimum(tile + 1, self.num_tiles - 1)
        following = self.load_blocks(b, next_tile, scalars)
        last = jnp.maximum(following.total - 1, 0)
        block = jnp.where(
            step < current.total,
            current.block(step),
            following.block(jnp.where(next_tile == tile, last, 0)),
        )
        block = jnp.clip(block, 0, self.num_inner_blocks - 1)
        if self.major == "q":
            return BlockIndices(b, h, tile, block)
        return BlockIndices(b, h, block, tile)

    def load_blocks(self, b, tile, scalars: GridScalars) -> _block_map.TileBlocks:
        """Read from scalar memory which blocks a tile needs."""
        row = (b if self.varies_by_row else 0) * self.num_tiles + tile
        first, before, full, total = (scalars.spans[row * 4 + i] for i in range(4))
        order = None
        if self.has_block_list:
            order = _BlockOrder(scalars.order, row * self.num_inner_blocks)
        return _block_map.TileBlocks(first, before, full, total, order)


class _BlockOrder(NamedTuple):
    """One tile's part of the block list."""

    order: Any
    start: jax.Array

    def __getitem__(self, n):
        return self.order[self.start + n]


def choose_kv_heads(call: AttentionCall) -> int:
    """Return the number of key/value heads of one step."""
    if call.heads_first:
        most = cdiv(STEP_ROWS, call.group * call.q_len)
        return max(n for n in range(1, most + 1) if call.num_kv_heads % n == 0)
    heads = math.lcm(HEAD_TILE, call.group)
    whole = heads < call.num_heads and call.num_heads % heads == 0
    return heads // call.group if whole else call.num_kv_heads


def plan_grid(
    call: AttentionCall, sizes: TpuBlockSizes, major: str
) -> tuple[TpuFlashGrid, GridScalars]:
    """Return the grid of a call without key masks (`_masks.fold_key_masks`), and its scalars."""
    problem, block_q, block_kv = Problem.from_call(call), sizes.block_q, sizes.block_kv
    make_plan = _block_map.map_key_blocks if major == "q" else _block_map.map_query_blocks
    plan = make_plan(call, block_q, block_kv, longest_list=MAX_LISTED)
    grid = TpuFlashGrid(
        problem,
        block_q,
        block_kv,
        choose_kv_heads(call),
        call.heads_first,
        major,
        max(1, int(bound_blocks(call, block_q, block_kv, major).max())),
        plan.order is not None,
        plan.spans.shape[0] > 1,
    )
    order = jnp.zeros(1, jnp.int32) if plan.order is None else plan.order.reshape(-1)
    words = jnp.zeros(2, jnp.int32)
    if call.dropout_key is not None:
        words = jax.lax.bitcast_convert_type(call.dropout_key, jnp.int32)
    return grid, GridScalars(plan.spans.reshape(-1), order, words)
