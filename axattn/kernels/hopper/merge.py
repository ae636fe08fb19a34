"""Joins the parts of a sequence that `decode` worked on apart: the second, small kernel.

out = sum of 2^(lse_i - lse) out_i,   lse = log2 of the sum of 2^lse_i
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from axattn.call import AttentionCall
from axattn.kernels.hopper import device
from axattn.kernels.hopper.device import div, rem
from axattn.kernels.hopper.packed import Packing
from axattn.kernels.hopper.problem import LOG2E, ROWS, Problem, round_up
from axattn.kernels.hopper.schedule import Line

# Parts that are loaded before the first of them is used.
_AT_ONCE = 8


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
    values: jax.Array  # [h]
    top: jax.Array
    total: jax.Array


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
    out = (
        jax.ShapeDtypeStruct((*shape, wide), call.query.dtype),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    out, lse = device.kernel(
        functools.partial(_body, cut, tuple(arrays)),
        name="axattn_merge",
        out=out,
        scratch={"staged": device.flat((wide,), call.query.dtype)},
        work=call.batch * call.num_kv_heads * cut.packing.rows,
        warpgroups=1,
        interpret=cut.problem.interpret,
    )(*arrays.values())
    return out[..., :size], lse


def _body(cut: Any, names: tuple[str, ...], *refs, staged) -> None:
    gmem = dict(zip((*names, "out", "out_lse"), refs, strict=True))
    rows, heads, group = cut.packing.rows, cut.problem.num_kv_heads, cut.packing.group
    index = lax.axis_index("work")
    sequence, row = div(index, rows), rem(index, rows)
    batch, kv_head = div(sequence, heads), rem(sequence, heads)
    token, head = div(row, group), kv_head * group + rem(row, group)
    each = cut.entries
    first, count = (number * each for number in Line(gmem["begin"], cut.shape).parts_of(sequence))
    mean = _Mean(device.per_row(0.0, gmem["out"].shape[3]), jnp.float32(-jnp.inf), jnp.float32(0.0))

    def step(i, mean):
        return _joined(gmem, row, first, i * _AT_ONCE, count, mean)

    mean = lax.fori_loop(0, div(count + (_AT_ONCE - 1), _AT_ONCE), step, mean)
    top, total, factor = mean.top, mean.total, 1.0
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


def _joined(gmem: Mapping[str, Any], row, first, start, count, mean: _Mean) -> _Mean:
    """The mean with up to `_AT_ONCE` more parts."""
    size = mean.values.shape[0]
    lses, values = [], []
    for i in range(_AT_ONCE):
        own = jnp.minimum(start + i, count - 1)
        lse = gmem["lse"][first + own, row]
        lses.append(jnp.where(start + i < count, lse, -jnp.inf))
        values.append(device.load_vector(gmem["values"].at[first + own, row, pl.ds(0, size)], 0))
    top = functools.reduce(jnp.maximum, lses, mean.top)
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    decay = jnp.exp2(mean.top - shift)
    total, joined = mean.total * decay, mean.values * decay
    for lse, value in zip(lses, values, strict=True):
        weight = jnp.exp2(lse - shift)
        total, joined = total + weight, joined + value * weight
    return _Mean(joined, top, total)
