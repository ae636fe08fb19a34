"""Backward pass of ``"xla_chunked"``: one sweep that recomputes the weights from the LSE.

Dao, arXiv 2307.08691, algorithm 2, with query blocks in the outer loop: dQ is finished block by
block, dK and dV are float32 accumulators of the size of K and V. Products sum over the group, so
nothing has the size of N heads of keys.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn._call import AttentionCall
from axattn._dropout import compute_keep_tile
from axattn._implementations.chunked.block_sizes import ChunkSizes
from axattn._implementations.chunked.forward import forward, merge_heads, write_rows
from axattn._implementations.chunked.tile import ChunkGrid, make_start, run_parts
from axattn._implementations.kv_products import take_kv_rows
from axattn._jax_compat import find_varying_axes, vary_over
from axattn._mask_parts import Span
from axattn._masks import make_block_row_states
from axattn._typing import present


class Gradients(NamedTuple):
    """Gradients of the differentiable inputs; None where the call has no such input."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    sinks: jax.Array | None
    traced_scale: jax.Array | None


class _Sums(NamedTuple):
    """Gradients in the making, of the whole call; None where the call has no such input."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, K, S, H], in the accumulator's dtype
    value: jax.Array
    bias: jax.Array | None  # as the bias, in the accumulator's dtype
    scale: jax.Array | None  # []


class _RowResiduals(NamedTuple):
    """What the forward pass and the caller gave for each query row, ``[B, T, N, ...]``."""

    dout: jax.Array
    lse: jax.Array
    delta: jax.Array  # rowsum(dout * out) - dlse


def backward(
    call: AttentionCall,
    blocks: ChunkSizes,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    *,
    whole: bool = True,
) -> Gradients:
    """Compute gradients from the forward pass's ``out`` and ``lse`` and their cotangents.

    ``whole`` says that ``out`` and ``lse`` are those of this call, not of more keys than it has.
    """
    dtype = call.accumulator_dtype
    if whole and call.bias is not None and out.dtype != dtype:
        # Rounding the output shifts delta, and by it all score gradients of a row in one direction.
        # Other roundings hide that in dQ and dK, but a bias that broadcasts along the keys sums it.
        out, _ = forward(call, blocks, rounded=False)
    delta = (dout.astype(dtype) * out.astype(dtype)).sum(-1) - dlse.astype(dtype)
    # Empty rows have no gradient, even where their cotangents are NaN (from combining partial
    # results by LSE). Any finite shift keeps their weights at exp(-inf) = 0.
    empty = lse == -jnp.inf
    lse, delta = (jnp.where(empty, 0.0, x) for x in (lse, delta))
    dout = jnp.where(empty[..., None], jnp.zeros((), dout.dtype), dout)
    dsinks = None
    if call.sinks is not None:
        share = jnp.exp(call.sinks.astype(dtype)[None, None] - lse)
        dsinks = -(share * delta).sum((0, 1)).astype(call.sinks.dtype)
    given = _RowResiduals(dout, lse, delta)
    heads_first = (call.batch, call.num_kv_heads, call.kv_len)
    wide = dtype if blocks.wide_results else call.query.dtype
    results = _Sums(
        jnp.zeros(call.query.shape, wide),
        jnp.zeros((*heads_first, call.head_dim), dtype),
        jnp.zeros((*heads_first, call.value_head_dim), dtype),
        None if call.bias is None else jnp.zeros(call.bias.shape, dtype),
        None if call.traced_scale is None else jnp.zeros((), dtype),
    )
    axes = find_varying_axes(*jax.tree.leaves((call, given)))
    backward_part = functools.partial(_backward_part, given=given, axes=axes)
    results = run_parts(call, blocks, backward_part, vary_over(results, axes))
    return Gradients(
        results.query.astype(call.query.dtype),
        results.key.swapaxes(1, 2).astype(present(call.key).dtype),
        results.value.swapaxes(1, 2).astype(present(call.value).dtype),
        None if call.bias is None else present(results.bias).astype(call.bias.dtype),
        dsinks,
        results.scale,
    )


def _backward_part(grid: ChunkGrid, results: _Sums, given: _RowResiduals, axes) -> _Sums:
    block_row = make_block_row_states(grid.call.mask, grid.layout)
    given = _RowResiduals(*(grid.take_part(x) for x in given))

    def query_block(i, results):
        q = grid.make_q_span(i)
        dquery, results = _backward_over_keys(grid, i, q, block_row(i), given, results, axes)
        dquery = merge_heads(dquery.transpose(0, 1, 3, 4, 2))
        return results._replace(query=write_rows(grid, i, q, results.query, dquery))

    if grid.layout.num_q == 1:
        return query_block(0, results)
    return lax.fori_loop(0, grid.layout.num_q, query_block, results)


def _backward_over_keys(
    grid: ChunkGrid, i, q: Span, row: jax.Array, given: _RowResiduals, results: _Sums, axes
):
    call = grid.call
    tile = _QueryChunk.from_block(grid, i, q, given)
    dquery = jnp.zeros(
        (call.batch, call.num_kv_heads, call.head_dim, call.group, q.size), call.accumulator_dtype
    )
    carry = (vary_over(dquery, axes), results)

    def step(j, carry, partial):
        return _add_backward_chunk(grid, tile, j, carry, partial=partial)

    return grid.sweep_keys(i, row, step, carry, fresh_rows=True)


class _QueryChunk(NamedTuple):
    """A query block with its residuals, heads split."""

    i: int | jax.Array
    q: Span
    query: jax.Array  # [B, K, G, q, H]
    query_turned: jax.Array  # [B, K, H, G, q]; XLA:CPU would transpose it for every block
    dout: jax.Array  # [B, K, G, q, h]
    dout_turned: jax.Array
    lse: jax.Array  # [B, K, 1, G, q]
    delta: jax.Array

    @classmethod
    def from_block(cls, grid: ChunkGrid, i, q: Span, given: _RowResiduals) -> _QueryChunk:
        call = grid.call

        def split(rows):
            rows = rows.reshape(*rows.shape[:2], call.num_kv_heads, call.group, -1)
            return rows.transpose(0, 2, 3, 1, 4)

        query = split(grid.take_query_rows(call.query, q, clean=True))
        dout = split(grid.take_query_rows(given.dout, q, clean=True))
        lse = split(grid.take_query_rows(given.lse, q))
        delta = split(grid.take_query_rows(given.delta, q))
        return cls(i, q, query, _turn(query), dout, _turn(dout), _turn(lse), _turn(delta))


def _turn(tile: jax.Array) -> jax.Array:
    """Turn ``[B, K, G, q, kv]`` into the order of this pass, ``[B, K, kv, G, q]``.

    With keys before queries each of the five products reads its tile as it lies; else XLA:CPU
    transposes two tiles of each block.
    """
    return jnp.moveaxis(tile, -1, 2)


def _add_backward_chunk(grid: ChunkGrid, tile: _QueryChunk, j, carry, *, partial: bool):
    call, kv = grid.call, grid.make_kv_span(j)
    dquery, results = carry
    key = take_kv_rows(call, present(call.key), kv, clean=partial)
    value = take_kv_rows(call, present(call.value), kv, clean=partial)
    multiply = functools.partial(
        jnp.einsum, precision=call.precision, preferred_element_type=call.accumulator_dtype
    )

    dots = multiply("bskh,bkhgt->bksgt", key, tile.query_turned)
    scores, capped = grid.compute_scores(dots, tile.q, kv, turn=_turn)
    weights = jnp.exp(scores - tile.lse)
    dweights = multiply("bskh,bkhgt->bksgt", value, tile.dout_turned)
    if call.dropout_key is not None:
        kept = compute_keep_tile(call, tile.q, kv, turn=_turn).astype(weights.dtype)
        kept = kept / (1.0 - call.dropout_rate)
        dropped, dweights = weights * kept, dweights * kept
    else:
        dropped = weights
    dscores = weights * (dweights - tile.delta)
    if partial:
        allowed = grid.compute_mask(tile.i, j, tile.q, kv, fresh_rows=True)
        if allowed is not None:
            dscores = jnp.where(_turn(allowed), dscores, 0.0)
            dropped = jnp.where(_turn(allowed), dropped, 0.0)

    if results.bias is not None:
        rows = jnp.moveaxis(dscores, 2, -1)
        results = results._replace(bias=_add_bias_tile(grid, results.bias, rows, tile.q, kv))
    if call.logits_soft_cap is not None:
        dscores = dscores * (1.0 - jnp.square(capped / call.logits_soft_cap))
    dscores = dscores * call.scale
    if call.traced_scale is not None:
        results = results._replace(scale=results.scale + (dscores * dots).sum())
        dscores = dscores * call.traced_scale.astype(dscores.dtype)
    query = tile.query
    if key.dtype == jnp.float16:
        # dscores may overflow float16 where their product with small keys does not.
        key, query = key.astype(dscores.dtype), query.astype(dscores.dtype)
    dscores = dscores.astype(key.dtype)

    dquery = dquery + multiply("bskh,bksgt->bkhgt", key, dscores)
    dkey = multiply("bksgt,bkgth->bksh", dscores, query)
    dvalue = multiply("bksgt,bkgth->bksh", dropped.astype(value.dtype), tile.dout)
    return dquery, results._replace(
        key=_add_rows(grid, results.key, dkey, kv), value=_add_rows(grid, results.value, dvalue, kv)
    )


def _add_rows(grid: ChunkGrid, total: jax.Array, rows: jax.Array, kv: Span) -> jax.Array:
    """Add ``rows [B, K, s, size]`` of the part to slots ``kv`` of ``total [B, K, S, size]``."""
    return _add_slice(total, rows, grid.row, grid.head // grid.call.group, kv.start)


def _add_bias_tile(
    grid: ChunkGrid, total: jax.Array, dscores: jax.Array, q: Span, kv: Span
) -> jax.Array:
    """Add the tile's gradient to ``total``, summed where the bias broadcasts."""
    batch, kv_heads, group, rows, columns = dscores.shape
    tile = dscores.reshape(batch, kv_heads * group, rows, columns)
    first = (grid.row, grid.head, q.start, kv.start)
    summed = tuple(axis for axis in range(4) if total.shape[axis] == 1)
    start = [0 if axis in summed else n for axis, n in enumerate(first)]
    return _add_slice(total, tile.sum(summed, keepdims=True), *start)


def _add_slice(total: jax.Array, part: jax.Array, *first: int | jax.Array) -> jax.Array:
    start = make_start(total.ndim, *first)
    return lax.dynamic_update_slice(
        total, part + lax.dynamic_slice(total, start, part.shape), start
    )
