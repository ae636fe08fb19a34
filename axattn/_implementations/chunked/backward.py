"""Backward pass of ``"xla_chunked"``: one sweep that recomputes the weights from the LSE.

Dao, arXiv 2307.08691, algorithm 2, with query blocks in the outer loop: dQ is finished block by
block, dK and dV are float32 accumulators of the size of K and V. Products sum over the group, so
nothing has the size of N heads of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn._call import AttentionCall
from axattn._dropout import compute_keep_tile
from axattn._implementations.chunked.block_sizes import ChunkSizes
from axattn._implementations.chunked.forward import forward, merge_heads, write_rows
from axattn._implementations.chunked.tile import ChunkGrid
from axattn._implementations.kv_products import take_kv_rows
from axattn._implementations.products import GroupedProducts
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


class _SharedGradients(NamedTuple):
    """Gradients that every tile of the call adds to, in the accumulator's dtype, or None."""

    bias: jax.Array | None  # as the bias
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
    shared = _SharedGradients(
        None if call.bias is None else jnp.zeros(call.bias.shape, dtype),
        None if call.traced_scale is None else jnp.zeros((), dtype),
    )
    shared = vary_over(shared, find_varying_axes(*jax.tree.leaves((call, given))))
    backward_of = _backward_row_by_row if blocks.by_row else _backward_rows
    dquery, dkey, dvalue, shared = backward_of(call, blocks, given, shared)
    return Gradients(
        dquery,
        dkey.astype(present(call.key).dtype),
        dvalue.astype(present(call.value).dtype),
        None if call.bias is None else present(shared.bias).astype(call.bias.dtype),
        dsinks,
        shared.scale,
    )


def _backward_row_by_row(
    call: AttentionCall, blocks: ChunkSizes, given: _RowResiduals, shared: _SharedGradients
):
    """Compute gradients of batch rows one at a time; what rows share is summed on the way."""
    own_bias = shared.bias is not None and shared.bias.shape[0] != 1  # B may be symbolic
    start = shared._replace(bias=None) if own_bias else shared
    dtypes = present(call.key).dtype, present(call.value).dtype

    def step(shared, b):
        row_given = _RowResiduals(*(lax.dynamic_slice_in_dim(x, b, 1, 0) for x in given))
        if own_bias:
            shared = shared._replace(bias=empty_bias)
        dquery, dkey, dvalue, shared = _backward_rows(call.row(b), blocks, row_given, shared)
        grads = (dquery[0], dkey[0].astype(dtypes[0]), dvalue[0].astype(dtypes[1]))
        if own_bias:
            return shared._replace(bias=None), (*grads, shared.bias[0])
        return shared, (*grads, None)

    empty_bias = present(shared.bias)[:1] if own_bias else None
    shared, (dquery, dkey, dvalue, biases) = lax.scan(step, start, jnp.arange(call.batch))
    return dquery, dkey, dvalue, shared._replace(bias=biases) if own_bias else shared


def _backward_rows(
    call: AttentionCall, blocks: ChunkSizes, given: _RowResiduals, shared: _SharedGradients
):
    grid = ChunkGrid.from_call(call, blocks)
    block_row = make_block_row_states(call.mask, grid.layout)
    dtype = call.accumulator_dtype
    axes = find_varying_axes(*jax.tree.leaves((call, given)))
    heads_first = (call.batch, call.num_kv_heads, call.kv_len)
    dquery = jnp.zeros_like(call.query)
    dkey = jnp.zeros((*heads_first, call.head_dim), dtype)
    dvalue = jnp.zeros((*heads_first, call.value_head_dim), dtype)

    def query_block(i, carry):
        dquery, sums = carry
        q = grid.make_q_span(i)
        dquery_rows, sums = _backward_over_keys(grid, i, q, block_row(i), given, sums, axes)
        dquery_rows = merge_heads(dquery_rows).astype(dquery.dtype)
        return write_rows(grid, i, q, dquery, dquery_rows), sums

    carry = vary_over((dquery, (dkey, dvalue, shared)), axes)
    if grid.layout.num_q == 1:
        carry = query_block(0, carry)
    else:
        carry = lax.fori_loop(0, grid.layout.num_q, query_block, carry)
    dquery, (dkey, dvalue, shared) = carry
    return dquery, dkey.swapaxes(1, 2), dvalue.swapaxes(1, 2), shared


def _backward_over_keys(
    grid: ChunkGrid, i, q: Span, row: jax.Array, given: _RowResiduals, sums, axes
):
    call = grid.call
    tile = _QueryChunk.from_block(grid, i, q, given)
    dquery = jnp.zeros(
        (call.batch, call.num_kv_heads, call.group, q.size, call.head_dim), call.accumulator_dtype
    )
    carry = (vary_over(dquery, axes), sums)

    def step(j, carry, partial):
        return _add_backward_chunk(grid, tile, j, carry, partial=partial)

    return grid.sweep_keys(i, row, step, carry, fresh_rows=True)


class _QueryChunk(NamedTuple):
    """A query block with its residuals, heads split."""

    i: int | jax.Array
    q: Span
    query: GroupedProducts
    dout: GroupedProducts
    lse: jax.Array  # [B, K, G, q, 1]
    delta: jax.Array

    @classmethod
    def from_block(cls, grid: ChunkGrid, i, q: Span, given: _RowResiduals) -> _QueryChunk:
        call = grid.call
        options = (call.num_kv_heads, call.precision, call.accumulator_dtype)

        def per_row(array):
            rows = grid.take_query_rows(array, q)
            rows = rows.reshape(*rows.shape[:2], call.num_kv_heads, call.group)
            return rows.transpose(0, 2, 3, 1)[..., None]

        return cls(
            i,
            q,
            GroupedProducts(grid.take_query_rows(call.query, q, clean=True), *options),
            GroupedProducts(grid.take_query_rows(given.dout, q, clean=True), *options),
            per_row(given.lse),
            per_row(given.delta),
        )


def _add_backward_chunk(grid: ChunkGrid, tile: _QueryChunk, j, carry, *, partial: bool):
    call, kv = grid.call, grid.make_kv_span(j)
    dquery, (dkey, dvalue, shared) = carry
    key = take_kv_rows(call, present(call.key), kv, clean=partial)
    value = take_kv_rows(call, present(call.value), kv, clean=partial)

    dots = tile.query.multiply_keys(key)
    scores, capped = grid.compute_scores(dots, tile.q, kv)
    weights = jnp.exp(scores - tile.lse)
    dweights = tile.dout.multiply_keys(value)
    if call.dropout_key is not None:
        kept = compute_keep_tile(call, tile.q, kv).astype(weights.dtype) / (1.0 - call.dropout_rate)
        dropped, dweights = weights * kept, dweights * kept
    else:
        dropped = weights
    dscores = weights * (dweights - tile.delta)
    if partial:
        allowed = grid.compute_mask(tile.i, j, tile.q, kv, fresh_rows=True)
        if allowed is not None:
            dscores = jnp.where(allowed, dscores, 0.0)
            dropped = jnp.where(allowed, dropped, 0.0)

    if shared.bias is not None:
        shared = shared._replace(bias=_add_bias_tile(call, shared.bias, dscores, tile.q, kv))
    if call.logits_soft_cap is not None:
        dscores = dscores * (1.0 - jnp.square(capped / call.logits_soft_cap))
    dscores = dscores * call.scale
    if call.traced_scale is not None:
        shared = shared._replace(scale=shared.scale + (dscores * dots).sum())
        dscores = dscores * call.traced_scale.astype(dscores.dtype)
    if key.dtype == jnp.float16:
        # dscores may overflow float16 where their product with small keys does not.
        key = key.astype(dscores.dtype)
    dscores = dscores.astype(key.dtype)

    dquery = dquery + tile.query.multiply_values(dscores, key)
    dkey = _add_rows(dkey, tile.query.multiply_transposed(dscores), kv)
    dvalue = _add_rows(dvalue, tile.dout.multiply_transposed(dropped.astype(value.dtype)), kv)
    return dquery, (dkey, dvalue, shared)


def _add_rows(total: jax.Array, rows: jax.Array, kv: Span) -> jax.Array:
    """Add ``rows [B, K, s, size]`` to slots ``kv`` of ``total [B, K, S, size]``."""
    rows = rows + lax.dynamic_slice_in_dim(total, kv.start, kv.size, 2)
    return lax.dynamic_update_slice_in_dim(total, rows, kv.start, 2)


def _add_bias_tile(
    call: AttentionCall, total: jax.Array, dscores: jax.Array, q: Span, kv: Span
) -> jax.Array:
    """Add the tile's gradient to ``total``, summed where the bias broadcasts."""
    batch, kv_heads, group, rows, columns = dscores.shape
    tile = dscores.reshape(batch, kv_heads * group, rows, columns)
    summed = tuple(axis for axis in range(4) if total.shape[axis] == 1)
    tile = tile.sum(summed, keepdims=True)
    first = (0, 0, 0 if 2 in summed else q.start, 0 if 3 in summed else kv.start)
    start = tuple(jnp.asarray(n, jnp.int32) for n in first)  # one dtype, under x64, too
    return lax.dynamic_update_slice(
        total, tile + lax.dynamic_slice(total, start, tile.shape), start
    )
