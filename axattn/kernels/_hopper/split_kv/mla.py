"""The decode kernel for values that are the first features of their keys (latent attention).

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), absorbed: all query heads read one
key of 576 features per token, of which the first 512 are its value. 64 rows of 512 sums are more
than one warpgroup's registers, so two share them: the first one multiplies queries and keys, does
the softmax and hands its weights over in shared memory; each multiplies them with its half of the
values, which are read once, as the keys that they are part of. While the second one multiplies, the
first one is at the next block.
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

from axattn.kernels._hopper import dequantize, primitives, softmax
from axattn.kernels._hopper.pipeline import Ring
from axattn.kernels._hopper.rows import ROWS
from axattn.kernels._hopper.scores import Scores, Tiles
from axattn.kernels._hopper.split_kv.block_sizes import WARPGROUPS, LatentTiles
from axattn.kernels._hopper.split_kv.mainloop import Body, Cut, Work, run
from axattn.kernels._hopper.split_kv.stream_k import Part

# Rows of a small buffer.
_VECTORS = {"decay": 0, "share": 1}


def decode(call, tiles: LatentTiles, *, workers: int, interpret: bool = False):
    """Output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32.

    ``workers``: blocks of threads that fit the chip at a time.
    """
    # Rows in whole tiles: registers are written to HBM as they are.
    body = Body("axattn_latent_decode", _scratch, _compute, 1, lambda packing: packing.tiles * ROWS)
    return run(call, tiles, body, workers=workers, interpret=interpret)


def _scratch(cut: Cut, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Shared memory of a block of threads, and its barriers."""
    problem, source, keys, stages = cut.problem, cut.source, cut.block_kv, cut.tiles.stages
    dtype = jnp.dtype(problem.dtype)
    query = primitives.swizzled((1, ROWS, problem.head_dim), dtype, keys)
    operand = (
        primitives.swizzled((1, keys, problem.head_dim), dtype, keys) if source.scaled else None
    )
    weights = primitives.swizzled((1, ROWS, keys), dtype, keys)
    return {
        "query": Ring.scratch(1, query, consumers=1),
        "key": source.ring(stages, keys, problem.head_dim, consumers=WARPGROUPS),
        "value": None,
        "bias": cut.buffer("bias", arrays, stages),
        "allowed": cut.buffer("allowed", arrays, stages),
        "operand": operand,
        # Both are at the same block of keys, where they convert it together.
        "together": plgpu.Barrier(num_arrivals=WARPGROUPS) if source.scaled else None,
        # From the first to the second: per block the weights and the decay of what came before,
        # per part what the sums are to be multiplied with.
        "handed": Ring.scratch(1, weights, consumers=1),
        "share": Ring.scratch(1, None, consumers=1),
        "vectors": primitives.flat((len(_VECTORS), ROWS), jnp.float32),
    }


def _compute(work: Work) -> None:
    # The branches lie around the walk, not in it: the compiler then has no spills.
    @pl.when(work.warpgroup == 0)
    def _():
        steps = work.each_part(_lead)
        work.smem["handed"].drain(steps)
        work.smem["share"].drain(work.share.parts)

    @pl.when(work.warpgroup == 1)
    def _():
        work.each_part(_follow)


def _half(work: Work, which: int) -> range:
    size = work.cut.problem.value_head_dim // WARPGROUPS
    return range(which * size, (which + 1) * size)


def _columns(columns: range):
    return pl.ds(columns.start, len(columns))


# ---- the warpgroup with the scores --------------------------------------------------------------


def _lead(work: Work, part: Part) -> None:
    cut, smem = work.cut, work.smem
    shape = (ROWS, cut.block_kv)
    scores = Scores.of_full_blocks(cut.problem, work.gmem, work.rows(part), shape, q_axis=0)
    smem["query"].wait(part.index)
    full = jnp.clip(part.visits.full - part.first, 0, part.count)
    half = len(_half(work, 0))
    state = softmax.State.empty(half)

    step = functools.partial(_lead_step, work, part, scores, partial=False)
    state = lax.fori_loop(0, full, step, state)
    if cut.masked:
        step = functools.partial(_lead_step, work, part, scores.with_bounds(), partial=True)
        state = lax.fori_loop(full, part.count, step, state)
    smem["query"].release(part.index)

    empty = state.total == 0.0
    total = jnp.where(empty, 1.0, state.total)
    share = 1.0 / total
    smem["share"].acquire(part.index)
    _vector(work, "share")[...] = share
    plgpu.commit_smem()
    smem["share"].fill(part.index)
    rows = pl.ds(work.tile * ROWS, ROWS)
    work.gmem["lse"].at[part.number, rows][...] = jnp.where(
        empty, -jnp.inf, state.top + jnp.log2(total)
    )
    _write(work, part, state.values, share, _half(work, 0))


def _lead_step(work: Work, part: Part, scores: Scores, i, state, *, partial: bool):
    cut, smem, n = work.cut, work.smem, part.base + i
    kv_slot = part.visits.block(part.first + i) * cut.block_kv
    key = _operand(work, part, n, kv_slot, 0, partial=partial)
    query = smem["query"].at(_zero())
    dots = primitives.product(query, primitives.transposed(key))
    tiles = Tiles.wait(smem, n, pl.ds(0, ROWS))
    scales = cut.source.loaders(smem, n, cut.block_kv)
    new = softmax.update(
        scores, state.top, state.total, dots, kv_slot, tiles, scales, partial=partial
    )
    Tiles.release(smem, n)
    weights, decay, top, total = lax.optimization_barrier(
        (new.weights.astype(cut.problem.dtype), new.decay, new.top, new.total)
    )
    _clean(work, part, key, kv_slot, 0, partial=partial)
    smem["handed"].acquire(n)
    smem["handed"].at(_zero())[...] = weights
    _vector(work, "decay")[...] = decay
    plgpu.commit_smem()
    smem["handed"].fill(n)
    values = state.values * primitives.spread(decay, state.values.shape, 0)
    values = primitives.add_product(
        values, weights, key.at[:, _columns(_half(work, 0))], interpret=cut.problem.interpret
    )
    smem["key"].release(n)
    return softmax.State(values, top, total)


# ---- the other one ------------------------------------------------------------------------------


def _follow(work: Work, part: Part) -> None:
    cut, smem = work.cut, work.smem
    full = jnp.clip(part.visits.full - part.first, 0, part.count)
    columns = _half(work, 1)
    values = primitives.zeros((ROWS, len(columns)))

    def step(i, values, partial):
        n = part.base + i
        kv_slot = part.visits.block(part.first + i) * cut.block_kv
        key = _operand(work, part, n, kv_slot, 1, partial=partial)
        handed = smem["handed"].wait(n)
        _clean(work, part, key, kv_slot, 1, partial=partial)
        if partial:
            plgpu.commit_smem()
        decay = primitives.load_vector(_vector(work, "decay"), 0)
        values = values * primitives.spread(decay, values.shape, 0)
        values = primitives.add_product(
            values, handed, key.at[:, _columns(columns)], interpret=cut.problem.interpret
        )
        smem["handed"].release(n)
        smem["key"].release(n)
        return values

    values = lax.fori_loop(0, full, functools.partial(step, partial=False), values)
    if cut.masked:
        values = lax.fori_loop(full, part.count, functools.partial(step, partial=True), values)
    smem["share"].wait(part.index)
    share = primitives.load_vector(_vector(work, "share"), 0)
    smem["share"].release(part.index)
    _write(work, part, values, share, columns)


def _zero() -> jax.Array:
    """The index of the only buffer, anew in every step: what it leads to need not be kept."""
    return primitives.unknown(jnp.int32(0))


# ---- what both do -------------------------------------------------------------------------------


def _operand(work: Work, part: Part, n, kv_slot, which: int, *, partial: bool):
    """The keys of step ``n`` for the tensor core."""
    cut, smem = work.cut, work.smem
    block = smem["key"].wait(n)
    if not cut.source.scaled:
        return block.numbers
    used = _used(work, part, kv_slot, codes=True) if partial else None
    operand, size = smem["operand"].at[_zero()], cut.problem.head_dim
    primitives.meet(smem["together"])  # the block before this one is done with
    columns = dequantize.shares(size, WARPGROUPS)[which]
    dequantize.converted(block.numbers, operand, columns, used)
    plgpu.commit_smem()
    primitives.meet(smem["together"])
    return operand


def _vector(work: Work, name: str) -> Any:
    return work.smem["vectors"].at[_VECTORS[name]]


def _used(work: Work, part: Part, kv_slot, *, codes: bool) -> jax.Array | None:
    if not work.cut.source.has_nan:
        return None
    return dequantize.used_slots(work.gmem, part.batch, kv_slot, work.cut.block_kv, codes=codes)


def _clean(work: Work, part: Part, key: Any, kv_slot, which: int, *, partial: bool) -> None:
    """Zeros in unused slots of this warpgroup's half of the values; the keys have been read."""
    if not partial or work.cut.source.scaled:
        return
    used = _used(work, part, kv_slot, codes=False)
    if used is not None:
        dequantize.cleaned(key, used, _half(work, which))


def _write(work: Work, part: Part, values: jax.Array, share: jax.Array, columns: range) -> None:
    # Else the addresses would be known, and kept, before the loops.
    rows = pl.ds(primitives.unknown(work.tile) * ROWS, ROWS)
    values = values * primitives.spread(share, values.shape, 0)
    work.gmem["values"].at[primitives.unknown(part.number), rows, _columns(columns)][...] = values
