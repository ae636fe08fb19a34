"""What the two decode kernels share: the grid, and the producer that walks through all keys.

Every worker is one program that stays for the whole call and walks through its share of the keys
(`stream_k`). A producer warpgroup keeps copies in flight across the borders of sequences. The
result of each split is written with its LSE, and `combine` joins them.

Flash decoding: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from axattn._call import AttentionCall
from axattn.kernels import _block_map
from axattn.kernels._hopper.block_sizes import DecodeBlockSizes, MLABlockSizes
from axattn.kernels._hopper.kv_loader import KVLoader
from axattn.kernels._hopper.primitives import ROWS, div, rem
from axattn.kernels._hopper.scores import QueryRows, ScoreTiles
from axattn.kernels._hopper.split_kv.pack_gqa import PackGQA, gather_packed_operands
from axattn.kernels._hopper.split_kv.stream_k import (
    KVSplit,
    SplitKVPlan,
    StreamK,
    WorkerShare,
    find_row_starts,
    for_each_split,
)
from axattn.kernels._problem import Problem, cdiv


@dataclasses.dataclass(frozen=True)
class SplitKVGrid:
    """Static facts about the kernel."""

    problem: Problem
    kv: KVLoader
    packing: PackGQA
    plan: SplitKVPlan
    block_kv: int
    warpgroups: int  # consumers
    results_per_split: int
    masked: bool  # whether any block can be partial

    @property
    def programs(self) -> int:
        return self.plan.used_workers * self.packing.tiles


def make_split_kv_grid(
    call: AttentionCall,
    sizes: DecodeBlockSizes | MLABlockSizes,
    *,
    results_per_split: int,
    workers: int,
    interpret: bool,
) -> tuple[SplitKVGrid, dict[str, jax.Array]]:
    """Return the grid, and all arrays of the kernel.

    ``workers``: programs that fit the chip at a time.
    """
    operands = gather_packed_operands(call)
    problem = Problem.from_call(call, interpret=interpret)
    packing = PackGQA(call.group, call.q_len)
    blocks = cdiv(call.kv_len, sizes.block_kv)
    split = call.kv_split_size
    if split is not None:
        split = min(cdiv(split, sizes.block_kv), blocks)
    workers = max(1, workers // packing.tiles)
    plan = SplitKVPlan(call.batch, call.num_kv_heads, workers, split, blocks)
    spans = _block_map.span_few_rows(operands.call, operands.bounds, sizes.block_kv)
    total = jnp.broadcast_to(spans[:, 0, 3], (call.batch,))
    arrays = {**operands.arrays, "spans": spans, "row_starts": find_row_starts(total, plan)}
    masked = _block_map.may_have_partial_blocks(operands.call) or call.kv_len % sizes.block_kv > 0
    grid = SplitKVGrid(
        problem,
        KVLoader.from_call(operands.call),
        packing,
        plan,
        sizes.block_kv,
        sizes.warpgroups,
        results_per_split,
        masked,
    )
    return grid, arrays


class SplitKVWarpgroup(NamedTuple):
    """A warpgroup of a worker: the memory that it sees, its share, and which rows it has."""

    grid: SplitKVGrid
    gmem: Mapping[str, Any]
    smem: Mapping[str, Any]
    share: WorkerShare
    tile: jax.Array  # of packed rows
    warpgroup: jax.Array

    @classmethod
    def create(
        cls, grid: SplitKVGrid, gmem: Mapping[str, Any], smem: Mapping[str, Any]
    ) -> SplitKVWarpgroup:
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        # Tiles that read the same keys are neighbors: the second one finds them in L2.
        worker, tile = div(program, grid.packing.tiles), rem(program, grid.packing.tiles)
        share = StreamK(gmem["row_starts"], grid.plan).find_share(worker)
        return cls(grid, gmem, smem, share, tile, warpgroup)

    def for_each_split(self, body: Callable[[KVSplit], None]) -> jax.Array:
        """Call ``body(split)`` for each split; return how many steps they had in all."""

        def load_block_map(batch):
            return _block_map.TileBlocks.load(self.gmem, batch, jnp.int32(0))

        return for_each_split(self.share, self.grid.problem.num_kv_heads, load_block_map, body)

    def locate_rows(self, split: KVSplit) -> QueryRows:
        return QueryRows(split.batch, split.kv_head, jnp.int32(0), self.tile * ROWS)


def produce_splits(wg: SplitKVWarpgroup) -> None:
    """Copy the queries of each split, and keys, tiles of bias and mask, and values block by block.

    Values are not copied where they are in the keys.
    """
    grid, gmem, smem, kv = wg.grid, wg.gmem, wg.smem, wg.grid.kv
    copied = pl.ds(0, grid.packing.copied_rows)

    def copy_split(split: KVSplit):
        rows = pl.ds(wg.tile * ROWS, grid.packing.copied_rows)

        def copy_query():
            head = split.batch * grid.problem.num_kv_heads + split.kv_head
            smem["query"].copy(split.index, gmem["query"].at[head, rows], copied)

        def copy_block(i, _):
            slot = split.block_map.block(split.first + i) * grid.block_kv
            slices = kv.locate(gmem, split.batch, split.kv_head, slot, grid.block_kv)
            n = split.base + i
            kv.copy(smem["key"], n, gmem, "key", slices)
            # Behind the first keys: these need not wait until the last split's queries are free.
            pl.when(i == 0)(copy_query)
            for name in ScoreTiles._fields:
                if smem[name] is not None:
                    keys = pl.ds(slot, grid.block_kv)
                    tile = wg.locate_rows(split).select_scores(gmem[name], rows, keys)
                    smem[name].copy(n, tile, copied)
            if smem["value"] is not None:
                kv.copy(smem["value"], n, gmem, "value", slices)

        lax.fori_loop(0, split.count, copy_block, None)
        pl.when(split.count == 0)(copy_query)

    steps = wg.for_each_split(copy_split)
    smem["query"].drain(wg.share.splits)
    for name in ("key", *ScoreTiles._fields, "value"):
        if smem[name] is not None:
            smem[name].drain(steps)
