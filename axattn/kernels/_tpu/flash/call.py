"""A Pallas call over a grid, with everything by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from axattn import _jax_compat
from axattn.kernels._tpu.flash.grid import Cut, Scalars
from axattn.kernels._tpu.flash.operands import Operand


def kernel(
    body: Callable[[Scalars, Mapping[str, Any]], None],
    cut: Cut,
    scalars: Scalars,
    inputs: Mapping[str, Operand],
    outputs: Mapping[str, Operand],
    *,
    scratch: Mapping[str, Any],
    cost: pl.CostEstimate,
    sequential: int,
    vmem_limit: int | None,
    interpret: Any,
) -> list[jax.Array]:
    """Runs ``body(scalars, refs)`` at every step of the grid; the arrays of ``outputs``.

    ``sequential`` is the number of inner axes of the grid whose steps build on each other.
    """
    names = (*inputs, *outputs, *scratch)
    count = len(scalars)

    def run(*refs):
        body(Scalars(*refs[:count]), dict(zip(names, refs[count:], strict=True)))

    semantics: Any = ("parallel",) * (4 - sequential) + ("arbitrary",) * sequential
    arrays: list[Any] = [operand.array for operand in inputs.values()]
    return pl.pallas_call(
        run,
        out_shape=[
            _jax_compat.result_of(arrays[0], output.array.shape, output.array.dtype)
            for output in outputs.values()
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=count,
            grid=cut.grid,
            in_specs=[operand.spec(cut) for operand in inputs.values()],
            out_specs=[operand.spec(cut) for operand in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=cost,
        interpret=interpret,
    )(*scalars, *arrays)
