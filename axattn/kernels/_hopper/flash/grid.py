"""How the forward kernel and the query's gradient are cut into blocks of work, and run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from axattn.kernels._block_map import Visits
from axattn.kernels._hopper import primitives
from axattn.kernels._hopper.kv_loader import Source
from axattn.kernels._hopper.operands import Operands
from axattn.kernels._hopper.primitives import div, rem
from axattn.kernels._hopper.rows import ROWS
from axattn.kernels._hopper.scores import Rows, Tiles, score_tile
from axattn.kernels._problem import Problem, cdiv

# Operands that packing does not rearrange.
_NOT_PACKED = ("bias", "key_bias", "row_bias", "row_shift", "allowed")

# Key/value heads of which the blocks at work at one time fit the 50 MB of L2, with room to spare.
_L2_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the call is cut into blocks of work.

    A warpgroup has 64 rows: of one head, or (few query rows) ``slots`` rows of each of ``pack``
    heads that share a key/value head.
    """

    problem: Problem
    source: Source
    block_kv: int
    warpgroups: int
    pack: int
    masked: bool  # whether any block can be partial

    @classmethod
    def of(
        cls, problem: Problem, operands: Operands, block_kv: int, warpgroups: int, *, packing: bool
    ) -> Cut:
        pack = 1
        if packing and not any(name in operands for name in _NOT_PACKED):
            # Powers of two that divide the group, in tiles of at least 8 rows per head.
            while problem.group % (2 * pack) == 0 and 2 * pack * max(problem.q_len, 8) <= ROWS:
                pack *= 2
        masked = bool(operands.call.mask.parts) or problem.kv_len % block_kv > 0
        masked = masked or operands.call.kv_positions is not None
        source = Source.of(operands.call)
        return cls(problem, source, block_kv, warpgroups, pack, masked)

    @property
    def meets(self) -> bool:
        """Whether the warpgroups prepare blocks of a cache together, in shared memory."""
        return self.source.kind != "arrays" and (self.source.scaled or self.source.dirty)

    @property
    def slots(self) -> int:
        """Query slots of one head in a warpgroup's rows."""
        return ROWS // self.pack

    @property
    def q_block(self) -> int:
        """Query slots of a block of work."""
        return self.slots if self.pack > 1 else ROWS * self.warpgroups

    @property
    def num_q(self) -> int:
        return cdiv(self.problem.q_len, self.q_block)

    @property
    def units(self) -> int:
        """Blocks of work per key/value head and query block."""
        if self.pack == 1:
            return self.problem.group
        return cdiv(self.problem.group // self.pack, self.warpgroups)

    @property
    def work(self) -> int:
        return self.problem.batch * self.problem.num_kv_heads * self.num_q * self.units

    @property
    def together(self) -> int:
        """Key/value heads (of all batch rows) that are worked on at the same time."""
        problem = self.problem
        heads = problem.batch * problem.num_kv_heads
        each = 2 * problem.kv_len * (problem.head_dim + problem.value_head_dim)
        most = max(1, _L2_BYTES // each)
        return next(n for n in range(min(heads, most), 0, -1) if heads % n == 0)

    def item(self, index: jax.Array, warpgroup: jax.Array) -> Item:
        """Block of work ``index``: the heads that share keys side by side, last rows first.

        The last rows have the most keys under causal masks; the longest work starts first.
        """
        problem = self.problem
        unit, index = rem(index, self.units), div(index, self.units)
        head, index = rem(index, self.together), div(index, self.together)
        tile, chunk = self.num_q - 1 - rem(index, self.num_q), div(index, self.num_q)
        head = chunk * self.together + head
        batch, kv_head = div(head, problem.num_kv_heads), rem(head, problem.num_kv_heads)
        slot = tile * self.q_block
        if self.pack == 1:
            first = slot + warpgroup * ROWS
            own = kv_head * problem.group + unit
            return Item(batch, kv_head, tile, Rows(batch, own, first, first), jnp.bool_(True))
        member = unit * self.warpgroups + warpgroup
        last = problem.group // self.pack - 1
        own = kv_head * problem.group + jnp.minimum(member, last) * self.pack
        rows = Rows(batch, own, slot, tile * ROWS, self.pack)
        return Item(batch, kv_head, tile, rows, member <= last)

    def packed(self, vector: jax.Array) -> jax.Array:
        """A vector over rows ``[B or 1, T']`` in the order of the tiles' rows."""
        if self.pack == 1:
            return vector
        length = self.num_q * self.slots
        vector = vector[:, :length].reshape(-1, self.num_q, 1, self.slots)
        vector = jnp.broadcast_to(vector, (*vector.shape[:2], self.pack, self.slots))
        return vector.reshape(-1, self.num_q * ROWS)


class Item(NamedTuple):
    """One warpgroup's share of a block of work."""

    batch: jax.Array
    kv_head: jax.Array
    tile: jax.Array
    rows: Rows
    real: jax.Array  # False for a warpgroup without rows of its own


class Work(NamedTuple):
    """What a warpgroup needs for its share of a block of work."""

    cut: Cut
    gmem: Mapping[str, Any]
    smem: Mapping[str, Any]
    item: Item
    plan: Visits
    warpgroup: jax.Array

    def own(self, name: str) -> Any:
        """This warpgroup's part of a buffer ``[warpgroups, 64, ...]``."""
        return self.smem[name].at[self.warpgroup]

    def meet(self) -> None:
        """Waits until all warpgroups that compute are here."""
        primitives.meet(self.smem["together"])

    def rows_of(self, name: str, member: int = 0) -> Any:
        """Rows of one of the tile's heads in HBM ``[B, T, N, size]``."""
        rows = self.item.rows
        return self.gmem[name].at[rows.batch, pl.ds(rows.slot, self.cut.slots), rows.head + member]

    def vector_of(self, name: str, member: int = 0) -> Any:
        """The same rows of float32 ``[B, N, T']``."""
        rows = self.item.rows
        return self.gmem[name].at[rows.batch, rows.head + member, pl.ds(rows.slot, self.cut.slots)]


def run(cut: Cut, gmem: Mapping[str, Any], smem: Mapping[str, Any], compute: Callable) -> None:
    """The body of a kernel: ``compute(work)`` in its warpgroups, and a producer of their keys."""
    warpgroup = lax.axis_index("warpgroup")
    item = cut.item(lax.axis_index("work"), warpgroup)
    work = Work(cut, gmem, smem, item, Visits.load(gmem, item.batch, item.tile), warpgroup)

    searching = cut.source.kind == "pages"

    @pl.when(warpgroup < cut.warpgroups)
    def _():
        primitives.claim_registers(cut.warpgroups, searching=searching)
        compute(work)

    @pl.when(warpgroup == cut.warpgroups)
    def _():
        primitives.claim_registers(cut.warpgroups, producer=True, searching=searching)
        _produce(work)


def _produce(work: Work) -> None:
    cut, gmem, item, smem = work.cut, work.gmem, work.item, work.smem
    tiles = [name for name in Tiles._fields if smem[name] is not None]

    def step(n, _):
        slot = work.plan.block(n) * cut.block_kv
        keys = pl.ds(slot, cut.block_kv)
        # Only unpacked calls have tiles over [T, S]: all rows are of one head.
        queries = pl.ds(item.tile * cut.q_block, cut.q_block)
        places = cut.source.places(gmem, item.batch, item.kv_head, slot, cut.block_kv)
        cut.source.fill(smem["key"], n, gmem, "key", places)
        for name in tiles:
            smem[name].copy(n, score_tile(gmem[name], item.rows, queries, keys))
        cut.source.fill(smem["value"], n, gmem, "value", places)

    lax.fori_loop(0, work.plan.total, step, None)
    for name in ("key", *tiles, "value"):
        smem[name].drain(work.plan.total)
