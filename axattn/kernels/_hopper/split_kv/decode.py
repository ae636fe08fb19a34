"""The decode kernel: a few query rows over many keys, as fast as memory gives them.

The consumer warpgroups take blocks of keys in turns, each with an online softmax of its own over
the same rows, so that one waits for memory or converts codes while the other one multiplies.
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
from axattn.kernels._hopper.block_sizes import DecodeBlockSizes
from axattn.kernels._hopper.dequantize import convert_codes, find_used_slots, zero_unused_rows
from axattn.kernels._hopper.kv_loader import KVBlock, KVLoader
from axattn.kernels._hopper.pipeline import Pipeline
from axattn.kernels._hopper.primitives import (
    ROWS,
    broadcast_vector,
    claim_registers,
    declare_row_major,
    declare_swizzled,
    div,
    make_kernel,
    make_opaque,
    multiply,
    multiply_add,
    rem,
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


def decode(
    call: AttentionCall, sizes: DecodeBlockSizes, *, workers: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32.

    ``workers``: programs that fit the chip at a time.
    """
    grid, arrays = make_split_kv_grid(
        call,
        sizes,
        results_per_split=sizes.warpgroups,
        workers=workers,
        interpret=interpret,
    )
    out = PartialResults.declare(grid, rows=grid.packing.stored_rows)
    scratch = declare_decode_scratch(
        sizes,
        grid.kv,
        call.head_dim,
        call.value_head_dim,
        dtype=grid.problem.dtype,
        score_dtypes=ScoreTiles.select_dtypes(arrays),
    )
    partials = make_kernel(
        functools.partial(_decode_body, grid, tuple(arrays)),
        name="axattn_decode",
        out=tuple(out),
        scratch=scratch,
        programs=grid.programs,
        warpgroups=grid.warpgroups + 1,
        cost=cost.estimate_decode(call, arrays, out),
        interpret=interpret,
    )(*arrays.values())
    return combine(call, grid, PartialResults(*partials), arrays["row_starts"])


def declare_decode_scratch(
    sizes: DecodeBlockSizes,
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
    keys, stages, groups = sizes.block_kv, sizes.stages, sizes.warpgroups

    def declare_operand(size):
        return declare_swizzled((groups, keys, size), dtype, keys) if kv.is_quantized else None

    query = declare_swizzled((2, ROWS, head_dim), dtype, keys)
    out = (groups, ROWS, _count_staged_columns(value_head_dim))
    return {
        "query": Pipeline.declare(2, query, consumers=groups),
        "key": kv.declare(stages, keys, head_dim, consumers=1),
        "value": kv.declare(stages, keys, value_head_dim, consumers=1),
        **ScoreTiles.declare((stages, ROWS, keys), score_dtypes, consumers=1),
        "key_operand": declare_operand(head_dim),
        # Operands of one size have one place.
        "value_operand": None if head_dim == value_head_dim else declare_operand(value_head_dim),
        "out": declare_swizzled(out, jnp.float32, ROWS),
        "lse": declare_row_major((groups, ROWS), jnp.float32),
    }


def _count_staged_columns(value_head_dim: int) -> int:
    """Return the columns of a result that go to HBM at a time: large heads leave little room."""
    fitting = (64, 32, 16) if value_head_dim <= 192 else (32, 16)
    return next(n for n in fitting if value_head_dim % n == 0)


def _decode_body(grid: SplitKVGrid, names: tuple[str, ...], *refs, **smem) -> None:
    gmem = dict(zip((*names, *PartialResults._fields), refs, strict=True))
    wg = SplitKVWarpgroup.create(grid, gmem, smem)

    @pl.when(wg.warpgroup < grid.warpgroups)
    def _():
        claim_registers(grid.warpgroups, searching=True)
        wg.for_each_split(functools.partial(_consume_decode, wg))

    @pl.when(wg.warpgroup == grid.warpgroups)
    def _():
        claim_registers(grid.warpgroups, producer=True, searching=True)
        produce_splits(wg)


def _consume_decode(wg: SplitKVWarpgroup, split: KVSplit) -> None:
    """Attend to every n-th block of a split, where there are n consumers, and write the result."""
    grid, smem, kv, problem = wg.grid, wg.smem, wg.grid.kv, wg.grid.problem
    rows, shape = wg.locate_rows(split), (ROWS, grid.block_kv)
    operands = ScoreOperands(problem, wg.gmem, rows, shape, q_axis=0)
    operands = operands.load_row_vectors().load_bounds()
    smem["query"].wait(split.index)

    def step(turn, state: OnlineSoftmax, *, partial: bool) -> OnlineSoftmax:
        n = turn * grid.warpgroups + wg.warpgroup
        block = split.first + n - split.base
        kv_slot = split.block_map.block(block) * grid.block_kv

        # Queries times keys.
        key = _prepare_key(wg, smem["key"].wait(n))
        query = smem["query"].select(rem(make_opaque(split.index), 2))
        dots = multiply(query, transpose(key))
        if not kv.is_quantized:
            smem["key"].release(n)

        # Softmax.
        tiles = ScoreTiles.wait(smem, n, pl.ds(0, ROWS))
        value = smem["value"].wait(n)
        scales = kv.make_scale_loaders(smem, n, grid.block_kv)
        new = update_softmax(operands, state, dots, kv_slot, tiles, scales, partial=partial)
        # Threads have read the codes of the keys, and now their scales, too.
        ScoreTiles.release(smem, n, *(["key"] if kv.is_quantized else []))

        # Weights times values.
        values = state.values * broadcast_vector(new.decay, state.values.shape, 0)
        weights = new.weights.astype(problem.dtype)
        value = _prepare_value(wg, split, value, kv_slot, partial=partial)
        if kv.is_quantized:
            smem["value"].release(n)
        values = multiply_add(values, weights, value, interpret=problem.interpret)
        if not kv.is_quantized:
            smem["value"].release(n)
        return OnlineSoftmax(values, new.top, new.total)

    def count_turns(block):
        """Return how many of this warpgroup's turns come before a block of the split."""
        n = split.base + jnp.clip(block - split.first, 0, split.count)
        return div(n - wg.warpgroup + (grid.warpgroups - 1), grid.warpgroups)

    first, full = count_turns(split.first), count_turns(split.block_map.full)
    last = count_turns(split.first + split.count)
    state = OnlineSoftmax.create(problem.value_head_dim)
    state = lax.fori_loop(first, full, functools.partial(step, partial=False), state)
    if grid.masked:
        state = lax.fori_loop(full, last, functools.partial(step, partial=True), state)
    smem["query"].release(split.index)
    _write_decode(wg, split, state)


def _prepare_key(wg: SplitKVWarpgroup, block: KVBlock) -> Any:
    """Return a block of keys for the tensor core."""
    if not wg.grid.kv.is_quantized:
        return block.numbers
    operand = wg.smem["key_operand"].at[make_opaque(wg.warpgroup)]
    convert_codes(block.numbers, operand, range(wg.grid.problem.head_dim))
    plgpu.commit_smem()
    return operand


def _prepare_value(
    wg: SplitKVWarpgroup, split: KVSplit, block: KVBlock, kv_slot, *, partial: bool
) -> Any:
    """Return a block of values for the tensor core; codes have been read, then."""
    grid, smem, kv, used = wg.grid, wg.smem, wg.grid.kv, None
    columns = range(grid.problem.value_head_dim)
    if partial and kv.may_hold_nan:
        used = find_used_slots(wg.gmem, split.batch, kv_slot, grid.block_kv, codes=kv.is_quantized)
    if kv.is_quantized:
        buffer = smem["key_operand"] if smem["value_operand"] is None else smem["value_operand"]
        operand = buffer.at[make_opaque(wg.warpgroup)]
        convert_codes(block.numbers, operand, columns, used)
        plgpu.commit_smem()
        return operand
    if used is not None:
        zero_unused_rows(block.numbers, used, columns)
        plgpu.commit_smem()
    return block.numbers


def _write_decode(wg: SplitKVWarpgroup, split: KVSplit, state: OnlineSoftmax) -> None:
    """Write the mean of the values that a warpgroup has seen, and the LSE in units of log2."""
    grid, gmem, value_head_dim = wg.grid, wg.gmem, wg.grid.problem.value_head_dim
    width, copied = _count_staged_columns(value_head_dim), grid.packing.copied_rows
    empty = state.total == 0.0
    total = jnp.where(empty, 1.0, state.total)
    values = state.values / broadcast_vector(total, state.values.shape, 0)
    number = split.number * grid.warpgroups + wg.warpgroup
    lse = wg.smem["lse"].at[wg.warpgroup]
    lse[...] = jnp.where(empty, -jnp.inf, state.top + jnp.log2(total))
    out = wg.smem["out"].at[wg.warpgroup]
    rows = pl.ds(wg.tile * ROWS, copied)
    for first in range(0, value_head_dim, width):
        out[...] = values[:, first : first + width]
        plgpu.commit_smem()
        columns = gmem["values"].at[number, rows, pl.ds(first, width)]
        plgpu.copy_smem_to_gmem(out.at[pl.ds(0, copied)], columns)
        if not first:
            plgpu.copy_smem_to_gmem(lse, gmem["lse"].at[number, pl.ds(wg.tile * ROWS, ROWS)])
        # The buffer has been read; what was written, the next kernel finds.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
