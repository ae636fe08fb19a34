"""Joins the parts of a sequence that `decode` worked on apart: the second, small kernel.

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
from axattn.kernels._hopper import cost, primitives
from axattn.kernels._hopper.primitives import div, rem
from axattn.kernels._hopper.rows import ROWS
from axattn.kernels._hopper.split_kv.pack_gqa import Packing
from axattn.kernels._hopper.split_kv.stream_k import Line
from axattn.kernels._problem import LOG2E, Problem, cdiv, round_up

# Warpgroups for a row with results of many parts.
_MANY = 4


class Partials(NamedTuple):
    """Results of parts; a part has as many of them as warpgroups went apart.

    values: float32 [parts, rows, h rounded up to 64]
    lse: float32 [parts, tiles * 64], in units of log2
    """

    values: Any
    lse: Any

    @classmethod
    def structs(cls, parts: int, rows: int, packing: Packing, problem: Problem) -> Partials:
        values = (parts, rows, round_up(problem.value_head_dim, ROWS))
        lse = (parts, packing.tiles * ROWS)
        return cls(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (values, lse)))


class _Mean(NamedTuple):
    """Of some results: the mean of their values, and the two halves of its LSE."""

    values: jax.Array  # [h]
    top: jax.Array
    total: jax.Array

    @classmethod
    def of_none(cls, size: int) -> _Mean:
        return cls(primitives.per_row(0.0, size), jnp.float32(-jnp.inf), jnp.float32(0.0))

    def joined(self, others: list[_Mean]) -> _Mean:
        top = functools.reduce(jnp.maximum, (other.top for other in others), self.top)
        shift = jnp.where(top == -jnp.inf, 0.0, top)
        factor = jnp.exp2(self.top - shift)
        values, total = self.values * factor, self.total * factor
        for other in others:
            factor = jnp.exp2(other.top - shift)
            values, total = values + other.values * factor, total + other.total * factor
        return _Mean(values, top, total)


@dataclasses.dataclass(frozen=True)
class _Load:
    """How the results of a row are shared out: static, from how many there may be of a sequence."""

    warpgroups: int
    at_once: int  # loaded before the first of them is used: as many as registers allow

    @classmethod
    def of(cls, cut: Any, size: int) -> _Load:
        shape = cut.shape
        parts = (
            shape.most_parts if shape.split is not None else cdiv(shape.grid, shape.sequences) + 1
        )
        results = parts * cut.entries
        most = max(4, min(16, 2048 // size))
        at_once = next(n for n in (2, 4, 8, 16) if n >= min(results, most))
        return cls(_MANY if results > 2 * at_once else 1, at_once)


def merge(
    call: AttentionCall, cut: Any, partials: Partials, begin: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32, natural log."""
    arrays = {**partials._asdict(), "begin": begin}
    if call.sinks is not None:
        arrays["sinks"] = call.sinks.astype(jnp.float32)
    size = call.value_head_dim
    shape = (call.batch, call.q_len, call.num_heads)
    # Vectors along the rows of a register tile are multiples of 64.
    wide = round_up(size, ROWS)
    load = _Load.of(cut, wide)
    out = (
        jax.ShapeDtypeStruct((*shape, wide), call.query.dtype),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    out, lse = primitives.kernel(
        functools.partial(_body, cut, load, tuple(arrays)),
        name="axattn_merge",
        out=out,
        scratch=_scratch(load, wide, call.query.dtype),
        work=call.batch * call.num_kv_heads * cut.packing.rows,
        warpgroups=load.warpgroups,
        cost=cost.merge(out, results=partials.lse.shape[0] * cut.packing.rows, size=wide),
        interpret=cut.problem.interpret,
    )(*arrays.values())
    return out[..., :size], lse


def _scratch(load: _Load, size: int, dtype: Any) -> dict[str, Any]:
    groups = load.warpgroups
    return {
        "staged": primitives.flat((size,), dtype),
        "values": primitives.flat((groups, size), jnp.float32) if groups > 1 else None,
        "sums": primitives.flat((groups, 2), jnp.float32) if groups > 1 else None,
        "done": plgpu.Barrier(num_arrivals=groups) if groups > 1 else None,
    }


def _body(cut: Any, load: _Load, names: tuple[str, ...], *refs, **smem) -> None:
    gmem = dict(zip((*names, "out", "out_lse"), refs, strict=True))
    rows = cut.packing.rows
    index, warpgroup = lax.axis_index("work"), lax.axis_index("warpgroup")
    sequence, row = div(index, rows), rem(index, rows)
    first, count = (
        number * cut.entries for number in Line(gmem["begin"], cut.shape).parts_of(sequence)
    )
    stride = load.at_once * load.warpgroups

    def step(i, mean):
        return _with_more(gmem, load, row, first, i * stride + own, count, mean)

    own = warpgroup * load.at_once
    steps = jnp.maximum(div(count - own + (stride - 1), stride), 0)
    mean = lax.fori_loop(0, steps, step, _Mean.of_none(gmem["out"].shape[3]))
    finish = functools.partial(_finish, cut, gmem, smem["staged"], sequence, row)
    if load.warpgroups == 1:
        finish(mean)
        return

    smem["values"].at[warpgroup][...] = mean.values
    smem["sums"][warpgroup, jnp.int32(0)] = mean.top
    smem["sums"][warpgroup, jnp.int32(1)] = mean.total
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem["done"])

    @pl.when(warpgroup == 0)
    def _():
        plgpu.barrier_wait(smem["done"])
        means = [
            _Mean(
                primitives.load_vector(smem["values"].at[i], 0),
                *(smem["sums"][jnp.int32(i), jnp.int32(j)] for j in range(2)),
            )
            for i in range(load.warpgroups)
        ]
        finish(_Mean.of_none(gmem["out"].shape[3]).joined(means))


def _finish(cut: Any, gmem: Mapping[str, Any], staged: Any, sequence, row, mean: _Mean) -> None:
    """Adds the sink, and writes the row and its LSE."""
    heads, group = cut.problem.num_kv_heads, cut.packing.group
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
    staged[...] = values.astype(staged.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, gmem["out"].at[batch, token, head])
    gmem["out_lse"][batch, token, head] = lse
    plgpu.wait_smem_to_gmem(0)


def _with_more(gmem: Mapping[str, Any], load: _Load, row, first, start, count, mean) -> _Mean:
    """The mean with up to ``at_once`` more results."""
    size, found = mean.values.shape[0], []
    for i in range(load.at_once):
        number = first + jnp.minimum(start + i, count - 1)
        values = primitives.load_vector(gmem["values"].at[number, row, pl.ds(0, size)], 0)
        lse = jnp.where(start + i < count, gmem["lse"][number, row], -jnp.inf)
        found.append(_Mean(values, lse, jnp.float32(1.0)))
    return mean.joined(found)
