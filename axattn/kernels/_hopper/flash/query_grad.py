"""The gradient of the query: the weights are computed again from the LSE, block by block.

Dao, arXiv 2307.08691, algorithm 2, in two kernels, so that every gradient has one writer and no
atomic addition: here a tile of query rows, in `key_grad` a block of keys. The same call twice is
bitwise equal; the price is two matrix products more than one sweep would need.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from axattn.kernels import _block_map
from axattn.kernels._hopper import cost
from axattn.kernels._hopper.block_sizes import QueryGradBlockSizes
from axattn.kernels._hopper.flash.grid import FlashGrid, FlashWarpgroup
from axattn.kernels._hopper.kv_loader import KVLoader
from axattn.kernels._hopper.operands import HopperOperands
from axattn.kernels._hopper.primitives import (
    ROWS,
    claim_registers,
    declare_swizzled,
    load_vector,
    make_kernel,
    make_opaque,
    make_zeros,
    multiply,
    multiply_add,
    multiply_both,
    round_up_length,
    transpose,
)
from axattn.kernels._hopper.scores import ScoreOperands, ScoreTiles
from axattn.kernels._problem import Problem


def query_grad(problem: Problem, operands: HopperOperands, sizes: QueryGradBlockSizes) -> jax.Array:
    """Return dQ ``[B, T, N, H]``; ``operands`` have ``dout``, ``lse2`` and ``delta`` besides."""
    grid = FlashGrid.create(problem, operands, sizes.block_kv, sizes.warpgroups, packing=False)
    block_map = _block_map.map_key_blocks(operands.call, grid.block_q, grid.block_kv)
    arrays = {**operands.arrays, **block_map.as_arrays()}
    rows = round_up_length(problem.q_len)
    shape = (problem.batch, rows, problem.num_heads, problem.head_dim)
    out = jax.ShapeDtypeStruct(shape, jnp.dtype(problem.dtype))
    scratch = declare_query_grad_scratch(
        sizes,
        grid.kv,
        problem.head_dim,
        problem.value_head_dim,
        dtype=problem.dtype,
        score_dtypes=ScoreTiles.select_dtypes(arrays),
    )
    dquery = make_kernel(
        functools.partial(_query_grad_body, grid, tuple(arrays)),
        name="axattn_query_grad",
        out=out,
        scratch=scratch,
        programs=grid.programs,
        warpgroups=grid.warpgroups + 1,
        cost=cost.estimate_query_grad(operands.call, arrays, out, (grid.block_q, grid.block_kv)),
        interpret=problem.interpret,
    )(*arrays.values())
    return dquery[:, : problem.q_len]


def declare_query_grad_scratch(
    sizes: QueryGradBlockSizes,
    kv: KVLoader,
    head_dim: int,
    value_head_dim: int,
    *,
    dtype: Any,
    score_dtypes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the shared memory and the barriers of a program.

    ``score_dtypes``: dtypes of a bias and a mask over queries and keys, where there are any.
    """
    keys, groups = sizes.block_kv, sizes.warpgroups

    return {
        "query": declare_swizzled((groups, ROWS, head_dim), dtype, keys),
        "dout": declare_swizzled((groups, ROWS, value_head_dim), dtype, keys),
        "key": kv.declare(sizes.key_stages, keys, head_dim, consumers=groups),
        "value": kv.declare(sizes.value_stages, keys, value_head_dim, consumers=groups),
        **ScoreTiles.declare((1, ROWS * groups, keys), score_dtypes, consumers=groups),
        "rows_full": plgpu.Barrier(num_arrivals=2, num_barriers=groups),
    }


def _query_grad_body(grid: FlashGrid, names: tuple[str, ...], *refs, **smem) -> None:
    gmem = dict(zip((*names, "dquery"), refs, strict=True))
    wg = FlashWarpgroup.create(grid, gmem, smem)

    @pl.when(wg.warpgroup < grid.warpgroups)
    def _():
        claim_registers(grid.warpgroups)
        _consume_query_grad(wg)

    @pl.when(wg.warpgroup == grid.warpgroups)
    def _():
        claim_registers(grid.warpgroups, producer=True)
        _produce_query_grad(wg)


def _produce_query_grad(wg: FlashWarpgroup) -> None:
    """Copy keys, tiles of bias and mask, and values, block by block."""
    grid, gmem, smem, tile, kv = wg.grid, wg.gmem, wg.smem, wg.tile, wg.grid.kv
    score_tiles = [name for name in ScoreTiles._fields if smem[name] is not None]

    def copy_block(n, _):
        slot = wg.block_map.block(n) * grid.block_kv
        queries, keys = pl.ds(tile.block * grid.block_q, grid.block_q), pl.ds(slot, grid.block_kv)
        slices = kv.locate(gmem, tile.batch, tile.kv_head, slot, grid.block_kv)
        kv.copy(smem["key"], n, gmem, "key", slices)
        for name in score_tiles:
            smem[name].copy(n, tile.rows.select_scores(gmem[name], queries, keys))
        kv.copy(smem["value"], n, gmem, "value", slices)

    lax.fori_loop(0, wg.block_map.total, copy_block, None)
    for name in ("key", *score_tiles, "value"):
        smem[name].drain(wg.block_map.total)


def _consume_query_grad(wg: FlashWarpgroup) -> None:
    """Sum the gradient over the blocks of keys, full ones first, and write the rows."""
    grid, smem, problem, block_map = wg.grid, wg.smem, wg.grid.problem, wg.block_map
    rows_full = wg.select_buffer("rows_full")
    plgpu.copy_gmem_to_smem(wg.select_rows("query"), wg.select_buffer("query"), rows_full)
    plgpu.copy_gmem_to_smem(wg.select_rows("dout"), wg.select_buffer("dout"), rows_full)
    operands = ScoreOperands(problem, wg.gmem, wg.tile.rows, (ROWS, grid.block_kv), q_axis=0)
    operands = operands.load_row_vectors().load_bounds()
    lse, delta = (load_vector(wg.select_vector(name), 0) for name in ("lse2", "delta"))
    plgpu.barrier_wait(rows_full)

    def step(n, dquery: jax.Array, *, partial: bool) -> jax.Array:
        kv_slot = block_map.block(n) * grid.block_kv if partial or operands.reads_keys else None
        # Dropout comes first: it takes many registers to compute, and one bit per score to keep.
        tiles = ScoreTiles.wait(smem, n, pl.ds(wg.warpgroup * ROWS, ROWS))
        scores = operands.select_block(kv_slot, tiles)
        kept = scores.compute_kept()

        # Queries times keys, and gradients of the output times values.
        key, value = smem["key"].wait(n).numbers, smem["value"].wait(n).numbers
        index = make_opaque(wg.warpgroup)
        query_key = smem["query"].at[index], transpose(key)
        dout_value = smem["dout"].at[index], transpose(value)
        if tiles == ScoreTiles():
            dots, dweights = multiply_both(query_key, dout_value)
            weights = operands.weigh(scores, dots, lse, kept, partial=partial)
        else:
            dots = multiply(*query_key)
            weights = operands.weigh(scores, dots, lse, kept, partial=partial)
            dweights = multiply(*dout_value)
        smem["value"].release(n)
        ScoreTiles.release(smem, n)

        # Gradients of the scores times keys.
        dscores = weights.differentiate(dweights, delta).astype(problem.dtype)
        dquery = multiply_add(dquery, dscores, key, interpret=problem.interpret)
        smem["key"].release(n)
        return dquery

    dquery = make_zeros((ROWS, problem.head_dim))
    dquery = lax.fori_loop(0, block_map.full, functools.partial(step, partial=False), dquery)
    if grid.masked:
        partial_step = functools.partial(step, partial=True)
        dquery = lax.fori_loop(block_map.full, block_map.total, partial_step, dquery)
    wg.select_buffer("query")[...] = (dquery * problem.scale).astype(problem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(wg.select_buffer("query"), wg.select_rows("dquery"))
    plgpu.wait_smem_to_gmem(0)
