"""Flash attention forward: a grid over batch, key/value heads, query blocks and their key blocks.

Dao, arXiv 2307.08691; Shazeer, arXiv 1911.02150 for the shared keys. A block of keys is loaded once
for all query heads of its group: their rows form one operand of the matrix unit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from axattn._call import AttentionCall
from axattn.kernels import _masks
from axattn.kernels._scores import (
    ScoreComputer,
    SoftmaxState,
    add_softmax_block,
    contract,
    finish_softmax,
)
from axattn.kernels._tpu.flash import cost, operands
from axattn.kernels._tpu.flash.blocks import (
    KernelMemory,
    declare_inputs,
    declare_lse,
    declare_query_result,
    make_row_block,
)
from axattn.kernels._tpu.flash.call import call_kernel
from axattn.kernels._tpu.flash.grid import (
    GridScalars,
    TpuBlockSizes,
    TpuFlashGrid,
    TpuFlashTiling,
    plan_grid,
)
from axattn.kernels._tpu.flash.tile import (
    FlashTile,
    pack_queries,
    run_on_block,
    run_on_heads,
    unpack_queries,
)


def forward(
    call: AttentionCall, sizes: TpuBlockSizes, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Return the output ``[B, T, N, h]`` in the query's dtype and the float32 LSE ``[B, T, N]``."""
    call = _masks.fold_key_masks(call)
    grid, scalars = plan_grid(call, sizes, "q")
    inputs = operands.make_inputs(call, grid)
    if call.sinks is not None:
        inputs["sinks"] = operands.lay_out_sinks(grid, call.sinks)
    out, lse = call_kernel(
        functools.partial(_forward_kernel, grid, call.precision),
        grid,
        scalars,
        inputs,
        declare_forward(call, grid),
        cost=cost.estimate_cost(call, grid, cost.FORWARD),
        num_sequential=1,
        vmem_limit=sizes.vmem_limit,
        interpret=interpret,
    )
    return operands.restore_queries(grid, out), operands.restore_rows(grid, lse)


def declare_forward(call: AttentionCall, tiling: TpuFlashTiling) -> KernelMemory:
    """Declare what the kernel has in VMEM."""
    inputs = declare_inputs(call, tiling)
    if call.sinks is not None:
        inputs["sinks"] = make_row_block(tiling, jnp.float32, call.num_heads)
    outputs = {
        "out": declare_query_result(tiling, call.value_head_dim, call.query.dtype),
        "lse": declare_lse(tiling),
    }
    heads, rows = tiling.kv_heads, tiling.rows
    scratch = {
        "rows": pltpu.VMEM((heads, rows, call.head_dim), call.query.dtype),
        "sums": pltpu.VMEM((heads, call.value_head_dim, rows), jnp.float32),
        "top": pltpu.VMEM((heads, 1, rows), jnp.float32),
        "total": pltpu.VMEM((heads, 1, rows), jnp.float32),
    }
    return KernelMemory(inputs, outputs, scratch)


def _forward_kernel(
    grid: TpuFlashGrid, precision: Any, scalars: GridScalars, refs: Mapping[str, Any]
) -> None:
    """Add one block of keys to the output of a block of queries."""
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        refs["rows"][...] = pack_queries(grid, refs["query"][0])
        refs["sums"][...] = jnp.zeros_like(refs["sums"])
        if "sinks" in refs:
            # A sink is a key with its own logit and no value: the softmax starts with it.
            sinks = refs["sinks"][0, :, 0]
            refs["top"][...] = sinks
            refs["total"][...] = jnp.where(sinks == -jnp.inf, 0.0, 1.0)
        else:
            refs["top"][...] = jnp.full_like(refs["top"], -jnp.inf)
            refs["total"][...] = jnp.zeros_like(refs["total"])

    @run_on_block(grid, scalars)
    def _(at, *, partial):
        @run_on_heads(grid)
        def _(head):
            block = ScoreComputer(grid.problem, FlashTile(grid, refs, at, head, scalars.dropout))
            dots = contract(refs["key"][0, head], refs["rows"][head], (1, 1), precision)
            scores, _ = block.compute(dots)
            if partial:
                scores = jnp.where(block.compute_mask(), scores, -jnp.inf)
            state = SoftmaxState(refs["top"][head], refs["total"][head])
            weights, decay, state = add_softmax_block(scores, state, 0)
            refs["top"][head], refs["total"][head] = state
            value = refs["value"][0, head]
            weights = block.apply_dropout(weights, block.compute_kept()).astype(value.dtype)
            sums = refs["sums"][head] * decay
            refs["sums"][head] = sums + contract(value, weights, (0, 0), precision)

    @pl.when(step == grid.num_steps - 1)
    def _():
        factor, lse = finish_softmax(SoftmaxState(refs["top"][...], refs["total"][...]))
        out = unpack_queries(grid, refs["sums"][...] * factor)
        refs["out"][0] = out.astype(refs["out"].dtype)
        refs["lse"][0, :, 0] = lse
