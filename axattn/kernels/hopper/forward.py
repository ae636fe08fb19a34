"""The forward kernel: online softmax over the blocks that a tile of query rows visits.

Dao, arXiv 2307.08691; Shah et al., arXiv 2407.08608 (a producer warpgroup that keeps the memory
busy, and two others that take turns at the tensor core and at the exponentials).
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

from axattn.kernels.hopper import device, visits
from axattn.kernels.hopper.operands import Operands
from axattn.kernels.hopper.pipeline import Ring
from axattn.kernels.hopper.problem import LOG2E, ROWS, Problem
from axattn.kernels.hopper.scores import Scores, Tiles, head_vector
from axattn.kernels.hopper.tiles import ForwardTiles
from axattn.kernels.hopper.work import Cut, Work, run

LN2 = 1.0 / LOG2E

# Vectors over rows, which packing rearranges.
_ROW_VECTORS = ("low", "high", "q_positions", "q_segments")


class _State(NamedTuple):
    """Online softmax of a warpgroup's rows, in units of log2."""

    values: jax.Array  # [64, h]
    top: jax.Array  # [64]
    total: jax.Array  # [64]


def forward(
    problem: Problem, operands: Operands, tiles: ForwardTiles
) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32."""
    cut = Cut.of(problem, operands, tiles.block_kv, tiles.warpgroups, packing=True)
    plan = visits.of_queries(operands.call, cut.q_block, cut.block_kv)
    arrays = dict(operands.arrays)
    for name in _ROW_VECTORS:
        if name in arrays:
            arrays[name] = cut.packed(arrays[name])
    arrays.update(plan.arrays())
    dtype = jnp.dtype(problem.dtype)
    shape = (problem.batch, problem.stored_q_len, problem.num_heads, problem.value_head_dim)
    lse_len = cut.num_q * cut.q_block
    out = (
        jax.ShapeDtypeStruct(shape, dtype),
        jax.ShapeDtypeStruct((problem.batch, problem.num_heads, lse_len), jnp.float32),
    )
    out, lse = device.kernel(
        functools.partial(_body, cut, tuple(arrays)),
        name="axattn_forward",
        out=out,
        scratch=_scratch(cut, tiles.stages, arrays),
        work=cut.work,
        warpgroups=cut.warpgroups + 1,
        interpret=problem.interpret,
    )(*arrays.values())
    return out[:, : problem.q_len], lse[:, :, : problem.q_len].swapaxes(1, 2)


def _scratch(cut: Cut, stages: int, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Shared memory of a block of work, and its barriers."""
    problem, groups, keys = cut.problem, cut.warpgroups, cut.block_kv
    dtype = jnp.dtype(problem.dtype)

    def ring(buffer):
        return Ring.scratch(stages, buffer, consumers=groups)

    def extra(name):
        shape = (stages, ROWS * groups, keys)
        return ring(device.flat(shape, arrays[name].dtype)) if name in arrays else None

    own_out = problem.head_dim != problem.value_head_dim
    out = device.swizzled((groups, ROWS, problem.value_head_dim), dtype, ROWS) if own_out else None
    return {
        "query": device.swizzled((groups, ROWS, problem.head_dim), dtype, keys),
        "out": out,
        "lse": device.flat((groups, ROWS), jnp.float32),
        "key": ring(device.swizzled((stages, keys, problem.head_dim), dtype, keys)),
        "value": ring(device.swizzled((stages, keys, problem.value_head_dim), dtype, keys)),
        "bias": extra("bias"),
        "allowed": extra("allowed"),
        "query_full": plgpu.Barrier(num_arrivals=cut.pack, num_barriers=groups),
        "turns": plgpu.Barrier(num_arrivals=groups) if groups == 2 else None,
    }


def _body(cut: Cut, names: tuple[str, ...], *refs, **smem) -> None:
    run(cut, dict(zip((*names, "out", "lse"), refs, strict=True)), smem, _compute)


def _compute(work: Work) -> None:
    cut, plan = work.cut, work.plan
    full = work.own("query_full")
    for member in range(cut.pack):
        place = work.own("query").at[_part(cut, member)]
        plgpu.copy_gmem_to_smem(work.rows_of("query", member), place, full)
    shape = (ROWS, cut.block_kv)
    scores = Scores.of(cut.problem, work.gmem, work.item.rows, shape, q_axis=0)
    turns = device.Turns(work.smem["turns"], cut.warpgroups, work.warpgroup)
    plgpu.barrier_wait(full)

    def step(partial):
        return functools.partial(_step, work, scores, turns, partial=partial)

    state = _State(
        device.zeros((ROWS, cut.problem.value_head_dim)),
        device.per_row(-jnp.inf),
        device.per_row(0.0),
    )
    turns.start()
    state = lax.fori_loop(0, plan.full, step(False), state)
    if cut.masked:
        state = lax.fori_loop(plan.full, plan.total, step(True), state)
    turns.end()
    _finish(work, state)


def _step(
    work: Work, scores: Scores, turns: device.Turns, n, state: _State, *, partial: bool
) -> _State:
    """One block of keys: the scores, the online softmax, and the weighted values."""
    cut, smem = work.cut, work.smem
    key = smem["key"].wait(n)
    query = smem["query"].at[device.unknown(work.warpgroup)]
    dots = device.product(query, device.transposed(key), then=turns.take)
    smem["key"].release(n)

    values, weights, top, total = lax.optimization_barrier(
        _softmax(work, scores, n, state, dots, partial=partial)
    )
    # Not before all of the above is done: the other warpgroup's exponentials are next.
    turns.leave()
    value = smem["value"].wait(n)
    turns.enter()
    interpret = cut.problem.interpret
    values = device.add_product(values, weights, value, interpret=interpret)
    smem["value"].release(n)
    return _State(values, top, total)


def _softmax(work: Work, scores: Scores, n, state: _State, dots: jax.Array, *, partial: bool):
    problem, shape = work.cut.problem, dots.shape
    kv_slot = work.plan.block(n) * shape[1] if partial or scores.reads_keys else None
    tiles = Tiles.wait(work.smem, n, pl.ds(work.warpgroup * ROWS, ROWS))
    factor = 1.0
    if scores.plain:
        factor = problem.scale * LOG2E
    else:
        dots, _ = scores.scores(dots, kv_slot, tiles)
    if partial:
        dots = jnp.where(scores.allowed(kv_slot, tiles), dots, -jnp.inf)
    Tiles.release(work.smem, n)
    top = jnp.maximum(state.top, dots.max(axis=1) * factor)
    # While a row has seen nothing, its maximum is -inf and must not shift.
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp2(dots * factor - device.spread(shift, shape, 0))
    decay = jnp.exp2(state.top - shift)
    total = state.total * decay + weights.sum(axis=1)
    values = state.values * device.spread(decay, state.values.shape, 0)
    kept = scores.kept(kv_slot)
    if kept is not None:
        weights = jnp.where(kept, weights, 0.0)
    return values, weights.astype(problem.dtype), top, total


def _finish(work: Work, state: _State) -> None:
    """Divides by the sums, and writes the rows and their LSE."""
    problem, item = work.cut.problem, work.item
    top, total, scale = state.top, state.total, 1.0
    if "sinks" in work.gmem:
        # A sink is a key with its own logit and no value.
        sink = head_vector(work.gmem["sinks"], item.rows, ROWS) * LOG2E
        top = jnp.maximum(state.top, sink)
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    if "sinks" in work.gmem:
        scale = jnp.exp2(state.top - shift)
        total = total * scale + jnp.exp2(sink - shift)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, shift * LN2 + jnp.log(total))
    share = scale / (total * (1.0 - problem.dropout_rate))
    values = state.values * device.spread(share, state.values.shape, 0)

    out = work.own("query") if work.smem["out"] is None else work.own("out")
    out[...] = values.astype(problem.dtype)
    work.own("lse")[...] = lse
    plgpu.commit_smem()
    if work.cut.pack == 1:
        _write(work, out)
    else:
        pl.when(item.real)(lambda: _write(work, out))


def _write(work: Work, out: Any) -> None:
    for member in range(work.cut.pack):
        part = _part(work.cut, member)
        plgpu.copy_smem_to_gmem(out.at[part], work.rows_of("out", member))
        plgpu.copy_smem_to_gmem(work.own("lse").at[part], work.vector_of("lse", member))
    plgpu.wait_smem_to_gmem(0)


def _part(cut: Cut, member: int):
    """Where one of the heads lies in a warpgroup's rows."""
    return pl.ds(member * cut.slots, cut.slots)
