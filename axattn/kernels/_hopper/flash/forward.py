"""The forward kernel: online softmax over the blocks that a tile of query rows visits.

Dao, arXiv 2307.08691; Shah et al., arXiv 2407.08608 (a producer warpgroup that keeps the memory
busy, and two others that take turns at the tensor core and at the exponentials).
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
from axattn.kernels._hopper import cost, dequantize, primitives, softmax
from axattn.kernels._hopper.block_sizes import ForwardTiles
from axattn.kernels._hopper.flash.grid import Cut, Work, run
from axattn.kernels._hopper.kv_loader import Block
from axattn.kernels._hopper.operands import Operands
from axattn.kernels._hopper.pipeline import Ring
from axattn.kernels._hopper.rows import ROWS, stored_length
from axattn.kernels._hopper.scores import Scores, Tiles, head_vector
from axattn.kernels._hopper.softmax import State
from axattn.kernels._problem import LOG2E, Problem

LN2 = 1.0 / LOG2E

# Vectors over rows, which packing rearranges.
_ROW_VECTORS = ("low", "high", "q_positions", "q_segments")


def forward(
    problem: Problem, operands: Operands, tiles: ForwardTiles
) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32."""
    cut = Cut.of(problem, operands, tiles.block_kv, tiles.warpgroups, packing=True)
    plan = _block_map.of_queries(operands.call, cut.q_block, cut.block_kv)
    arrays = dict(operands.arrays)
    for name in _ROW_VECTORS:
        if name in arrays:
            arrays[name] = cut.packed(arrays[name])
    arrays.update(plan.arrays())
    dtype = jnp.dtype(problem.dtype)
    shape = (problem.batch, stored_length(problem.q_len), problem.num_heads, problem.value_head_dim)
    lse_len = cut.num_q * cut.q_block
    out = (
        jax.ShapeDtypeStruct(shape, dtype),
        jax.ShapeDtypeStruct((problem.batch, problem.num_heads, lse_len), jnp.float32),
    )
    out, lse = primitives.kernel(
        functools.partial(_body, cut, tuple(arrays)),
        name="axattn_forward",
        out=out,
        scratch=_scratch(cut, tiles.stages, arrays),
        work=cut.work,
        warpgroups=cut.warpgroups + 1,
        cost=cost.forward(operands.call, arrays, out, (cut.q_block, cut.block_kv)),
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
        return ring(primitives.flat(shape, arrays[name].dtype)) if name in arrays else None

    source = cut.source

    def operand(size):
        return primitives.swizzled((1, keys, size), dtype, keys) if source.scaled else None

    own_out = problem.head_dim != problem.value_head_dim
    out = (
        primitives.swizzled((groups, ROWS, problem.value_head_dim), dtype, ROWS)
        if own_out
        else None
    )
    return {
        "query": primitives.swizzled((groups, ROWS, problem.head_dim), dtype, keys),
        "out": out,
        "lse": primitives.flat((groups, ROWS), jnp.float32),
        "key": source.ring(stages, keys, problem.head_dim, consumers=groups),
        "value": source.ring(stages, keys, problem.value_head_dim, consumers=groups),
        "key_operand": operand(problem.head_dim),
        "value_operand": operand(problem.value_head_dim),
        "bias": extra("bias"),
        "allowed": extra("allowed"),
        "query_full": plgpu.Barrier(num_arrivals=cut.pack, num_barriers=groups),
        # Warpgroups that prepare blocks together cannot take turns at them.
        "turns": plgpu.Barrier(num_arrivals=groups) if groups == 2 and not cut.meets else None,
        "together": plgpu.Barrier(num_arrivals=groups) if cut.meets else None,
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
    turns = primitives.Turns(work.smem["turns"], cut.warpgroups, work.warpgroup)
    plgpu.barrier_wait(full)

    def step(partial):
        return functools.partial(_step, work, scores, turns, partial=partial)

    state = State.empty(cut.problem.value_head_dim)
    turns.start()
    state = lax.fori_loop(0, plan.full, step(False), state)
    if cut.masked:
        state = lax.fori_loop(plan.full, plan.total, step(True), state)
    turns.end()
    _finish(work, state)


def _step(
    work: Work, scores: Scores, turns: primitives.Turns, n, state: State, *, partial: bool
) -> State:
    """One block of keys: the scores, the online softmax, and the weighted values."""
    cut, smem = work.cut, work.smem
    scaled = cut.source.scaled
    key = _operand(work, "key", smem["key"].wait(n), n, partial=False)
    query = smem["query"].at[primitives.unknown(work.warpgroup)]
    dots = primitives.product(query, primitives.transposed(key), then=turns.take)
    # The scales come with the codes, and are needed for as long as the softmax takes.
    block = smem["value"].wait(n) if scaled else smem["key"].release(n)

    values, weights, top, total = lax.optimization_barrier(
        _softmax(work, scores, n, state, dots, partial=partial)
    )
    # By the program after the exponentials. ptxas arrives before them (`device.Turns`): products
    # alternate all the same, but the exponentials of the two warpgroups may overlap.
    turns.leave()
    block = block if scaled else smem["value"].wait(n)
    value = _operand(work, "value", block, n, partial=partial)
    turns.enter()
    interpret = cut.problem.interpret
    values = primitives.add_product(values, weights, value, interpret=interpret)
    smem["value"].release(n)
    if scaled:
        smem["key"].release(n)
    return State(values, top, total)


def _operand(work: Work, name: str, block: Block, n, *, partial: bool) -> Any:
    """The keys or values of step ``n`` for the tensor core.

    The warpgroups share a block of a cache: each prepares some of its columns for all.
    """
    cut, smem = work.cut, work.smem
    source, numbers = cut.source, block.numbers
    # Keys need no zeros: what they would stop is masked in the scores.
    clean = source.has_nan and partial and name == "value"
    if not cut.meets or not (source.scaled or clean):
        return numbers
    used = None
    if clean:
        slot = work.plan.block(n) * cut.block_kv
        used = dequantize.used_slots(
            work.gmem, work.item.batch, slot, cut.block_kv, codes=source.scaled
        )
    operand = numbers
    if source.scaled:
        operand = smem[f"{name}_operand"].at[primitives.unknown(jnp.int32(0))]
        work.meet()  # the block before this one is done with
    for warpgroup, columns in enumerate(dequantize.shares(operand.shape[1], cut.warpgroups)):

        @pl.when(work.warpgroup == warpgroup)
        def _(columns=columns):
            if source.scaled:
                dequantize.converted(numbers, operand, columns, used)
            else:
                dequantize.cleaned(operand, present(used), columns)

    plgpu.commit_smem()
    work.meet()
    return operand


def _softmax(work: Work, scores: Scores, n, state: State, dots: jax.Array, *, partial: bool):
    kv_slot = work.plan.block(n) * dots.shape[1] if partial or scores.reads_keys else None
    tiles = Tiles.wait(work.smem, n, pl.ds(work.warpgroup * ROWS, ROWS))
    scales = work.cut.source.loaders(work.smem, n, work.cut.block_kv)
    new = softmax.update(
        scores, state.top, state.total, dots, kv_slot, tiles, scales, partial=partial
    )
    Tiles.release(work.smem, n)
    values = state.values * primitives.spread(new.decay, state.values.shape, 0)
    return values, new.weights.astype(work.cut.problem.dtype), new.top, new.total


def _finish(work: Work, state: State) -> None:
    """Divides by the sums, and writes the rows and their LSE."""
    problem, item = work.cut.problem, work.item
    top, total = state.top, state.total
    scale: float | jax.Array = 1.0
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
    values = state.values * primitives.spread(share, state.values.shape, 0)

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
