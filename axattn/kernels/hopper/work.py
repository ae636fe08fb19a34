"""How the forward kernel and the query's gradient are cut into blocks of work."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from axattn.kernels.hopper.device import div, rem
from axattn.kernels.hopper.operands import Operands
from axattn.kernels.hopper.problem import ROWS, Problem, cdiv
from axattn.kernels.hopper.scores import Rows

# Operands that packing does not rearrange.
_NOT_PACKED = ("bias", "key_bias", "row_bias", "allowed")

# Key/value heads of which the blocks at work at one time fit the 50 MB of L2, with room to spare.
_L2_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the call is cut into blocks of work.

    A warpgroup has 64 rows: of one head, or (few query rows) ``slots`` rows of each of ``pack``
    heads that share a key/value head.
    """

    problem: Problem
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
        return cls(problem, block_kv, warpgroups, pack, masked)

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
            rows = slot + warpgroup * ROWS
            own = kv_head * problem.group + unit
            return Item(batch, kv_head, tile, Rows(batch, own, rows, rows), jnp.bool_(True))
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
