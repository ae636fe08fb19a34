"""The gradients of keys and values, summed over the group inside the kernel.

A program has a block of keys of one key/value head and reads the query rows of all G heads that
share it, so that HBM never holds a gradient of the size of N heads. Its tiles of scores are
transposed: keys along the rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from axattn._typing import present
from axattn.kernels import _block_map
from axattn.kernels._hopper import cost
from axattn.kernels._hopper.block_sizes import KeyGradBlockSizes
from axattn.kernels._hopper.operands import HopperOperands, transpose_score_tiles
from axattn.kernels._hopper.pipeline import Pipeline
from axattn.kernels._hopper.primitives import (
    ROWS,
    claim_registers,
    declare_row_major,
    declare_swizzled,
    div,
    load_vector,
    make_kernel,
    make_opaque,
    make_zeros,
    multiply,
    multiply_add,
    multiply_add_then_multiply,
    rem,
    round_up_length,
    sync_warpgroups,
    transpose,
)
from axattn.kernels._hopper.scores import QueryRows, ScoreOperands, ScoreTiles
from axattn.kernels._problem import Problem, cdiv


@dataclasses.dataclass(frozen=True)
class KeyGradGrid:
    """How the keys of a call are divided among programs.

    Each warpgroup has 64 keys and both gradients, or (``split``: large heads, whose accumulators
    fill a warpgroup's registers) two share 64 keys and have one gradient each.
    """

    problem: Problem
    sizes: KeyGradBlockSizes
    masked: bool

    @property
    def block_kv(self) -> int:
        """Keys of a program."""
        return ROWS * self.sizes.key_tiles

    @property
    def num_kv(self) -> int:
        """Key blocks of a head."""
        return cdiv(self.problem.kv_len, self.block_kv)

    @property
    def programs(self) -> int:
        return self.problem.batch * self.problem.num_kv_heads * self.num_kv

    def locate(self, program: jax.Array, warpgroup: jax.Array) -> KeyTile:
        """Return the keys of a warpgroup.

        The first keys of a head are first: under causal masks they have the most queries.
        """
        block, head = rem(program, self.num_kv), div(program, self.num_kv)
        heads = self.problem.num_kv_heads
        key_tile = jnp.int32(0) if self.sizes.split else warpgroup
        slot = block * self.block_kv + key_tile * ROWS
        return KeyTile(div(head, heads), rem(head, heads), block, key_tile, slot)


class KeyTile(NamedTuple):
    """The keys of one warpgroup."""

    batch: jax.Array
    kv_head: jax.Array
    block: jax.Array  # key block
    key_tile: jax.Array  # in the block
    slot: jax.Array  # of the first key


def key_grad(
    problem: Problem, operands: HopperOperands, sizes: KeyGradBlockSizes
) -> tuple[jax.Array, jax.Array]:
    """Return dK ``[B, S, K, H]`` and dV ``[B, S, K, h]``; operands as in `query_grad`."""
    operands = transpose_score_tiles(operands)
    call = operands.call
    grid = KeyGradGrid(problem, sizes, _block_map.may_have_partial_blocks(call))
    block_map = _block_map.map_query_blocks(call, sizes.block_q, grid.block_kv)
    arrays = {**operands.arrays, **block_map.as_arrays()}
    shape = (problem.batch, round_up_length(problem.kv_len), problem.num_kv_heads)
    out = tuple(
        jax.ShapeDtypeStruct((*shape, size), jnp.dtype(problem.dtype))
        for size in (problem.head_dim, problem.value_head_dim)
    )
    scratch = declare_key_grad_scratch(
        sizes,
        problem.head_dim,
        problem.value_head_dim,
        dtype=problem.dtype,
        score_dtypes=ScoreTiles.select_dtypes(arrays),
    )
    dkey, dvalue = make_kernel(
        functools.partial(_key_grad_body, grid, tuple(arrays)),
        name="axattn_key_grad",
        out=out,
        scratch=scratch,
        programs=grid.programs,
        warpgroups=sizes.warpgroups + 1,
        cost=cost.estimate_key_grad(
            call, arrays, out, (sizes.block_q, grid.block_kv), split=sizes.split
        ),
        interpret=problem.interpret,
    )(*arrays.values())
    return dkey[:, : problem.kv_len], dvalue[:, : problem.kv_len]


def declare_key_grad_scratch(
    sizes: KeyGradBlockSizes,
    head_dim: int,
    value_head_dim: int,
    *,
    dtype: Any,
    score_dtypes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the shared memory and the barriers of a program.

    ``score_dtypes``: dtypes of a bias and a mask over queries and keys, where there are any.
    """
    rows, stages, groups, key_tiles = sizes.block_q, sizes.stages, sizes.warpgroups, sizes.key_tiles

    def declare_keys(size):
        return declare_swizzled((key_tiles, ROWS, size), dtype, rows)

    def declare_queries(size):
        tile = declare_swizzled((stages, rows, size), dtype, rows)
        vector = declare_row_major((stages, rows), jnp.float32)
        return Pipeline.declare(stages, (tile, vector), copies=2, consumers=groups)

    return {
        "key": declare_keys(head_dim),
        "value": declare_keys(value_head_dim),
        "keys_full": plgpu.Barrier(num_arrivals=2, num_barriers=key_tiles),
        "query": declare_queries(head_dim),
        "dout": declare_queries(value_head_dim),
        **ScoreTiles.declare((stages, ROWS * key_tiles, rows), score_dtypes, consumers=groups),
        "sync": plgpu.Barrier(num_arrivals=2) if sizes.split else None,
    }


class KeyGradWarpgroup(NamedTuple):
    """A warpgroup of a program: the memory that it sees, its keys, and who reads them."""

    grid: KeyGradGrid
    gmem: Mapping[str, Any]
    smem: Mapping[str, Any]
    tile: KeyTile
    block_map: _block_map.TileBlocks

    def select_buffer(self, name: str) -> Any:
        """Return this warpgroup's part of shared memory ``[key_tiles, ...]``."""
        return self.smem[name].at[self.tile.key_tile]

    def select_keys(self, name: str) -> Any:
        """Return this warpgroup's keys of ``[B, S, K, size]`` in HBM."""
        tile = self.tile
        return self.gmem[name].at[tile.batch, pl.ds(tile.slot, ROWS), tile.kv_head]

    def locate_rows(self, member: jax.Array, n: jax.Array) -> QueryRows:
        """Return the query rows of step ``n`` of one of the heads."""
        head = self.tile.kv_head * self.grid.problem.group + member
        slot = self.block_map.block(n) * self.grid.sizes.block_q
        return QueryRows(self.tile.batch, head, slot, slot)


def _key_grad_body(grid: KeyGradGrid, names: tuple[str, ...], *refs, **smem) -> None:
    gmem = dict(zip((*names, "dkey", "dvalue"), refs, strict=True))
    warpgroup, groups = lax.axis_index("warpgroup"), grid.sizes.warpgroups
    tile = grid.locate(lax.axis_index("program"), warpgroup)
    block_map = _block_map.TileBlocks.load(gmem, tile.batch, tile.block)
    wg = KeyGradWarpgroup(grid, gmem, smem, tile, block_map)

    def consume(**gradients):
        claim_registers(groups)
        _consume_key_grad(wg, **gradients)

    if grid.sizes.split:
        pl.when(warpgroup == 0)(lambda: consume(has_dvalue=True, has_dkey=False))
        pl.when(warpgroup == 1)(lambda: consume(has_dvalue=False, has_dkey=True))
    else:
        pl.when(warpgroup < groups)(lambda: consume(has_dvalue=True, has_dkey=True))

    @pl.when(warpgroup == groups)
    def _():
        claim_registers(groups, producer=True)
        _produce_key_grad(wg)


def _produce_key_grad(wg: KeyGradWarpgroup) -> None:
    """Copy all keys and values, then queries and gradients of the output, block by block."""
    grid, gmem, smem, tile, block_map = wg
    for index in range(grid.sizes.key_tiles):
        slots = pl.ds(tile.block * grid.block_kv + index * ROWS, ROWS)
        for name in ("key", "value"):
            source = gmem[name].at[tile.batch, slots, tile.kv_head]
            plgpu.copy_gmem_to_smem(source, smem[name].at[index], smem["keys_full"].at[index])
    keys = pl.ds(tile.block * grid.block_kv, grid.block_kv)
    score_tiles = [name for name in ScoreTiles._fields if smem[name] is not None]

    def copy_block(step, _):
        rows = wg.locate_rows(lax.div(step, block_map.total), lax.rem(step, block_map.total))
        slots = pl.ds(rows.slot, grid.sizes.block_q)

        def select(name, vector):
            matrix = gmem[name].at[rows.batch, slots, rows.head]
            return matrix, gmem[vector].at[rows.batch, rows.head, slots]

        smem["query"].copy(step, select("query", "lse2"))
        for name in score_tiles:
            smem[name].copy(step, rows.select_scores(gmem[name], keys, slots))
        smem["dout"].copy(step, select("dout", "delta"))

    steps = block_map.total * grid.problem.group
    lax.fori_loop(0, steps, copy_block, None)
    for name in ("query", *score_tiles, "dout"):
        smem[name].drain(steps)


def _consume_key_grad(wg: KeyGradWarpgroup, *, has_dkey: bool, has_dvalue: bool) -> None:
    """Sum one gradient or both over the rows of all heads, full blocks first, and write them."""
    grid, smem, tile, block_map = wg.grid, wg.smem, wg.tile, wg.block_map
    problem, interpret = grid.problem, grid.problem.interpret
    shape = (ROWS, grid.sizes.block_q)
    plgpu.barrier_wait(wg.select_buffer("keys_full"))

    def step(member, n, sums: tuple, *, partial: bool) -> tuple:
        dkey, dvalue = sums
        index = member * block_map.total + n
        operands = ScoreOperands(problem, wg.gmem, wg.locate_rows(member, n), shape, q_axis=1)
        # Dropout comes first: it takes many registers to compute, and one bit per score to keep.
        tiles = ScoreTiles.wait(smem, index, pl.ds(tile.key_tile * ROWS, ROWS))
        scores = operands.select_block(tile.slot, tiles)
        kept = scores.compute_kept()

        # Keys times queries.
        query, lse = smem["query"].wait(index)
        key_tile = make_opaque(tile.key_tile)
        dots = multiply(smem["key"].at[key_tile], transpose(query))
        lse = load_vector(lse, 1)
        weights = operands.weigh(scores, dots, lse, kept, partial=partial)
        ScoreTiles.release(smem, index)

        # Weights times gradients of the output, which are multiplied with the values, too.
        dout, delta = smem["dout"].wait(index)
        value_dout = smem["value"].at[key_tile], transpose(dout)
        if has_dvalue:
            dropped = weights.drop().astype(problem.dtype)
        if not has_dkey:
            dvalue = multiply_add(present(dvalue), dropped, dout, interpret=interpret)
        elif not has_dvalue:
            dweights = multiply(*value_dout)
        else:
            dvalue, dweights = multiply_add_then_multiply(
                dvalue, dropped, dout, value_dout, interpret=interpret
            )

        # Gradients of the scores times queries.
        if has_dkey:
            # A vector along the columns takes many registers: it is loaded when it is needed.
            delta = load_vector(delta, 1)
            dscores = weights.differentiate(dweights, delta).astype(problem.dtype)
            dkey = multiply_add(dkey, dscores, query, interpret=interpret)
        plgpu.commit_smem()  # threads have read the LSE and delta, and TMA writes them next
        smem["query"].release(index)
        smem["dout"].release(index)
        return dkey, dvalue

    def add_head(member, sums):
        full_step = functools.partial(step, member, partial=False)
        sums = lax.fori_loop(0, block_map.full, full_step, sums)
        if not grid.masked:
            return sums
        partial_step = functools.partial(step, member, partial=True)
        return lax.fori_loop(block_map.full, block_map.total, partial_step, sums)

    dkey = make_zeros((ROWS, problem.head_dim)) if has_dkey else None
    dvalue = make_zeros((ROWS, problem.value_head_dim)) if has_dvalue else None
    dkey, dvalue = lax.fori_loop(0, problem.group, add_head, (dkey, dvalue))
    if grid.sizes.split:
        # Each one's result overwrites what the other one may still read.
        sync_warpgroups(smem["sync"])
    if has_dkey:
        _write_keys(wg, "key", "dkey", dkey * problem.scale)
    if has_dvalue:
        _write_keys(wg, "value", "dvalue", dvalue)
    plgpu.wait_smem_to_gmem(0)


def _write_keys(wg: KeyGradWarpgroup, buffer: str, name: str, gradient: jax.Array) -> None:
    """Write a gradient through the buffer of its keys or values, which nobody reads any more."""
    wg.select_buffer(buffer)[...] = gradient.astype(wg.grid.problem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(wg.select_buffer(buffer), wg.select_keys(name))
