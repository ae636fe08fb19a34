"""The grid of the forward and the query's gradient kernel: which rows each warpgroup has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from axattn.kernels._block_map import TileBlocks, may_have_partial_blocks
from axattn.kernels._hopper.kv_loader import KVLoader
from axattn.kernels._hopper.operands import HopperOperands
from axattn.kernels._hopper.primitives import ROWS, div, rem
from axattn.kernels._hopper.scores import QueryRows
from axattn.kernels._problem import Problem, cdiv

# Operands whose rows are not rearranged where several heads are packed into a warpgroup's rows.
_NOT_PACKED = ("bias", "key_bias", "row_bias", "row_shift", "allowed")

# Keys and values that programs read at the same time fit the 50 MB of L2, with room to spare.
_L2_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class FlashGrid:
    """How the query rows of a call are divided among programs.

    A warpgroup has 64 rows: of one head, or (few query rows) ``slots`` rows of each of ``pack``
    heads that share a key/value head.
    """

    problem: Problem
    kv: KVLoader
    block_kv: int
    warpgroups: int
    pack: int
    masked: bool  # whether any block can be partial

    @classmethod
    def create(
        cls,
        problem: Problem,
        operands: HopperOperands,
        block_kv: int,
        warpgroups: int,
        *,
        packing: bool,
    ) -> FlashGrid:
        pack = 1
        if packing and not any(name in operands for name in _NOT_PACKED):
            # Powers of two that divide the group, in tiles of at least 8 rows per head.
            while problem.group % (2 * pack) == 0 and 2 * pack * max(problem.q_len, 8) <= ROWS:
                pack *= 2
        masked = may_have_partial_blocks(operands.call) or problem.kv_len % block_kv > 0
        kv = KVLoader.from_call(operands.call)
        return cls(problem, kv, block_kv, warpgroups, pack, masked)

    @property
    def slots(self) -> int:
        """Query slots of one head in a warpgroup's rows."""
        return ROWS // self.pack

    @property
    def block_q(self) -> int:
        """Query slots of a program."""
        return self.slots if self.pack > 1 else ROWS * self.warpgroups

    @property
    def num_q(self) -> int:
        """Query blocks of a head."""
        return cdiv(self.problem.q_len, self.block_q)

    @property
    def programs_per_block(self) -> int:
        """Programs per key/value head and query block."""
        if self.pack == 1:
            return self.problem.group
        return cdiv(self.problem.group // self.pack, self.warpgroups)

    @property
    def programs(self) -> int:
        problem = self.problem
        return problem.batch * problem.num_kv_heads * self.num_q * self.programs_per_block

    @property
    def concurrent_kv_heads(self) -> int:
        """Key/value heads (of all batch rows) that programs read at the same time."""
        problem = self.problem
        heads = problem.batch * problem.num_kv_heads
        each = 2 * problem.kv_len * (problem.head_dim + problem.value_head_dim)
        most = max(1, _L2_BYTES // each)
        return next(n for n in range(min(heads, most), 0, -1) if heads % n == 0)

    def locate(self, program: jax.Array, warpgroup: jax.Array) -> WorkTile:
        """Return the rows of a warpgroup. Programs that share keys are neighbors.

        The last query block is first: under causal masks it has the most keys, and the longest
        work should not start last.
        """
        problem = self.problem
        unit, index = rem(program, self.programs_per_block), div(program, self.programs_per_block)
        head, index = rem(index, self.concurrent_kv_heads), div(index, self.concurrent_kv_heads)
        block, chunk = self.num_q - 1 - rem(index, self.num_q), div(index, self.num_q)
        head = chunk * self.concurrent_kv_heads + head
        batch, kv_head = div(head, problem.num_kv_heads), rem(head, problem.num_kv_heads)
        slot = block * self.block_q
        if self.pack == 1:
            first = slot + warpgroup * ROWS
            rows = QueryRows(batch, kv_head * problem.group + unit, first, first)
            return WorkTile(batch, kv_head, block, rows, jnp.bool_(True))
        member = unit * self.warpgroups + warpgroup
        last = problem.group // self.pack - 1
        first_head = kv_head * problem.group + jnp.minimum(member, last) * self.pack
        rows = QueryRows(batch, first_head, slot, block * ROWS, self.pack)
        return WorkTile(batch, kv_head, block, rows, member <= last)

    def select_head_rows(self, member: int):
        """Return the slice of a warpgroup's rows that belongs to one of its heads."""
        return pl.ds(member * self.slots, self.slots)

    def pack_vector(self, vector: jax.Array) -> jax.Array:
        """Return a vector over rows ``[B or 1, T']`` in the order of the warpgroups' rows."""
        if self.pack == 1:
            return vector
        length = self.num_q * self.slots
        vector = vector[:, :length].reshape(-1, self.num_q, 1, self.slots)
        vector = jnp.broadcast_to(vector, (*vector.shape[:2], self.pack, self.slots))
        return vector.reshape(-1, self.num_q * ROWS)


class WorkTile(NamedTuple):
    """The query rows of one warpgroup, and the key/value head that they read."""

    batch: jax.Array
    kv_head: jax.Array
    block: jax.Array  # query block
    rows: QueryRows
    has_rows: jax.Array  # False where there are more warpgroups than heads


class FlashWarpgroup(NamedTuple):
    """A warpgroup of a program: the memory that it sees, its rows, and their blocks of keys."""

    grid: FlashGrid
    gmem: Mapping[str, Any]
    smem: Mapping[str, Any]
    tile: WorkTile
    block_map: TileBlocks
    warpgroup: jax.Array

    @classmethod
    def create(
        cls, grid: FlashGrid, gmem: Mapping[str, Any], smem: Mapping[str, Any]
    ) -> FlashWarpgroup:
        warpgroup = lax.axis_index("warpgroup")
        tile = grid.locate(lax.axis_index("program"), warpgroup)
        return cls(grid, gmem, smem, tile, TileBlocks.load(gmem, tile.batch, tile.block), warpgroup)

    def select_buffer(self, name: str) -> Any:
        """Return this warpgroup's part of shared memory ``[warpgroups, ...]``."""
        return self.smem[name].at[self.warpgroup]

    def select_rows(self, name: str, member: int = 0) -> Any:
        """Return the rows of one of the tile's heads in HBM ``[B, T, N, size]``."""
        rows = self.tile.rows
        slots = pl.ds(rows.slot, self.grid.slots)
        return self.gmem[name].at[rows.batch, slots, rows.head + member]

    def select_vector(self, name: str, member: int = 0) -> Any:
        """Return the same rows of float32 ``[B, N, T']``."""
        rows = self.tile.rows
        slots = pl.ds(rows.slot, self.grid.slots)
        return self.gmem[name].at[rows.batch, rows.head + member, slots]
