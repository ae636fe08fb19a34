"""Attention over a cache: decode steps, latent ones, and prompts over what is stored.

The cache stays in place. A step reads the blocks of its row, through the block table if there is
one, all key/value heads at a time, each once for all query heads of its group (Shazeer, arXiv
1911.02150), and takes the softmax online (Milakov & Gimelshein, arXiv 1805.02867). While one block
is computed, the next one is copied, even if it belongs to another row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from axattn._call import AttentionCall
from axattn._jax_compat import make_result_shape
from axattn.kernels import _cost, _masks
from axattn.kernels._scores import (
    ScoreComputer,
    SoftmaxState,
    add_softmax_block,
    choose_precision,
    finish_softmax,
)
from axattn.kernels._tpu.cached import operands
from axattn.kernels._tpu.cached.blocks import declare_memory
from axattn.kernels._tpu.cached.copies import BlockCopies, CachedBlock
from axattn.kernels._tpu.cached.dequantize import decode_numbers, may_be_nan
from axattn.kernels._tpu.cached.grid import (
    CachedBlockSizes,
    CachedGrid,
    CachedScalars,
    make_cached_grid,
    make_scalars,
)
from axattn.kernels._tpu.cached.tile import CachedTile, transpose_to_lanes, transpose_to_rows


def attend_over_cache(
    call: AttentionCall, sizes: CachedBlockSizes, *, cores: int = 1, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Return the output ``[B, T, N, h]`` in the query's dtype and the float32 LSE ``[B, T, N]``.

    ``cores`` share the work of one call: 2 on chips with two cores in one device.
    """
    call = _masks.fold_key_masks(call)
    grid = make_cached_grid(call, sizes, cores)
    out, lse = _call_kernel(call, grid, sizes.vmem_limit, interpret)
    out = operands.restore_queries(grid, out)
    lse = operands.restore_queries(grid, jnp.swapaxes(lse, 3, 4)[..., 0])
    return (out, lse) if grid.num_splits == 1 else _combine_splits(call, grid, out, lse)


def _call_kernel(
    call: AttentionCall, grid: CachedGrid, vmem_limit: int | None, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Return ``[results, K, tiles, rows, h]`` and ``[results, K, tiles, 1, row_lanes]``."""
    query = operands.lay_out_queries(call, grid)
    bounds = _masks.compute_row_bounds(call)
    inputs = {"query": query} | operands.make_row_vectors(call, grid, bounds)
    sources = operands.make_sources(call, grid)
    memory = declare_memory(call, grid)
    assert _list_dtypes(inputs) == _list_dtypes(memory.inputs)
    assert _list_dtypes(sources) == _list_dtypes(memory.buffers)
    shape = (grid.num_results, grid.kv_heads, grid.num_tiles)
    outputs = [
        make_result_shape(query, (*shape, *block.shape[3:]), block.dtype)
        for block in memory.outputs.values()
    ]
    vectors = tuple(memory.inputs)[1:]
    return pl.pallas_call(
        functools.partial(_run_step, grid, call.precision, vectors, tuple(sources)),
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(CachedScalars._fields),
            grid=grid.shape,
            in_specs=[_make_spec(grid, memory.inputs[name], x) for name, x in inputs.items()]
            + [pl.BlockSpec(memory_space=pl.ANY)] * len(sources),
            out_specs=[
                _make_spec(grid, block, x)
                for block, x in zip(memory.outputs.values(), outputs, strict=True)
            ],
            scratch_shapes=[
                *memory.buffers.values(),
                pltpu.SemaphoreType.DMA((2, len(sources))),
                pltpu.SMEM((1,), jnp.int32),  # blocks computed so far: which buffer is next
                *memory.scratch.values(),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit,
        ),
        cost_estimate=_cost.estimate_all_keys(call),
        interpret=interpret,
        name="axattn_cached",
    )(*make_scalars(call, grid, bounds), *inputs.values(), *sources.values())


def _list_dtypes(arrays: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, jnp.dtype(array.dtype)) for name, array in arrays.items()]


def _make_spec(grid: CachedGrid, block: jax.ShapeDtypeStruct, array: Any) -> pl.BlockSpec:
    """Return the block of a tile of ``[results or B or 1, K or 1, tiles, ...]``, all heads."""
    rows = array.shape[0]

    def index_map(core, i, tile, *_):
        result, tile = grid.locate_tile(core, i, tile)
        if rows == 1:
            return 0, 0, tile, 0, 0
        row = result if rows == grid.num_results else result // grid.num_splits
        return row, 0, tile, 0, 0

    return pl.BlockSpec(block.shape, index_map)


def _combine_splits(call: AttentionCall, grid: CachedGrid, out, lse) -> tuple[jax.Array, jax.Array]:
    """Combine the splits of each batch row by their LSE."""
    out = out.reshape(-1, grid.num_splits, *out.shape[1:])
    lse = lse.reshape(-1, grid.num_splits, *lse.shape[1:])
    top = lse.max(1, keepdims=True)
    share = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = share.sum(1)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = (out * share[..., None]).sum(1) / total[..., None]
    lse = jnp.where(empty, -jnp.inf, top[:, 0] + jnp.log(total))
    return out.astype(call.query.dtype), lse


# ---- the kernel -------------------------------------------------------------------------------


class CachedRefs(NamedTuple):
    """The refs of a step."""

    scalars: CachedScalars
    query: Any
    vectors: Mapping[str, Any]
    out: Any
    lse: Any
    turns: Any  # [1]
    sums: Any  # [K, rows, h]
    state: Any  # [K, rows, 2]


def _run_step(grid: CachedGrid, precision: Any, vectors, sources, *arguments) -> None:
    """Give names to the refs and run the kernel."""
    remaining = iter(arguments)

    def take(names):
        return {name: next(remaining) for name in names}

    scalars, query = CachedScalars(**take(CachedScalars._fields)), next(remaining)
    vectors, hbm, out, lse = take(vectors), take(sources), next(remaining), next(remaining)
    buffers, (semaphores, turns, sums, state) = take(sources), remaining
    copies = BlockCopies(grid, scalars, hbm, buffers, semaphores)
    refs = CachedRefs(scalars, query, vectors, out, lse, turns, sums, state)
    _attend_tile(grid, precision, refs, copies)


def _attend_tile(grid: CachedGrid, precision: Any, refs: CachedRefs, copies: BlockCopies) -> None:
    """Attend from a tile of queries to all its blocks; copy one block while computing another."""
    core, i, tile = (pl.program_id(axis) for axis in range(3))
    result = core * grid.results_per_core + i
    step = result * grid.num_tiles + tile
    split = lax.rem(result, jnp.int32(grid.num_splits))
    spans, next_steps = refs.scalars.spans, refs.scalars.next_steps

    def locate_block(of_step, n) -> CachedBlock:
        """Return block ``n`` of a step."""
        batch = lax.div(of_step, jnp.int32(grid.num_tiles * grid.num_splits))
        tile = lax.rem(of_step, jnp.int32(grid.num_tiles))
        return CachedBlock(batch, tile, spans[of_step * 4] + n)

    @pl.when((i == 0) & (tile == 0))
    def _():
        refs.turns[0] = 0
        first = next_steps[grid.num_results * grid.num_tiles + core]
        pl.when(first >= 0)(lambda: copies.start(locate_block(first, 0), 0))

    @pl.when(result < grid.num_results)
    def _():
        _start_cached_softmax(grid, refs, split)
        total, turn = spans[step * 4 + 3], refs.turns[0]

        def attend_to_block(n, _):
            buffer = (turn + n) & 1

            has_more = n + 1 < total
            next_step = jnp.where(has_more, step, next_steps[step])
            next_block = locate_block(jnp.maximum(next_step, 0), jnp.where(has_more, n + 1, 0))
            pl.when(next_step >= 0)(lambda: copies.start(next_block, 1 - buffer))

            at = locate_block(step, n)
            copies.wait(at, buffer)
            add = functools.partial(_add_block, grid, precision, refs, copies, at, buffer)
            is_full = (n >= spans[step * 4 + 1]) & (n < spans[step * 4 + 2])
            pl.when(is_full)(lambda: add(partial=False))
            pl.when(jnp.logical_not(is_full))(lambda: add(partial=True))

        lax.fori_loop(0, total, attend_to_block, None)
        refs.turns[0] = turn + total

        @_run_on_heads(grid)
        def _(head):
            heads = pl.ds(head, grid.heads_per_product)
            factor, lse = finish_softmax(
                SoftmaxState(refs.state[heads, :, 0:1], refs.state[heads, :, 1:2])
            )
            refs.out[0, heads, 0] = (refs.sums[heads] * factor).astype(refs.out.dtype)
            refs.lse[0, heads, 0, :, pl.ds(0, grid.rows)] = transpose_to_lanes(lse)


def _start_cached_softmax(grid: CachedGrid, refs: CachedRefs, split) -> None:
    refs.sums[...] = jnp.zeros_like(refs.sums)
    shape = (*refs.state.shape[:2], 1)
    top, total = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
    if "sinks" in refs.vectors:
        # A sink is a key with its own logit and no value: the softmax (of one split) starts there.
        sinks = transpose_to_rows(refs.vectors["sinks"][0, :, 0], grid.rows)
        if grid.num_splits > 1:
            sinks = jnp.where(split == 0, sinks, -jnp.inf)
        top = jnp.broadcast_to(sinks, top.shape)
        total = jnp.where(top == -jnp.inf, 0.0, 1.0)
    refs.state[:, :, 0:1] = top
    refs.state[:, :, 1:2] = total


def _add_block(
    grid: CachedGrid,
    precision: Any,
    refs: CachedRefs,
    copies: BlockCopies,
    at: CachedBlock,
    buffer: Any,
    *,
    partial: bool,
) -> None:
    """Add a block of keys, which is in VMEM, to the output."""

    def load(name, head):
        codes = copies.buffers[name][buffer, pl.ds(head, grid.heads_per_product)]
        return decode_numbers(codes, grid.stored_dtype, grid.problem.dtype)

    @_run_on_heads(grid)
    def _(head):
        heads = pl.ds(head, grid.heads_per_product)
        start, end = at.block * grid.block_kv, refs.scalars.ends[at.batch]
        tile = CachedTile(grid, refs.vectors, copies.buffers, buffer, start, head)
        block = ScoreComputer(grid.problem, tile)

        keys = load("keys", head)
        key_axis = 1 if "keys" in grid.slots_last else 2
        dots = _multiply(refs.query[0, heads, 0], keys, key_axis, precision)
        if tile.has("key_scales"):
            dots = dots * tile.load_keys("key_scales")
        scores, _ = block.compute(dots)
        if partial:
            allowed = block.compute_mask()
            scores = jnp.where(allowed, scores, -jnp.inf)
        state = SoftmaxState(refs.state[heads, :, 0:1], refs.state[heads, :, 1:2])
        weights, decay, state = add_softmax_block(scores, state, 2)
        refs.state[heads, :, 0:1], refs.state[heads, :, 1:2] = state

        # Latent attention has its values in the first features of the keys.
        name, scales = ("values", "value_scales") if tile.has("values") else ("keys", "key_scales")
        slot_axis, size = 2 if name in grid.slots_last else 1, grid.problem.value_head_dim
        if name == "values":
            values = load("values", head)
        else:
            values = keys[:, :size] if slot_axis == 2 else keys[:, :, :size]
        if partial and may_be_nan(grid.stored_dtype):
            used = tile.find_used_slots(end, slot_axis)
            values = jnp.where(used, values, jnp.zeros((), values.dtype))
        if tile.has(scales):
            weights = weights * tile.load_keys(scales)
            if partial:  # the scale of an unused slot may be NaN
                weights = jnp.where(allowed, weights, 0.0)
        product = _multiply(weights.astype(values.dtype), values, slot_axis, precision)
        refs.sums[heads] = refs.sums[heads] * decay + product


def _multiply(a: jax.Array, b: jax.Array, axis: int, precision: Any) -> jax.Array:
    """Return the float32 product of each head over a's last axis and ``axis`` of b."""
    return lax.dot_general(
        a,
        b,
        (((2,), (axis,)), ((0,), (0,))),
        precision=choose_precision(a, precision),
        preferred_element_type=jnp.float32,
    )


def _run_on_heads(grid: CachedGrid):
    """Decorate ``compute(head)`` to run it now, for the first head of each matrix product."""

    def run(compute) -> None:
        count = grid.kv_heads // grid.heads_per_product
        if count == 1:
            compute(0)
            return
        lax.fori_loop(0, count, lambda i, _: compute(i * grid.heads_per_product), None)

    return run
