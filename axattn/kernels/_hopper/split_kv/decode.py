"""The decode kernel: a few query rows over many keys, as fast as memory gives them.

The warpgroups that compute take blocks of keys in turns, each with a softmax of its own over the
same rows, so that one waits for memory or converts codes while the other multiplies.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from axattn.kernels._hopper import dequantize, primitives, softmax
from axattn.kernels._hopper.kv_loader import Block
from axattn.kernels._hopper.memory import staged_columns
from axattn.kernels._hopper.pipeline import Ring
from axattn.kernels._hopper.primitives import div, rem
from axattn.kernels._hopper.rows import ROWS
from axattn.kernels._hopper.scores import Scores, Tiles
from axattn.kernels._hopper.softmax import State
from axattn.kernels._hopper.split_kv.block_sizes import DecodeTiles
from axattn.kernels._hopper.split_kv.mainloop import Body, Cut, Work, run
from axattn.kernels._hopper.split_kv.stream_k import Part


def decode(call, tiles: DecodeTiles, *, workers: int, interpret: bool = False):
    """Output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32.

    ``workers``: blocks of threads that fit the chip at a time.
    """
    body = Body(
        "axattn_decode", _scratch, _compute, tiles.warpgroups, lambda packing: packing.stored_rows
    )
    return run(call, tiles, body, workers=workers, interpret=interpret)


def _scratch(cut: Cut, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Shared memory of a block of threads, and its barriers."""
    problem, source, keys, groups = cut.problem, cut.source, cut.block_kv, cut.warpgroups
    stages = cut.tiles.stages
    dtype = jnp.dtype(problem.dtype)

    def operand(size):
        return primitives.swizzled((groups, keys, size), dtype, keys) if source.scaled else None

    same = problem.head_dim == problem.value_head_dim
    query = primitives.swizzled((2, ROWS, problem.head_dim), dtype, keys)
    return {
        "query": Ring.scratch(2, query, consumers=groups),
        "key": source.ring(stages, keys, problem.head_dim, consumers=1),
        "value": source.ring(stages, keys, problem.value_head_dim, consumers=1),
        "bias": cut.buffer("bias", arrays, stages),
        "allowed": cut.buffer("allowed", arrays, stages),
        "key_operand": operand(problem.head_dim),
        "value_operand": None if same else operand(problem.value_head_dim),
        "out": primitives.swizzled(
            (groups, ROWS, staged_columns(problem.value_head_dim)), jnp.float32, ROWS
        ),
        "lse": primitives.flat((groups, ROWS), jnp.float32),
    }


def _compute(work: Work) -> None:
    work.each_part(_compute_part)


def _compute_part(work: Work, part: Part) -> None:
    cut, groups = work.cut, work.cut.warpgroups
    scores = Scores.of(cut.problem, work.gmem, work.rows(part), (ROWS, cut.block_kv), q_axis=0)
    work.smem["query"].wait(part.index)

    def turns_before(visit):
        """Steps of the ring belong to warpgroups in turns: how many of mine come before a visit."""
        step = part.base + jnp.clip(visit - part.first, 0, part.count)
        return div(step - work.warpgroup + (groups - 1), groups)

    def step(turn, state, partial):
        n = turn * groups + work.warpgroup
        visit = part.first + n - part.base
        return _step(work, part, scores, n, visit, state, partial=partial)

    first, full = turns_before(part.first), turns_before(part.visits.full)
    last = turns_before(part.first + part.count)
    state = State.empty(cut.problem.value_head_dim)
    state = lax.fori_loop(first, full, functools.partial(step, partial=False), state)
    if cut.masked:
        state = lax.fori_loop(full, last, functools.partial(step, partial=True), state)
    work.smem["query"].release(part.index)
    _write(work, part, state)


def _step(
    work: Work, part: Part, scores: Scores, n, visit, state: State, *, partial: bool
) -> State:
    """One block of keys: the scores, the online softmax, and the weighted values."""
    cut, smem = work.cut, work.smem
    kv_slot = part.visits.block(visit) * cut.block_kv
    key = _key_operand(work, smem["key"].wait(n))
    query = smem["query"].at(rem(primitives.unknown(part.index), 2))
    dots = primitives.product(query, primitives.transposed(key))
    if not cut.source.scaled:
        smem["key"].release(n)
    tiles = Tiles.wait(smem, n, pl.ds(0, ROWS))
    value = smem["value"].wait(n)
    scales = cut.source.loaders(smem, n, cut.block_kv)
    new = softmax.update(
        scores, state.top, state.total, dots, kv_slot, tiles, scales, partial=partial
    )
    # Codes of keys have been read, and now their scales, by threads.
    Tiles.release(smem, n, *(["key"] if cut.source.scaled else []))
    values = state.values * primitives.spread(new.decay, state.values.shape, 0)
    weights = new.weights.astype(cut.problem.dtype)
    value = _value_operand(work, part, value, n, kv_slot, partial=partial)
    values = primitives.add_product(values, weights, value, interpret=cut.problem.interpret)
    if not cut.source.scaled:
        smem["value"].release(n)
    return State(values, new.top, new.total)


def _key_operand(work: Work, block: Block) -> Any:
    """A block of keys for the tensor core."""
    if not work.cut.source.scaled:
        return block.numbers
    operand = work.smem["key_operand"].at[primitives.unknown(work.warpgroup)]
    dequantize.converted(block.numbers, operand, range(work.cut.problem.head_dim))
    plgpu.commit_smem()
    return operand


def _value_operand(work: Work, part: Part, block: Block, n, kv_slot, *, partial: bool) -> Any:
    """A block of values for the tensor core; codes are done with, then."""
    cut, columns, used = work.cut, range(work.cut.problem.value_head_dim), None
    source = cut.source
    if partial and source.has_nan:
        used = dequantize.used_slots(
            work.gmem, part.batch, kv_slot, cut.block_kv, codes=source.scaled
        )
    if source.scaled:
        buffer = work.smem["value_operand"]
        buffer = work.smem["key_operand"] if buffer is None else buffer
        operand = buffer.at[primitives.unknown(work.warpgroup)]
        dequantize.converted(block.numbers, operand, columns, used)
        plgpu.commit_smem()
        work.smem["value"].release(n)
        return operand
    if used is not None:
        dequantize.cleaned(block.numbers, used, columns)
        plgpu.commit_smem()
    return block.numbers


def _write(work: Work, part: Part, state: State) -> None:
    """A warpgroup's share of a part: the mean of the values, and the LSE in units of log2."""
    cut, width = work.cut, staged_columns(work.cut.problem.value_head_dim)
    empty = state.total == 0.0
    total = jnp.where(empty, 1.0, state.total)
    values = state.values / primitives.spread(total, state.values.shape, 0)
    number = part.number * cut.warpgroups + work.warpgroup
    lse = work.smem["lse"].at[work.warpgroup]
    lse[...] = jnp.where(empty, -jnp.inf, state.top + jnp.log2(total))
    out = work.smem["out"].at[work.warpgroup]
    rows = pl.ds(work.tile * ROWS, cut.packing.copied_rows)
    for first in range(0, cut.problem.value_head_dim, width):
        out[...] = values[:, first : first + width]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            out.at[pl.ds(0, cut.packing.copied_rows)],
            work.gmem["values"].at[number, rows, pl.ds(first, width)],
        )
        if not first:
            plgpu.copy_smem_to_gmem(lse, work.gmem["lse"].at[number, pl.ds(work.tile * ROWS, ROWS)])
        # Read is enough: the next kernel finds what was written.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
