"""The gradients of flash attention: one fused kernel, or two.

Dao, arXiv 2307.08691. The fused kernel has blocks of queries in its outer loop. It sums the
gradient of a block of queries over its key blocks, and keeps the gradients of all keys and values
of a group in VMEM throughout, which is possible because a group shares them. Each score is computed
once and no partial sum goes to HBM. If these gradients do not fit, one kernel computes the gradient
of the queries and another, with blocks of keys in its outer loop, those of keys and values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from axattn._call import AttentionCall
from axattn._typing import present
from axattn.kernels import _backward_inputs, _masks
from axattn.kernels._scores import ScoreComputer, contract
from axattn.kernels._tpu.flash import cost, operands
from axattn.kernels._tpu.flash.blocks import (
    KernelMemory,
    VmemBlock,
    declare_inputs,
    declare_key_result,
    declare_query_result,
    make_query_block,
    make_row_block,
)
from axattn.kernels._tpu.flash.call import call_kernel
from axattn.kernels._tpu.flash.grid import (
    GridScalars,
    TpuBackwardBlockSizes,
    TpuBlockSizes,
    TpuFlashGrid,
    TpuFlashTiling,
    plan_grid,
)
from axattn.kernels._tpu.flash.tile import (
    FlashTile,
    locate_step,
    pack_queries,
    run_on_block,
    run_on_heads,
    unpack_queries,
    zero_missing_queries,
)


def backward(
    call: AttentionCall,
    sizes: TpuBackwardBlockSizes,
    given: _backward_inputs.BackwardInputs,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of query, key and value, each in its input's dtype."""
    call = _masks.fold_key_masks(call)
    if sizes.key is None:
        return _compute_fused(call, given, sizes.query, interpret)
    dquery = _compute_query_grad(call, given, sizes.query, interpret)
    return dquery, *_compute_key_grad(call, given, sizes.key, interpret)


def _compute_fused(call: AttentionCall, given, sizes: TpuBlockSizes, interpret):
    grid, scalars, inputs = _make_inputs(call, given, sizes, "q")
    dquery, dkey, dvalue = call_kernel(
        functools.partial(_fused_kernel, grid, call.precision),
        grid,
        scalars,
        inputs,
        declare_fused(call, grid),
        cost=cost.estimate_cost(call, grid, cost.FUSED),
        num_sequential=2,
        vmem_limit=sizes.vmem_limit,
        interpret=interpret,
    )
    dquery = operands.restore_queries(grid, dquery)
    return dquery, operands.restore_keys(call, dkey), operands.restore_keys(call, dvalue)


def _compute_query_grad(call: AttentionCall, given, sizes: TpuBlockSizes, interpret):
    grid, scalars, inputs = _make_inputs(call, given, sizes, "q")
    (dquery,) = call_kernel(
        functools.partial(_query_grad_kernel, grid, call.precision),
        grid,
        scalars,
        inputs,
        declare_query_grad(call, grid),
        cost=cost.estimate_cost(call, grid, cost.QUERY_GRAD),
        num_sequential=1,
        vmem_limit=sizes.vmem_limit,
        interpret=interpret,
    )
    return operands.restore_queries(grid, dquery)


def _compute_key_grad(call: AttentionCall, given, sizes: TpuBlockSizes, interpret):
    grid, scalars, inputs = _make_inputs(call, given, sizes, "kv")
    dkey, dvalue = call_kernel(
        functools.partial(_key_grad_kernel, grid, call.precision),
        grid,
        scalars,
        inputs,
        declare_key_grad(call, grid),
        cost=cost.estimate_cost(call, grid, cost.KEY_GRAD),
        num_sequential=1,
        vmem_limit=sizes.vmem_limit,
        interpret=interpret,
    )
    return operands.restore_keys(call, dkey), operands.restore_keys(call, dvalue)


def _make_inputs(call: AttentionCall, given, sizes: TpuBlockSizes, major: str):
    grid, scalars = plan_grid(call, sizes, major)
    # A query after its row's length may be NaN, which a weight of zero would not remove.
    query = operands.zero_unused_queries(call, call.query)
    inputs = operands.make_inputs(dataclasses.replace(call, query=query), grid)
    dout = operands.zero_unused_queries(call, given.dout)
    inputs["dout"] = operands.lay_out_queries(grid, dout)
    inputs["lse2"] = operands.lay_out_over_rows(grid, given.lse2.swapaxes(1, 2), jnp.inf)
    inputs["delta"] = operands.lay_out_over_rows(grid, given.delta.swapaxes(1, 2))
    return grid, scalars, inputs


# ---- what the kernels have in VMEM ------------------------------------------------------------


def declare_fused(call: AttentionCall, tiling: TpuFlashTiling) -> KernelMemory:
    """Declare `declare_query_grad`, and float32 sums over all queries for all keys and values."""
    inputs, outputs, scratch = declare_query_grad(call, tiling)
    outputs, scratch, dtype = dict(outputs), dict(scratch), present(call.key).dtype
    for name, size in (("dkey", call.head_dim), ("dvalue", call.value_head_dim)):
        outputs[name] = declare_key_result(tiling, size, dtype, whole=True)
        keys = tiling.num_kv * tiling.block_kv
        scratch[f"{name}_sums"] = pltpu.VMEM((tiling.kv_heads, keys, size), jnp.float32)
        scratch[f"{name}_block"] = pltpu.VMEM((tiling.kv_heads, tiling.block_kv, size), dtype)
    return KernelMemory(inputs, outputs, scratch)


def declare_query_grad(call: AttentionCall, tiling: TpuFlashTiling) -> KernelMemory:
    """Declare the packed rows, and float32 sums for a block of queries."""
    scratch = _declare_rows(call, tiling)
    sums = (tiling.kv_heads, call.head_dim, tiling.rows)
    scratch["dquery_sums"] = pltpu.VMEM(sums, jnp.float32)
    outputs = {"dquery": declare_query_result(tiling, call.head_dim, call.query.dtype)}
    return KernelMemory(_declare_inputs(call, tiling), outputs, scratch)


def declare_key_grad(call: AttentionCall, tiling: TpuFlashTiling) -> KernelMemory:
    """Declare the packed rows, and float32 sums for a block of keys and values."""
    outputs, scratch = {}, _declare_rows(call, tiling)
    for name, size in (("dkey", call.head_dim), ("dvalue", call.value_head_dim)):
        outputs[name] = declare_key_result(tiling, size, present(call.key).dtype)
        sums = (tiling.kv_heads, tiling.block_kv, size)
        scratch[f"{name}_sums"] = pltpu.VMEM(sums, jnp.float32)
    return KernelMemory(_declare_inputs(call, tiling), outputs, scratch)


def _declare_inputs(call: AttentionCall, tiling: TpuFlashTiling) -> dict[str, VmemBlock]:
    inputs = declare_inputs(call, tiling)
    inputs["dout"] = make_query_block(tiling, call.value_head_dim, call.query.dtype)
    inputs["lse2"] = make_row_block(tiling, jnp.float32, call.num_heads)
    inputs["delta"] = make_row_block(tiling, jnp.float32, call.num_heads)
    return inputs


def _declare_rows(call: AttentionCall, tiling: TpuFlashTiling) -> dict[str, Any]:
    shape = (tiling.kv_heads, tiling.rows)
    return {
        "rows": pltpu.VMEM((*shape, call.head_dim), call.query.dtype),
        "drows": pltpu.VMEM((*shape, call.value_head_dim), call.query.dtype),
    }


# ---- the kernels ------------------------------------------------------------------------------


def _fused_kernel(
    grid: TpuFlashGrid, precision: Any, scalars: GridScalars, refs: Mapping[str, Any]
) -> None:
    """Add to all gradients; those of keys and values are written at the end of all tiles."""
    b, h, tile, step = (pl.program_id(axis) for axis in range(4))

    @pl.when((tile == 0) & (step == 0))
    def _():
        refs["dkey_sums"][...] = jnp.zeros_like(refs["dkey_sums"])
        refs["dvalue_sums"][...] = jnp.zeros_like(refs["dvalue_sums"])

    _query_grad_kernel(grid, precision, scalars, refs, with_keys=True)

    @pl.when((tile == grid.num_tiles - 1) & (step == grid.num_steps - 1))
    def _():
        heads = pl.ds(h * grid.kv_heads, grid.kv_heads)
        for name, factor in (("dkey", grid.problem.scale), ("dvalue", 1.0)):
            _write_key_grad(grid, refs, name, factor, refs[name].at[b, heads])


def _write_key_grad(
    grid: TpuFlashGrid, refs: Mapping[str, Any], name: str, factor: float, target: Any
) -> None:
    """Write the sums over all queries to HBM, block by block, in the dtype of the gradient."""
    sums, block = refs[f"{name}_sums"], refs[f"{name}_block"]

    def write_block(j, carry):
        keys = pl.ds(pl.multiple_of(j * grid.block_kv, grid.block_kv), grid.block_kv)
        block[...] = (sums[:, keys] * factor).astype(block.dtype)
        pltpu.sync_copy(block, target.at[:, keys])
        return carry

    lax.fori_loop(0, grid.num_kv, write_block, 0)


def _query_grad_kernel(
    grid: TpuFlashGrid,
    precision: Any,
    scalars: GridScalars,
    refs: Mapping[str, Any],
    *,
    with_keys: bool = False,
) -> None:
    """Add one block of keys to the gradient of a block of queries.

    ``with_keys`` adds to the gradients of the keys and values as well.
    """
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        _pack_rows(grid, refs, locate_step(grid, scalars).q)
        refs["dquery_sums"][...] = jnp.zeros_like(refs["dquery_sums"])

    @run_on_block(grid, scalars)
    def _(at, *, partial):
        keys = pl.ds(at.kv * grid.block_kv, grid.block_kv)

        @run_on_heads(grid)
        def _(head):
            tile = FlashTile(grid, refs, at, head, scalars.dropout)
            slots = keys if with_keys else None
            _add_tile_gradients(tile, precision, partial=partial, to_keys=slots, to_queries=True)

    @pl.when(step == grid.num_steps - 1)
    def _():
        dquery = unpack_queries(grid, refs["dquery_sums"][...] * grid.problem.scale)
        refs["dquery"][0] = dquery.astype(refs["dquery"].dtype)


def _key_grad_kernel(
    grid: TpuFlashGrid, precision: Any, scalars: GridScalars, refs: Mapping[str, Any]
) -> None:
    """Add one block of queries to the gradients of a block of keys and values."""
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        refs["dkey_sums"][...] = jnp.zeros_like(refs["dkey_sums"])
        refs["dvalue_sums"][...] = jnp.zeros_like(refs["dvalue_sums"])

    @run_on_block(grid, scalars)
    def _(at, *, partial):
        _pack_rows(grid, refs, at.q)
        keys = pl.ds(0, grid.block_kv)

        @run_on_heads(grid)
        def _(head):
            tile = FlashTile(grid, refs, at, head, scalars.dropout)
            _add_tile_gradients(tile, precision, partial=partial, to_keys=keys, to_queries=False)

    @pl.when(step == grid.num_steps - 1)
    def _():
        for name, factor in (("dkey", grid.problem.scale), ("dvalue", 1.0)):
            refs[name][0] = (refs[f"{name}_sums"][...] * factor).astype(refs[name].dtype)


def _pack_rows(grid: TpuFlashGrid, refs: Mapping[str, Any], q: jax.Array) -> None:
    for rows, name in (("rows", "query"), ("drows", "dout")):
        refs[rows][...] = pack_queries(grid, zero_missing_queries(grid, refs[name][0], q))


def _add_tile_gradients(
    tile: FlashTile, precision: Any, *, partial: bool, to_keys: Any, to_queries: bool
) -> None:
    """Add one tile to the gradients; four of the five products need no transpose.

    ``to_keys`` is the slice of the sums of keys and values to which this block adds, or None.
    """
    refs, head, problem = tile.refs, tile.head, tile.grid.problem
    block = ScoreComputer(problem, tile)
    rows, drows = refs["rows"][head], refs["drows"][head]

    # The weights again, [keys, rows], from the LSE.
    scores, ratio = block.compute(contract(refs["key"][0, head], rows, (1, 1), precision))
    lse2 = tile.load_rows("lse2")
    weights = jnp.exp2(scores - lse2)
    if partial:
        weights = jnp.where(block.compute_mask(), weights, 0.0)
    if tile.has("bias") and problem.q_len % tile.grid.block_q:
        # After the last query the bias may be anything.
        weights = jnp.where(lse2 == jnp.inf, 0.0, weights)
    kept = block.compute_kept()

    # The gradients of the scaled products, [keys, rows].
    dweights = contract(refs["value"][0, head], drows, (1, 1), precision)
    dscores = weights * (block.apply_dropout(dweights, kept) - tile.load_rows("delta"))
    if ratio is not None:
        dscores = dscores * (1.0 - ratio * ratio)
    weights = block.apply_dropout(weights, kept).astype(rows.dtype)
    dscores, key = dscores.astype(rows.dtype), refs["key"][0, head]

    if to_keys is not None:
        refs["dvalue_sums"][head, to_keys] += contract(weights, drows, (1, 0), precision)
        refs["dkey_sums"][head, to_keys] += contract(dscores, rows, (1, 0), precision)
    if to_queries:
        refs["dquery_sums"][head] += contract(key, dscores, (0, 0), precision)
