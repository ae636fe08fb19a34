"""The forward kernel: online softmax over the key blocks of a tile of query rows.

Dao, arXiv 2307.08691; Shah et al., arXiv 2407.08608 (a producer warpgroup that keeps the memory
busy, and two consumers that alternate between the tensor core and the exponentials).
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

from axattn._typing import present
from axattn.kernels import _block_map
from axattn.kernels._hopper import cost
from axattn.kernels._hopper.block_sizes import ForwardBlockSizes
from axattn.kernels._hopper.dequantize import (
    convert_codes,
    find_used_slots,
    share_columns,
    zero_unused_rows,
)
from axattn.kernels._hopper.flash.grid import FlashGrid, FlashWarpgroup
from axattn.kernels._hopper.kv_loader import KVBlock, KVLoader
from axattn.kernels._hopper.operands import HopperOperands
from axattn.kernels._hopper.primitives import (
    REDUCTION_BYTES,
    ROWS,
    PingPong,
    broadcast_vector,
    claim_registers,
    declare_row_major,
    declare_swizzled,
    make_kernel,
    make_opaque,
    multiply,
    multiply_add,
    round_up_length,
    sync_warpgroups,
    transpose,
)
from axattn.kernels._hopper.scores import ScoreOperands, ScoreTiles, make_head_vector
from axattn.kernels._hopper.softmax import OnlineSoftmax, update_softmax
from axattn.kernels._problem import LOG2E, Problem

LN2 = 1.0 / LOG2E

# Vectors over rows, which packing rearranges.
_ROW_VECTORS = ("low", "high", "q_positions", "q_segments")


def forward(
    problem: Problem, operands: HopperOperands, sizes: ForwardBlockSizes
) -> tuple[jax.Array, jax.Array]:
    """Return output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32."""
    grid = FlashGrid.create(problem, operands, sizes.block_kv, sizes.warpgroups, packing=True)
    block_map = _block_map.map_key_blocks(operands.call, grid.block_q, grid.block_kv)
    arrays = dict(operands.arrays)
    for name in _ROW_VECTORS:
        if name in arrays:
            arrays[name] = grid.pack_vector(arrays[name])
    arrays.update(block_map.as_arrays())
    rows = round_up_length(problem.q_len)
    shape = (problem.batch, rows, problem.num_heads, problem.value_head_dim)
    lse_shape = (problem.batch, problem.num_heads, grid.num_q * grid.block_q)
    out = (
        jax.ShapeDtypeStruct(shape, jnp.dtype(problem.dtype)),
        jax.ShapeDtypeStruct(lse_shape, jnp.float32),
    )
    scratch = declare_forward_scratch(
        sizes,
        grid.kv,
        problem.head_dim,
        problem.value_head_dim,
        dtype=problem.dtype,
        pack=grid.pack,
        score_dtypes=ScoreTiles.select_dtypes(arrays),
    )
    out, lse = make_kernel(
        functools.partial(_forward_body, grid, tuple(arrays)),
        name="axattn_forward",
        out=out,
        scratch=scratch,
        programs=grid.programs,
        warpgroups=grid.warpgroups + 1,
        cost=cost.estimate_forward(operands.call, arrays, out, (grid.block_q, grid.block_kv)),
        interpret=problem.interpret,
        reduction_bytes=REDUCTION_BYTES,
    )(*arrays.values())
    return out[:, : problem.q_len], lse[:, :, : problem.q_len].swapaxes(1, 2)


def declare_forward_scratch(
    sizes: ForwardBlockSizes,
    kv: KVLoader,
    head_dim: int,
    value_head_dim: int,
    *,
    dtype: Any,
    score_dtypes: Mapping[str, Any],
    pack: int = 1,
) -> dict[str, Any]:
    """Return the shared memory and the barriers of a program.

    ``score_dtypes``: dtypes of a bias and a mask over queries and keys, where there are any.
    """
    keys, stages, groups = sizes.block_kv, sizes.stages, sizes.warpgroups

    def declare_operand(size):
        return declare_swizzled((1, keys, size), dtype, keys) if kv.is_quantized else None

    out = schedule = None
    if head_dim != value_head_dim:  # else the output takes the query's place
        out = declare_swizzled((groups, ROWS, value_head_dim), dtype, ROWS)
    # Warpgroups that prepare blocks together cannot alternate.
    if groups == 2 and not kv.is_prepared:
        schedule = plgpu.Barrier(num_arrivals=groups)
    return {
        "query": declare_swizzled((groups, ROWS, head_dim), dtype, keys),
        "out": out,
        "lse": declare_row_major((groups, ROWS), jnp.float32),
        "key": kv.declare(stages, keys, head_dim, consumers=groups),
        "value": kv.declare(stages, keys, value_head_dim, consumers=groups),
        "key_operand": declare_operand(head_dim),
        "value_operand": declare_operand(value_head_dim),
        **ScoreTiles.declare((stages, ROWS * groups, keys), score_dtypes, consumers=groups),
        "query_full": plgpu.Barrier(num_arrivals=pack, num_barriers=groups),
        "schedule": schedule,
        "sync": plgpu.Barrier(num_arrivals=groups) if kv.is_prepared else None,
    }


def _forward_body(grid: FlashGrid, names: tuple[str, ...], *refs, **smem) -> None:
    gmem = dict(zip((*names, "out", "lse"), refs, strict=True))
    wg = FlashWarpgroup.create(grid, gmem, smem)
    searching = grid.kv.kind == "pages"

    @pl.when(wg.warpgroup < grid.warpgroups)
    def _():
        claim_registers(grid.warpgroups, searching=searching)
        _consume_forward(wg)

    @pl.when(wg.warpgroup == grid.warpgroups)
    def _():
        claim_registers(grid.warpgroups, producer=True, searching=searching)
        _produce_forward(wg)


def _produce_forward(wg: FlashWarpgroup) -> None:
    """Copy keys, tiles of bias and mask, and values, block by block."""
    grid, gmem, smem, tile, kv = wg.grid, wg.gmem, wg.smem, wg.tile, wg.grid.kv
    score_tiles = [name for name in ScoreTiles._fields if smem[name] is not None]

    def copy_block(n, _):
        slot = wg.block_map.block(n) * grid.block_kv
        # Calls with tiles over [T, S] are not packed: all rows are of one head.
        queries, keys = pl.ds(tile.block * grid.block_q, grid.block_q), pl.ds(slot, grid.block_kv)
        slices = kv.locate(gmem, tile.batch, tile.kv_head, slot, grid.block_kv)
        kv.copy(smem["key"], n, gmem, "key", slices)
        for name in score_tiles:
            smem[name].copy(n, tile.rows.select_scores(gmem[name], queries, keys))
        kv.copy(smem["value"], n, gmem, "value", slices)

    lax.fori_loop(0, wg.block_map.total, copy_block, None)
    for name in ("key", *score_tiles, "value"):
        smem[name].drain(wg.block_map.total)


def _consume_forward(wg: FlashWarpgroup) -> None:
    """Attend to the blocks of keys, full ones first, and write the rows."""
    grid, smem, kv, block_map = wg.grid, wg.smem, wg.grid.kv, wg.block_map
    problem = grid.problem
    query_full = wg.select_buffer("query_full")
    for member in range(grid.pack):
        buffer = wg.select_buffer("query").at[grid.select_head_rows(member)]
        plgpu.copy_gmem_to_smem(wg.select_rows("query", member), buffer, query_full)
    operands = ScoreOperands(problem, wg.gmem, wg.tile.rows, (ROWS, grid.block_kv), q_axis=0)
    operands = operands.load_row_vectors().load_bounds()
    ping_pong = PingPong(smem["schedule"], grid.warpgroups, wg.warpgroup)
    plgpu.barrier_wait(query_full)

    def step(n, state: OnlineSoftmax, *, partial: bool) -> OnlineSoftmax:
        # Queries times keys.
        key = _prepare_operand(wg, "key", smem["key"].wait(n), n, partial=False)
        query = smem["query"].at[make_opaque(wg.warpgroup)]
        dots = multiply(query, transpose(key), then=ping_pong.sync)
        if kv.is_quantized:
            # The scales come with the codes, and are needed until the softmax is done.
            block = smem["value"].wait(n)
        else:
            smem["key"].release(n)

        # Softmax.
        kv_slot = block_map.block(n) * grid.block_kv if partial or operands.reads_keys else None
        tiles = ScoreTiles.wait(smem, n, pl.ds(wg.warpgroup * ROWS, ROWS))
        scales = kv.make_scale_loaders(smem, n, grid.block_kv)
        new = update_softmax(operands, state, dots, kv_slot, tiles, scales, partial=partial)
        ScoreTiles.release(smem, n)
        values = state.values * broadcast_vector(new.decay, state.values.shape, 0)
        weights = new.weights.astype(problem.dtype)
        values, weights, top, total = lax.optimization_barrier(
            (values, weights, new.top, new.total)
        )
        # The program arrives after the exponentials. ptxas arrives before them (see `PingPong`):
        # products alternate all the same, but the exponentials of the warpgroups may overlap.
        ping_pong.arrive()

        # Weights times values.
        if not kv.is_quantized:
            block = smem["value"].wait(n)
        value = _prepare_operand(wg, "value", block, n, partial=partial)
        ping_pong.wait()
        values = multiply_add(values, weights, value, interpret=problem.interpret)
        smem["value"].release(n)
        if kv.is_quantized:
            smem["key"].release(n)
        return OnlineSoftmax(values, top, total)

    state = OnlineSoftmax.create(problem.value_head_dim)
    ping_pong.start()
    state = lax.fori_loop(0, block_map.full, functools.partial(step, partial=False), state)
    if grid.masked:
        partial_step = functools.partial(step, partial=True)
        state = lax.fori_loop(block_map.full, block_map.total, partial_step, state)
    ping_pong.end()
    _write_forward(wg, state)


def _prepare_operand(wg: FlashWarpgroup, name: str, block: KVBlock, n, *, partial: bool) -> Any:
    """Return the keys or values of step ``n`` for the tensor core.

    The warpgroups share a block of a cache: each one prepares some of its columns for all.
    """
    grid, smem, kv, numbers = wg.grid, wg.smem, wg.grid.kv, block.numbers
    # Unused keys need no zeros: their scores are masked.
    clean = kv.may_hold_nan and partial and name == "value"
    if not kv.is_prepared or not (kv.is_quantized or clean):
        return numbers
    used = None
    if clean:
        slot = wg.block_map.block(n) * grid.block_kv
        used = find_used_slots(wg.gmem, wg.tile.batch, slot, grid.block_kv, codes=kv.is_quantized)
    operand = numbers
    if kv.is_quantized:
        operand = smem[f"{name}_operand"].at[make_opaque(jnp.int32(0))]
        sync_warpgroups(smem["sync"])  # all have read the block before this one
    for warpgroup, columns in enumerate(share_columns(operand.shape[1], grid.warpgroups)):

        @pl.when(wg.warpgroup == warpgroup)
        def _(columns=columns):
            if kv.is_quantized:
                convert_codes(numbers, operand, columns, used)
            else:
                zero_unused_rows(operand, present(used), columns)

    plgpu.commit_smem()
    sync_warpgroups(smem["sync"])
    return operand


def _write_forward(wg: FlashWarpgroup, state: OnlineSoftmax) -> None:
    """Divide the values by the sums, and write the rows and their LSE."""
    grid, problem, tile, smem = wg.grid, wg.grid.problem, wg.tile, wg.smem
    top, total = state.top, state.total
    scale: float | jax.Array = 1.0
    if "sinks" in wg.gmem:
        # A sink is a key with its own logit and no value.
        sink = make_head_vector(wg.gmem["sinks"], tile.rows, ROWS) * LOG2E
        top = jnp.maximum(state.top, sink)
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    if "sinks" in wg.gmem:
        scale = jnp.exp2(state.top - shift)
        total = total * scale + jnp.exp2(sink - shift)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, shift * LN2 + jnp.log(total))
    factor = scale / (total * (1.0 - problem.dropout_rate))
    values = state.values * broadcast_vector(factor, state.values.shape, 0)

    out = wg.select_buffer("query" if smem["out"] is None else "out")
    out[...] = values.astype(problem.dtype)
    wg.select_buffer("lse")[...] = lse
    plgpu.commit_smem()

    def copy_rows():
        for member in range(grid.pack):
            rows = grid.select_head_rows(member)
            plgpu.copy_smem_to_gmem(out.at[rows], wg.select_rows("out", member))
            plgpu.copy_smem_to_gmem(
                wg.select_buffer("lse").at[rows], wg.select_vector("lse", member)
            )
        plgpu.wait_smem_to_gmem(0)

    if grid.pack == 1:
        copy_rows()
    else:
        pl.when(tile.has_rows)(copy_rows)
