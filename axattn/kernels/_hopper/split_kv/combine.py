"""Joins the results of a sequence's splits: the small kernel behind both decode kernels.

out = sum of 2^(lse_i - lse) out_i,   lse = log2 of the sum of 2^lse_i
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

from axattn._call import AttentionCall
from axattn.kernels._hopper import cost
from axattn.kernels._hopper.primitives import (
    ROWS,
    declare_row_major,
    div,
    fill_vector,
    load_vector,
    make_kernel,
    rem,
)
from axattn.kernels._hopper.split_kv.mainloop import SplitKVGrid
from axattn.kernels._hopper.split_kv.stream_k import StreamK
from axattn.kernels._problem import LOG2E, cdiv, round_up

# Warpgroups for a row with many results.
_MANY = 4


class PartialResults(NamedTuple):
    """The results of all splits, ``results_per_split`` of each.

    values: float32 [results, rows, h rounded up to 64]
    lse: float32 [results, tiles * 64], in units of log2
    """

    values: Any
    lse: Any

    @classmethod
    def declare(cls, grid: SplitKVGrid, *, rows: int) -> PartialResults:
        """Return what a decode kernel writes; ``rows``: packed rows as they lie in HBM."""
        results = grid.plan.split_numbers * grid.results_per_split
        values = (results, rows, round_up(grid.problem.value_head_dim, ROWS))
        lse = (results, grid.packing.tiles * ROWS)
        return cls(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (values, lse)))


class WeightedSum(NamedTuple):
    """The weighted sum of the values of some results, and the two parts of its LSE."""

    values: jax.Array  # [h]
    top: jax.Array
    total: jax.Array

    @classmethod
    def create(cls, size: int) -> WeightedSum:
        """Return the sum of no results."""
        return cls(fill_vector(0.0, size), jnp.float32(-jnp.inf), jnp.float32(0.0))

    def join(self, others: list[WeightedSum]) -> WeightedSum:
        top = functools.reduce(jnp.maximum, (other.top for other in others), self.top)
        shift = jnp.where(top == -jnp.inf, 0.0, top)
        factor = jnp.exp2(self.top - shift)
        values, total = self.values * factor, self.total * factor
        for other in others:
            factor = jnp.exp2(other.top - shift)
            values, total = values + other.values * factor, total + other.total * factor
        return WeightedSum(values, top, total)


@dataclasses.dataclass(frozen=True)
class CombinePlan:
    """How warpgroups divide the results of a row: static, from how many a sequence may have."""

    warpgroups: int
    at_once: int  # loaded before the first of them is used: as many as registers allow

    @classmethod
    def create(cls, grid: SplitKVGrid, size: int) -> CombinePlan:
        plan = grid.plan
        if plan.split is not None:
            splits = plan.most_splits
        else:
            splits = cdiv(plan.used_workers, plan.sequences) + 1
        results = splits * grid.results_per_split
        most = max(4, min(16, 2048 // size))
        at_once = next(n for n in (2, 4, 8, 16) if n >= min(results, most))
        return cls(_MANY if results > 2 * at_once else 1, at_once)


def combine(
    call: AttentionCall, grid: SplitKVGrid, partials: PartialResults, row_starts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32."""
    arrays = {**partials._asdict(), "row_starts": row_starts}
    if call.sinks is not None:
        arrays["sinks"] = call.sinks.astype(jnp.float32)
    size = call.value_head_dim
    shape = (call.batch, call.q_len, call.num_heads)
    # Vectors along the rows of a register tile are multiples of 64.
    wide = round_up(size, ROWS)
    plan = CombinePlan.create(grid, wide)
    out = (
        jax.ShapeDtypeStruct((*shape, wide), call.query.dtype),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    out, lse = make_kernel(
        functools.partial(_combine_body, grid, plan, tuple(arrays)),
        name="axattn_combine",
        out=out,
        scratch=_declare_combine_scratch(plan, wide, call.query.dtype),
        programs=call.batch * call.num_kv_heads * grid.packing.rows,
        warpgroups=plan.warpgroups,
        cost=cost.estimate_combine(
            out, results=partials.lse.shape[0] * grid.packing.rows, size=wide
        ),
        interpret=grid.problem.interpret,
    )(*arrays.values())
    return out[..., :size], lse


def _declare_combine_scratch(plan: CombinePlan, size: int, dtype: Any) -> dict[str, Any]:
    groups = plan.warpgroups
    several = groups > 1
    return {
        "out": declare_row_major((size,), dtype),
        "values": declare_row_major((groups, size), jnp.float32) if several else None,
        "sums": declare_row_major((groups, 2), jnp.float32) if several else None,
        "barrier": plgpu.Barrier(num_arrivals=groups) if several else None,
    }


def _combine_body(
    grid: SplitKVGrid, plan: CombinePlan, names: tuple[str, ...], *refs, **smem
) -> None:
    """Join a row's results: each warpgroup some of them, the first one what all have found."""
    gmem = dict(zip((*names, "out", "out_lse"), refs, strict=True))
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    sequence, row = div(program, grid.packing.rows), rem(program, grid.packing.rows)
    size = gmem["out"].shape[3]
    first, count = (
        number * grid.results_per_split
        for number in StreamK(gmem["row_starts"], grid.plan).find_splits(sequence)
    )
    start, stride = warpgroup * plan.at_once, plan.at_once * plan.warpgroups

    def add_results(i, mean: WeightedSum) -> WeightedSum:
        begin, more = i * stride + start, []
        for j in range(plan.at_once):
            number = first + jnp.minimum(begin + j, count - 1)
            values = load_vector(gmem["values"].at[number, row, pl.ds(0, size)], 0)
            lse = jnp.where(begin + j < count, gmem["lse"][number, row], -jnp.inf)
            more.append(WeightedSum(values, lse, jnp.float32(1.0)))
        return mean.join(more)

    steps = jnp.maximum(div(count - start + (stride - 1), stride), 0)
    mean = lax.fori_loop(0, steps, add_results, WeightedSum.create(size))
    if plan.warpgroups == 1:
        _write_row(grid, gmem, smem["out"], sequence, row, mean)
        return

    smem["values"].at[warpgroup][...] = mean.values
    smem["sums"][warpgroup, jnp.int32(0)] = mean.top
    smem["sums"][warpgroup, jnp.int32(1)] = mean.total
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem["barrier"])

    @pl.when(warpgroup == 0)
    def _():
        plgpu.barrier_wait(smem["barrier"])
        means = [
            WeightedSum(
                load_vector(smem["values"].at[i], 0),
                *(smem["sums"][jnp.int32(i), jnp.int32(j)] for j in range(2)),
            )
            for i in range(plan.warpgroups)
        ]
        mean = WeightedSum.create(size).join(means)
        _write_row(grid, gmem, smem["out"], sequence, row, mean)


def _write_row(
    grid: SplitKVGrid, gmem: Mapping[str, Any], buffer: Any, sequence, row, mean: WeightedSum
) -> None:
    """Add the sink, and write the row and its LSE, in units of the natural logarithm."""
    heads, group = grid.problem.num_kv_heads, grid.packing.group
    batch, kv_head = div(sequence, heads), rem(sequence, heads)
    token, head = div(row, group), kv_head * group + rem(row, group)
    top, total = mean.top, mean.total
    factor: float | jax.Array = 1.0
    if "sinks" in gmem:
        # A sink is a key with its own logit and no value.
        sink = gmem["sinks"][head] * LOG2E
        top = jnp.maximum(mean.top, sink)
        shift = jnp.where(top == -jnp.inf, 0.0, top)
        factor = jnp.exp2(mean.top - shift)
        total = total * factor + jnp.exp2(sink - shift)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, (top + jnp.log2(total)) / LOG2E)
    values = mean.values * (factor / total)
    buffer[...] = values.astype(buffer.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, gmem["out"].at[batch, token, head])
    gmem["out_lse"][batch, token, head] = lse
    plgpu.wait_smem_to_gmem(0)
