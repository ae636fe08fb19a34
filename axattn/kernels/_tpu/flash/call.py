"""A Pallas call over the grid of a flash kernel, with all refs by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from axattn import _jax_compat
from axattn.kernels._tpu.flash.grid import GridScalars, TpuFlashGrid
from axattn.kernels._tpu.flash.operands import BlockOperand


def call_kernel(
    body: Callable[[GridScalars, Mapping[str, Any]], None],
    grid: TpuFlashGrid,
    scalars: GridScalars,
    inputs: Mapping[str, BlockOperand],
    outputs: Mapping[str, BlockOperand],
    *,
    scratch: Mapping[str, Any],
    cost: pl.CostEstimate,
    num_sequential: int,
    vmem_limit: int | None,
    interpret: Any,
) -> list[jax.Array]:
    """Run ``body(scalars, refs)`` at every step of the grid and return the ``outputs``.

    The steps of the last ``num_sequential`` axes of the grid build on each other.
    """
    names = (*inputs, *outputs, *scratch)
    count = len(scalars)

    def run_body(*refs):
        body(GridScalars(*refs[:count]), dict(zip(names, refs[count:], strict=True)))

    def make_spec(operand: BlockOperand) -> pl.BlockSpec:
        if operand.block is None:
            return pl.BlockSpec(memory_space=pl.ANY)
        return operand.block.make_spec(grid)

    semantics: Any = ("parallel",) * (4 - num_sequential) + ("arbitrary",) * num_sequential
    arrays: list[Any] = [operand.array for operand in inputs.values()]
    return pl.pallas_call(
        run_body,
        out_shape=[
            _jax_compat.result_of(arrays[0], output.array.shape, output.array.dtype)
            for output in outputs.values()
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=count,
            grid=grid.shape,
            in_specs=[make_spec(operand) for operand in inputs.values()],
            out_specs=[make_spec(operand) for operand in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=cost,
        interpret=interpret,
    )(*scalars, *arrays)
