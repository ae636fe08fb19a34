"""A Pallas call over the grid of a flash kernel, with all refs by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from axattn import _jax_compat
from axattn.kernels._tpu.flash.blocks import KernelMemory, VmemBlock
from axattn.kernels._tpu.flash.grid import GridScalars, TpuFlashGrid


def call_kernel(
    body: Callable[[GridScalars, Mapping[str, Any]], None],
    grid: TpuFlashGrid,
    scalars: GridScalars,
    inputs: Mapping[str, jax.Array],
    memory: KernelMemory,
    *,
    cost: pl.CostEstimate,
    num_sequential: int,
    vmem_limit: int | None,
    interpret: Any,
) -> list[jax.Array]:
    """Run ``body(scalars, refs)`` at every step of the grid and return the outputs.

    ``memory`` declares the refs: those of the ``inputs``, the outputs and the scratch. The steps of
    the last ``num_sequential`` axes of the grid build on each other.
    """
    declared = [(name, jnp.dtype(block.dtype)) for name, block in memory.inputs.items()]
    assert [(name, array.dtype) for name, array in inputs.items()] == declared
    names = (*inputs, *memory.outputs, *memory.scratch)
    count = len(scalars)

    def run_body(*refs):
        body(GridScalars(*refs[:count]), dict(zip(names, refs[count:], strict=True)))

    def make_spec(block: VmemBlock | None, array: Any) -> pl.BlockSpec:
        return pl.BlockSpec(memory_space=pl.ANY) if block is None else block.make_spec(grid, array)

    semantics: Any = ("parallel",) * (4 - num_sequential) + ("arbitrary",) * num_sequential
    arrays: list[Any] = list(inputs.values())
    return pl.pallas_call(
        run_body,
        out_shape=[
            _jax_compat.make_result_shape(arrays[0], array.shape, array.dtype)
            for array, _ in memory.outputs.values()
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=count,
            grid=grid.shape,
            in_specs=[make_spec(memory.inputs[name], array) for name, array in inputs.items()],
            out_specs=[make_spec(block, array) for array, block in memory.outputs.values()],
            scratch_shapes=list(memory.scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=cost,
        interpret=interpret,
    )(*scalars, *arrays)
