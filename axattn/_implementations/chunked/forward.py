"""Forward pass of ``"xla_chunked"``: online softmax over key/value blocks, query block by block.

Milakov & Gimelshein, arXiv 1805.02867; Rabe & Staats, arXiv 2112.05682; Dao, arXiv 2307.08691.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn._call import AttentionCall
from axattn._dropout import compute_keep_tile
from axattn._implementations.chunked.block_sizes import ChunkSizes
from axattn._implementations.chunked.tile import ChunkGrid, make_start, run_parts
from axattn._implementations.kv_products import KVProducts, make_kv_products
from axattn._implementations.scores import split_heads
from axattn._jax_compat import find_varying_axes, vary_over
from axattn._mask_parts import Span
from axattn._masks import make_block_row_states
from axattn._typing import present


def forward(
    call: AttentionCall, blocks: ChunkSizes, *, rounded: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Return the output ``[B, T, N, h]``, in the query's dtype if ``rounded``, and the LSE.

    The LSE is in the accumulator's dtype. Without ``rounded`` the output is, too, and so are the
    weights and values in its product.
    """
    dtype = call.query.dtype if rounded else call.accumulator_dtype
    if not rounded:
        call = dataclasses.replace(call, value=present(call.value).astype(dtype))
    rows = (call.batch, call.q_len, call.num_heads)
    wide = call.accumulator_dtype if blocks.wide_results else dtype
    results = (
        jnp.zeros((*rows, call.value_head_dim), wide),
        jnp.zeros(rows, call.accumulator_dtype),
    )
    results = vary_over(results, find_varying_axes(*jax.tree.leaves(call)))
    out, lse = run_parts(call, blocks, functools.partial(_forward_part, dtype=dtype), results)
    return out.astype(dtype), lse


class _SoftmaxState(NamedTuple):
    """Online softmax of a query block: weighted values, running maximum and sum per row."""

    values: jax.Array  # [B, K, G, q, h]
    top: jax.Array  # [B, K, G, q, 1], in `ChunkGrid.score_unit`
    total: jax.Array  # [B, K, G, q, 1]


def _forward_part(grid: ChunkGrid, results: Any, dtype: Any) -> Any:
    block_row = make_block_row_states(grid.call.mask, grid.layout)
    axes = find_varying_axes(*jax.tree.leaves((grid.call, results)))

    def query_block(i, results):
        q = grid.make_q_span(i)
        state = vary_over(_start_softmax(grid), axes)
        state = _forward_over_keys(grid, i, q, block_row(i), state)
        return tuple(
            write_rows(grid, i, q, whole, rows)
            for whole, rows in zip(results, _finish_rows(grid, state, dtype), strict=True)
        )

    if grid.layout.num_q == 1:
        return query_block(0, results)
    return lax.fori_loop(0, grid.layout.num_q, query_block, results)


def _start_softmax(grid: ChunkGrid) -> _SoftmaxState:
    call, dtype = grid.call, grid.call.accumulator_dtype
    shape = (call.batch, call.num_kv_heads, call.group, grid.blocks.q)
    top = jnp.full((*shape, 1), -jnp.inf, dtype)
    total = jnp.zeros((*shape, 1), dtype)
    if call.sinks is not None:
        # A sink is a key with its own logit and no value: the softmax starts with it.
        sinks = jnp.broadcast_to(
            split_heads(call.sinks[None, :, None, None].astype(dtype), call), top.shape
        )
        top = lax.stop_gradient(sinks) / grid.score_unit
        shift = jnp.where(sinks == -jnp.inf, 0.0, top) * grid.score_unit
        total = jnp.exp(sinks - shift)  # 1, or 0 without the sink
    return _SoftmaxState(jnp.zeros((*shape, call.value_head_dim), dtype), top, total)


def _forward_over_keys(
    grid: ChunkGrid, i, q: Span, row: jax.Array, state: _SoftmaxState
) -> _SoftmaxState:
    keys_and_values = make_kv_products(
        grid.call, grid.take_query_rows(grid.call.query, q), folded=grid.blocks.folded
    )

    def step(j, state, partial):
        return _add_forward_chunk(grid, keys_and_values, i, j, q, state, partial=partial)

    return grid.sweep_keys(i, row, step, state, fresh_rows=False)


def _add_forward_chunk(
    grid: ChunkGrid, read: KVProducts, i, j, q: Span, state: _SoftmaxState, *, partial: bool
) -> _SoftmaxState:
    """Add one key/value block; the mask is evaluated in partial blocks only."""
    call, kv = grid.call, grid.make_kv_span(j)
    dots, unit = read.multiply_keys(kv), grid.score_unit
    scores = dots if grid.scores_are_scaled_dots else grid.compute_scores(dots, q, kv)[0]
    if partial:
        allowed = grid.compute_mask(i, j, q, kv, fresh_rows=False)
        if allowed is not None:
            scores = jnp.where(allowed, scores, -jnp.inf)
    # The maximum only shifts: in forward mode it has no derivative.
    top = lax.stop_gradient(jnp.maximum(state.top, scores.max(-1, keepdims=True)))
    # An empty row's maximum is -inf and must not shift.
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp((scores - shift) * unit)
    decay = jnp.exp((state.top - shift) * unit)
    total = state.total * decay + weights.sum(-1, keepdims=True)
    if call.dropout_key is not None:
        weights = jnp.where(
            compute_keep_tile(call, q, kv), weights / (1.0 - call.dropout_rate), 0.0
        )
    values = state.values * decay + read.multiply_values(weights, kv, clean=partial)
    return _SoftmaxState(values, top, total)


def _finish_rows(grid: ChunkGrid, state: _SoftmaxState, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return output rows ``[B, q, N, h]`` and LSE rows ``[B, q, N]``."""
    empty = state.total == 0
    total = jnp.where(empty, 1.0, state.total)
    lse = jnp.where(empty, -jnp.inf, state.top * grid.score_unit + jnp.log(total))
    out = (state.values * (1.0 / total)).astype(dtype)  # XLA:CPU divides slowly
    return merge_heads(out), merge_heads(lse)[..., 0]


def merge_heads(tile: jax.Array) -> jax.Array:
    """Merge the heads of ``[B, K, G, q, size]``: ``[B, q, N, size]``."""
    batch, kv_heads, group, rows, size = tile.shape
    return tile.transpose(0, 3, 1, 2, 4).reshape(batch, rows, kv_heads * group, size)


def write_rows(grid: ChunkGrid, i, q: Span, whole: jax.Array, rows: jax.Array) -> jax.Array:
    """Put the rows of block ``i`` into ``whole [B, T, N, ...]``; rows of earlier blocks stay."""
    rows = rows.astype(whole.dtype)
    start = make_start(rows.ndim, grid.row, q.start, grid.head)
    if grid.q_has_tail:
        fresh = grid.find_own_rows(i, q).reshape(1, -1, *(1,) * (rows.ndim - 2))
        rows = jnp.where(fresh, rows, lax.dynamic_slice(whole, start, rows.shape))
    return lax.dynamic_update_slice(whole, rows, start)
