"""How a call over a cache is cut into steps of the grid, and what a kernel looks up as scalars.

A step has a tile of queries of one row of the batch, all heads of it, and loops over the blocks of
keys that the tile visits: the work ends with the length of the row, not with the cache. Where there
are fewer rows than cores, a row's blocks are parted among steps, whose results are joined later.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn._call import AttentionCall
from axattn._stored import NEVER
from axattn._typing import present
from axattn.kernels import _block_map, _masks
from axattn.kernels._problem import Problem, cdiv, round_up
from axattn.kernels._tpu.layout import LANES


class Scalars(NamedTuple):
    """One-dimensional, since scalar memory pads the last axis."""

    spans: jax.Array  # int32 [steps, 4]: first block, full ones from here, to here, blocks
    # int32 [steps + cores]: the step with work after each; the first one of each core.
    following: jax.Array
    ends: jax.Array  # int32 [B]: slots up to the last one in use
    table: jax.Array  # int32 [B, pages], or one number
    first_row: jax.Array  # int32 [1]: of the cache's arrays


@dataclasses.dataclass(frozen=True)
class Cut:
    """Static facts; hashable."""

    problem: Problem
    stored: str  # dtype of the numbers in the cache
    paged: bool
    page: int  # slots of a row of the arrays
    block_q: int
    block_kv: int
    piece: int  # slots of one copy
    together: int  # key/value heads of one matrix product
    turned: frozenset[str]  # of "keys" and "values", those that lie [K, size, slots] in HBM
    cores: int
    parts: int  # into which the blocks of a row are parted

    @property
    def kv_heads(self) -> int:
        return self.problem.num_kv_heads

    @property
    def rows(self) -> int:
        """Rows of a tile: g * block_q + t is token t of a group's head g; then padding."""
        return padded_rows(self.problem, self.block_q)

    @property
    def row_lanes(self) -> int:
        return round_up(self.rows, LANES)

    @property
    def tiles(self) -> int:
        return cdiv(self.problem.q_len, self.block_q)

    @property
    def num_kv(self) -> int:
        return cdiv(self.problem.kv_len, self.block_kv)

    @property
    def pieces(self) -> int:
        """Copies of one block."""
        return self.block_kv // self.piece

    @property
    def pages(self) -> int:
        """Of one row of the batch."""
        return self.problem.kv_len // self.page

    @property
    def results(self) -> int:
        """Rows of the batch, each as often as it has parts."""
        return self.problem.batch * self.parts

    @property
    def per_core(self) -> int:
        return cdiv(self.results, self.cores)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.cores, self.per_core, self.tiles

    def place(self, core, i, tile) -> tuple[Any, Any]:
        """(result, tile) of a step of the grid; a step too many has the last ones again."""
        result = core * self.per_core + i
        surplus = result >= self.results
        last = jnp.int32(self.results - 1), jnp.int32(self.tiles - 1)
        return jnp.where(surplus, last[0], result), jnp.where(surplus, last[1], tile)


def slots_are_lanes(size: int) -> bool:
    """Whether a TPU lays out ``[..., slots, size]`` with the slots last, as XLA does to save space.

    For a head size of 64, say, of which rows of 128 lanes would be half empty; where the slots are
    a multiple of 128 and the size of 8. Asked for the other order, XLA would copy the cache.
    """
    return size % LANES != 0


def padded_rows(problem: Problem, block_q: int) -> int:
    """Whole tiles of sublanes."""
    sublanes = 8 if problem.dtype == "float32" else 16
    return round_up(problem.group * block_q, sublanes)


def scalars(call: AttentionCall, cut: Cut, limits: _masks.Bounds) -> Scalars:
    """``call`` without key masks (`masks.fold_key_masks`), and the bounds of its rows."""
    if cut.tiles == 1:
        spans = _block_map.of_few_rows(call, limits, cut.block_kv)
    else:
        plan = _block_map.of_queries(call, cut.block_q, cut.block_kv, longest_list=0)
        spans = plan.spans
    batch = cut.problem.batch
    spans = jnp.broadcast_to(spans, (batch, cut.tiles, 4))
    if call.kv_positions is None:
        ends = jnp.clip(limits[1].max(1), 0, call.kv_len)
    else:
        slots = jnp.arange(1, call.kv_len + 1, dtype=jnp.int32)[None]
        ends = jnp.where(call.kv_positions < NEVER, slots, 0).max(1)
    spans = _parted(spans, cut.parts)
    stored, table = present(call.stored), jnp.zeros(1, jnp.int32)
    if cut.paged:
        # Entries that no slot in use needs may be garbage, and their pages may be copied.
        pages = stored.arrays.keys.shape[0]
        table = present(stored.block_table).astype(jnp.int32)
        table = jnp.clip(table, 0, pages - 1).reshape(-1)
    return Scalars(
        spans.reshape(-1),
        _following(spans[..., 3].reshape(-1), cut),
        jnp.broadcast_to(ends, (batch,)).astype(jnp.int32),
        table,
        jnp.asarray(stored.first_row, jnp.int32).reshape(1),
    )


def _parted(spans: jax.Array, parts: int) -> jax.Array:
    """Spans ``[B, tiles, 4]`` of a `visits.Plan` as those of Scalars, ``[B * parts, tiles, 4]``."""
    first, before, full, total = (spans[:, None, :, i] for i in range(4))
    part = jnp.arange(parts, dtype=jnp.int32)[None, :, None]
    start, stop = total * part // parts, total * (part + 1) // parts
    count = stop - start
    full_from = jnp.clip(before - start, 0, count)
    full_to = jnp.clip(before + full - start, 0, count)
    parted = jnp.stack(jnp.broadcast_arrays(first + start, full_from, full_to, count), -1)
    return parted.reshape(-1, *spans.shape[1:])


def _following(totals: jax.Array, cut: Cut) -> jax.Array:
    """For each step, and then for each core, the next step of the same core with work, or -1."""
    steps = totals.size
    index = jnp.arange(steps, dtype=jnp.int32)
    here_or_later = lax.cummin(jnp.where(totals > 0, index, steps), reverse=True)
    here_or_later = jnp.append(here_or_later, steps)
    per_core = cut.per_core * cut.tiles
    firsts = jnp.arange(cut.cores, dtype=jnp.int32) * per_core
    asked = jnp.concatenate([index + 1, firsts])
    behind = jnp.concatenate([(index // per_core + 1) * per_core, firsts + per_core])
    found = here_or_later[jnp.minimum(asked, steps)]
    return jnp.where((found < behind) & (found < steps), found, -1).astype(jnp.int32)
