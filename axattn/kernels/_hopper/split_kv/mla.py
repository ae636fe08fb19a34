"""The decode kernel for values that are the first features of their keys (latent attention).

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), absorbed: all query heads read one
key of 576 features per token, of which the first 512 are its value. 64 rows of 512 sums are more
than one warpgroup's registers, so two share them. The first one multiplies queries and keys, does
the softmax, and hands its weights to the second one through shared memory. Each multiplies them
with its half of the values, which are read once, as the keys that they are part of. While the
second one multiplies, the first one begins the next block.
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

from axattn._call import AttentionCall
from axattn.kernels._hopper import cost
from axattn.kernels._hopper.block_sizes import MLA_WARPGROUPS, MLABlockSizes
from axattn.kernels._hopper.dequantize import (
    convert_codes,
    find_used_slots,
    share_columns,
    zero_unused_rows,
)
from axattn.kernels._hopper.kv_loader import KVLoader
from axattn.kernels._hopper.pipeline import Pipeline
from axattn.kernels._hopper.primitives import (
    ROWS,
    broadcast_vector,
    claim_registers,
    declare_row_major,
    declare_swizzled,
    load_vector,
    make_kernel,
    make_opaque,
    make_zeros,
    multiply,
    multiply_add,
    sync_warpgroups,
    transpose,
)
from axattn.kernels._hopper.scores import ScoreOperands, ScoreTiles
from axattn.kernels._hopper.softmax import OnlineSoftmax, update_softmax
from axattn.kernels._hopper.split_kv.combine import PartialResults, combine
from axattn.kernels._hopper.split_kv.mainloop import (
    SplitKVGrid,
    SplitKVWarpgroup,
    make_split_kv_grid,
    produce_splits,
)
from axattn.kernels._hopper.split_kv.stream_k import KVSplit

# Rows of the buffer "vectors".
_DECAY, _NORMALIZER = 0, 1


def decode_mla(
    call: AttentionCall, sizes: MLABlockSizes, *, workers: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32.

    ``workers``: programs that fit the chip at a time.
    """
    grid, arrays = make_split_kv_grid(
        call, sizes, results_per_split=1, workers=workers, interpret=interpret
    )
    # Rows in whole tiles: registers are written to HBM as they are.
    out = PartialResults.declare(grid, rows=grid.packing.tiles * ROWS)
    scratch = declare_mla_scratch(
        sizes,
        grid.kv,
        call.head_dim,
        call.value_head_dim,
        dtype=grid.problem.dtype,
        score_dtypes=ScoreTiles.select_dtypes(arrays),
    )
    partials = make_kernel(
        functools.partial(_mla_body, grid, tuple(arrays)),
        name="axattn_mla_decode",
        out=tuple(out),
        scratch=scratch,
        programs=grid.programs,
        warpgroups=grid.warpgroups + 1,
        cost=cost.estimate_decode(call, arrays, out),
        interpret=interpret,
    )(*arrays.values())
    return combine(call, grid, PartialResults(*partials), arrays["row_starts"])


def declare_mla_scratch(
    sizes: MLABlockSizes,
    kv: KVLoader,
    head_dim: int,
    value_head_dim: int,
    *,
    dtype: Any,
    score_dtypes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the shared memory and the barriers of a program.

    ``score_dtypes``: dtypes of a bias and a mask over queries and keys, where there are any.
    """
    keys, stages = sizes.block_kv, sizes.stages
    query = declare_swizzled((1, ROWS, head_dim), dtype, keys)
    operand = declare_swizzled((1, keys, head_dim), dtype, keys) if kv.is_quantized else None
    weights = declare_swizzled((1, ROWS, keys), dtype, keys)
    return {
        "query": Pipeline.declare(1, query, consumers=1),
        "key": kv.declare(stages, keys, head_dim, consumers=MLA_WARPGROUPS),
        "value": None,
        **ScoreTiles.declare((stages, ROWS, keys), score_dtypes, consumers=1),
        "operand": operand,
        # Both warpgroups convert one block of keys together.
        "sync": plgpu.Barrier(num_arrivals=MLA_WARPGROUPS) if kv.is_quantized else None,
        # From the first to the second one: per block the weights and the decay of earlier values,
        # per split the factors that normalize the values.
        "handoff": Pipeline.declare(1, weights, consumers=1),
        "result": Pipeline.declare(1, None, consumers=1),
        "vectors": declare_row_major((2, ROWS), jnp.float32),
    }


def _mla_body(grid: SplitKVGrid, names: tuple[str, ...], *refs, **smem) -> None:
    gmem = dict(zip((*names, *PartialResults._fields), refs, strict=True))
    wg = SplitKVWarpgroup.create(grid, gmem, smem)

    @pl.when(wg.warpgroup < grid.warpgroups)
    def _():
        claim_registers(grid.warpgroups, searching=True)

        # Each branch has its own loop over splits: branches within one loop would spill.
        @pl.when(wg.warpgroup == 0)
        def _():
            steps = wg.for_each_split(functools.partial(_consume_scores, wg))
            smem["handoff"].drain(steps)
            smem["result"].drain(wg.share.splits)

        @pl.when(wg.warpgroup == 1)
        def _():
            wg.for_each_split(functools.partial(_consume_weights, wg))

    @pl.when(wg.warpgroup == grid.warpgroups)
    def _():
        claim_registers(grid.warpgroups, producer=True, searching=True)
        produce_splits(wg)


def _consume_scores(wg: SplitKVWarpgroup, split: KVSplit) -> None:
    """Attend to a split as the first warpgroup: scores, softmax, the first half of the values."""
    grid, smem, problem, block_map = wg.grid, wg.smem, wg.grid.problem, split.block_map
    rows, shape, half = wg.locate_rows(split), (ROWS, grid.block_kv), _select_half(wg, 0)
    operands = ScoreOperands(problem, wg.gmem, rows, shape, q_axis=0).load_row_vectors()
    smem["query"].wait(split.index)

    def step(i, state: OnlineSoftmax, *, operands: ScoreOperands, partial: bool):
        n = split.base + i
        kv_slot = block_map.block(split.first + i) * grid.block_kv

        # Queries times keys.
        key = _prepare_mla_key(wg, split, smem["key"].wait(n).numbers, kv_slot, 0, partial=partial)
        dots = multiply(smem["query"].select(_index_first_buffer()), transpose(key))

        # Softmax.
        tiles = ScoreTiles.wait(smem, n, pl.ds(0, ROWS))
        scales = grid.kv.make_scale_loaders(smem, n, grid.block_kv)
        new = update_softmax(operands, state, dots, kv_slot, tiles, scales, partial=partial)
        ScoreTiles.release(smem, n)
        weights, decay, top, total = lax.optimization_barrier(
            (new.weights.astype(problem.dtype), new.decay, new.top, new.total)
        )

        # To the second warpgroup.
        _zero_unused_values(wg, split, key, kv_slot, half, partial=partial)
        smem["handoff"].acquire(n)
        smem["handoff"].select(_index_first_buffer())[...] = weights
        smem["vectors"].at[_DECAY][...] = decay
        plgpu.commit_smem()
        smem["handoff"].commit(n)

        # Weights times values.
        values = state.values * broadcast_vector(decay, state.values.shape, 0)
        values = multiply_add(
            values, weights, key.at[:, _slice_columns(half)], interpret=problem.interpret
        )
        smem["key"].release(n)
        return OnlineSoftmax(values, top, total)

    full = jnp.clip(block_map.full - split.first, 0, split.count)
    state = OnlineSoftmax.create(len(half))
    state = lax.fori_loop(0, full, functools.partial(step, operands=operands, partial=False), state)
    if grid.masked:
        partial_step = functools.partial(step, operands=operands.load_bounds(), partial=True)
        state = lax.fori_loop(full, split.count, partial_step, state)
    smem["query"].release(split.index)

    empty = state.total == 0.0
    total = jnp.where(empty, 1.0, state.total)
    normalizer = 1.0 / total
    smem["result"].acquire(split.index)
    smem["vectors"].at[_NORMALIZER][...] = normalizer
    plgpu.commit_smem()
    smem["result"].commit(split.index)
    lse = wg.gmem["lse"].at[split.number, pl.ds(wg.tile * ROWS, ROWS)]
    lse[...] = jnp.where(empty, -jnp.inf, state.top + jnp.log2(total))
    _write_values(wg, split, state.values, normalizer, half)


def _consume_weights(wg: SplitKVWarpgroup, split: KVSplit) -> None:
    """Sum the other half of the values as the second warpgroup, with the weights of the first."""
    grid, smem, problem, block_map = wg.grid, wg.smem, wg.grid.problem, split.block_map
    half = _select_half(wg, 1)

    def step(i, values: jax.Array, *, partial: bool) -> jax.Array:
        n = split.base + i
        kv_slot = block_map.block(split.first + i) * grid.block_kv
        key = _prepare_mla_key(wg, split, smem["key"].wait(n).numbers, kv_slot, 1, partial=partial)
        weights = smem["handoff"].wait(n)
        _zero_unused_values(wg, split, key, kv_slot, half, partial=partial)
        if partial:
            plgpu.commit_smem()
        decay = load_vector(smem["vectors"].at[_DECAY], 0)
        values = values * broadcast_vector(decay, values.shape, 0)
        values = multiply_add(
            values, weights, key.at[:, _slice_columns(half)], interpret=problem.interpret
        )
        smem["handoff"].release(n)
        smem["key"].release(n)
        return values

    full = jnp.clip(block_map.full - split.first, 0, split.count)
    values = make_zeros((ROWS, len(half)))
    values = lax.fori_loop(0, full, functools.partial(step, partial=False), values)
    if grid.masked:
        values = lax.fori_loop(full, split.count, functools.partial(step, partial=True), values)
    smem["result"].wait(split.index)
    normalizer = load_vector(smem["vectors"].at[_NORMALIZER], 0)
    smem["result"].release(split.index)
    _write_values(wg, split, values, normalizer, half)


def _index_first_buffer() -> jax.Array:
    """Return the index of the only buffer, opaque, so that its descriptors are not kept."""
    return make_opaque(jnp.int32(0))


def _select_half(wg: SplitKVWarpgroup, which: int) -> range:
    """Return the columns of the values that one warpgroup sums."""
    size = wg.grid.problem.value_head_dim // MLA_WARPGROUPS
    return range(which * size, (which + 1) * size)


def _slice_columns(columns: range):
    return pl.ds(columns.start, len(columns))


def _prepare_mla_key(
    wg: SplitKVWarpgroup, split: KVSplit, numbers: Any, kv_slot, which: int, *, partial: bool
) -> Any:
    """Return a block of keys for the tensor core; each warpgroup converts some of its columns."""
    smem = wg.smem
    if not wg.grid.kv.is_quantized:
        return numbers
    used = _find_used(wg, split, kv_slot, codes=True) if partial else None
    operand = smem["operand"].at[_index_first_buffer()]
    sync_warpgroups(smem["sync"])  # both have read the block before this one
    columns = share_columns(wg.grid.problem.head_dim, MLA_WARPGROUPS)[which]
    convert_codes(numbers, operand, columns, used)
    plgpu.commit_smem()
    sync_warpgroups(smem["sync"])
    return operand


def _zero_unused_values(
    wg: SplitKVWarpgroup, split: KVSplit, key: Any, kv_slot, columns: range, *, partial: bool
) -> None:
    """Zero the unused slots of this warpgroup's values, once the scores have read the keys."""
    if not partial or wg.grid.kv.is_quantized:
        return
    used = _find_used(wg, split, kv_slot, codes=False)
    if used is not None:
        zero_unused_rows(key, used, columns)


def _find_used(wg: SplitKVWarpgroup, split: KVSplit, kv_slot, *, codes: bool) -> jax.Array | None:
    if not wg.grid.kv.may_hold_nan:
        return None
    return find_used_slots(wg.gmem, split.batch, kv_slot, wg.grid.block_kv, codes=codes)


def _write_values(
    wg: SplitKVWarpgroup, split: KVSplit, values: jax.Array, normalizer: jax.Array, columns: range
) -> None:
    # Opaque, or the addresses would be computed before the loops, and kept.
    rows = pl.ds(make_opaque(wg.tile) * ROWS, ROWS)
    values = values * broadcast_vector(normalizer, values.shape, 0)
    wg.gmem["values"].at[make_opaque(split.number), rows, _slice_columns(columns)][...] = values
