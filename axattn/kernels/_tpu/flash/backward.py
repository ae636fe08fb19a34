"""The gradient kernels of a call: one pass over all blocks, or two.

In the fused kernel blocks of queries are the outer loop. The gradient of a block of queries is
summed over its key blocks, and those of all keys and values of a group stay in VMEM throughout:
shared keys and values are few, so that they fit. Each score is computed once, and nothing partial
goes through HBM. Where they do not fit, one kernel has the gradient of the queries, and another,
with blocks of keys as its outer loop, those of keys and values.

Dao, arXiv 2307.08691. Scores lie as in `tile`, which makes four of the five products plain ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from axattn._call import AttentionCall
from axattn._typing import present
from axattn.kernels import _backward_inputs, _masks
from axattn.kernels._problem import Problem
from axattn.kernels._scores import Scores, contract
from axattn.kernels._tpu.flash import cost, operands
from axattn.kernels._tpu.flash import grid as cuts
from axattn.kernels._tpu.flash.block_sizes import BackwardTiles, Tiles
from axattn.kernels._tpu.flash.call import kernel
from axattn.kernels._tpu.flash.grid import Cut, Place, Scalars
from axattn.kernels._tpu.flash.operands import Operand
from axattn.kernels._tpu.flash.tile import (
    Tile,
    cleaned,
    for_each_head,
    here,
    packed,
    unpacked,
    when_visited,
)


def backward(
    call: AttentionCall,
    tiles: BackwardTiles,
    given: _backward_inputs.Given,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, each in its input's dtype."""
    call = _masks.fold_key_masks(call)
    if tiles.key is None:
        return _fused(call, given, tiles.query, interpret)
    dquery = _query_grad(call, given, tiles.query, interpret)
    return dquery, *_key_grad(call, given, tiles.key, interpret)


class _Wants(NamedTuple):
    """What a kernel computes."""

    query: bool = False
    keys: bool = False


def _fused(call: AttentionCall, given: _backward_inputs.Given, tiles: Tiles, interpret):
    cut, scalars, inputs = _inputs(call, given, tiles, "q")
    problem, dtype = cut.problem, present(call.key).dtype
    whole = (cut.kv_heads, cut.num_kv * cut.block_kv)
    shape = (problem.batch, problem.num_kv_heads, whole[1])
    sizes = {"dkey": problem.head_dim, "dvalue": problem.value_head_dim}
    outputs = {"dquery": operands.result_of_queries(cut, problem.head_dim, call.query.dtype)}
    for name, size in sizes.items():
        outputs[name] = Operand(jax.ShapeDtypeStruct((*shape, size), dtype), None, None)
    scratch = _row_scratch(call, cut) | _query_scratch(cut)
    for name, size in sizes.items():
        scratch[f"{name}_sums"] = pltpu.VMEM((*whole, size), jnp.float32)
        scratch[f"{name}_block"] = pltpu.VMEM((cut.kv_heads, cut.block_kv, size), dtype)
    dquery, dkey, dvalue = kernel(
        functools.partial(_fused_body, cut, call.precision),
        cut,
        scalars,
        inputs,
        outputs,
        scratch=scratch,
        cost=cost.fused(call, cut),
        sequential=2,
        vmem_limit=tiles.vmem_limit,
        interpret=interpret,
    )
    return operands.as_queries(cut, dquery), _of_keys(call, dkey), _of_keys(call, dvalue)


def _query_grad(call: AttentionCall, given: _backward_inputs.Given, tiles: Tiles, interpret):
    cut, scalars, inputs = _inputs(call, given, tiles, "q")
    (dquery,) = kernel(
        functools.partial(_query_body, cut, call.precision),
        cut,
        scalars,
        inputs,
        {"dquery": operands.result_of_queries(cut, call.head_dim, call.query.dtype)},
        scratch=_row_scratch(call, cut) | _query_scratch(cut),
        cost=cost.query_grad(call, cut),
        sequential=1,
        vmem_limit=tiles.vmem_limit,
        interpret=interpret,
    )
    return operands.as_queries(cut, dquery)


def _key_grad(call: AttentionCall, given: _backward_inputs.Given, tiles: Tiles, interpret):
    cut, scalars, inputs = _inputs(call, given, tiles, "kv")
    problem = cut.problem
    shape = (problem.batch, problem.num_kv_heads, cut.num_kv * cut.block_kv)
    sizes = {"dkey": problem.head_dim, "dvalue": problem.value_head_dim}
    outputs, scratch = {}, _row_scratch(call, cut)
    for name, size in sizes.items():
        result = jax.ShapeDtypeStruct((*shape, size), present(call.key).dtype)
        outputs[name] = operands.of_keys_and_values(cut, result)
        scratch[f"{name}_sums"] = pltpu.VMEM((cut.kv_heads, cut.block_kv, size), jnp.float32)
    dkey, dvalue = kernel(
        functools.partial(_key_body, cut, call.precision),
        cut,
        scalars,
        inputs,
        outputs,
        scratch=scratch,
        cost=cost.key_grad(call, cut),
        sequential=1,
        vmem_limit=tiles.vmem_limit,
        interpret=interpret,
    )
    return _of_keys(call, dkey), _of_keys(call, dvalue)


def _inputs(call: AttentionCall, given: _backward_inputs.Given, tiles: Tiles, major: str):
    problem = Problem.of(call)
    cut, scalars = cuts.of_call(call, problem, tiles.block_q, tiles.block_kv, major)
    # A query behind its row's length may be NaN, which a weight of zero would not stop.
    query = operands.clean_queries(call, call.query)
    inputs = operands.of(dataclasses.replace(call, query=query), cut)
    inputs["dout"] = operands.of_queries(cut, operands.clean_queries(call, given.dout))
    inputs["lse2"] = operands.over_rows(cut, given.lse2.swapaxes(1, 2), jnp.inf)
    inputs["delta"] = operands.over_rows(cut, given.delta.swapaxes(1, 2))
    return cut, scalars, inputs


def _of_keys(call: AttentionCall, by_head: jax.Array) -> jax.Array:
    """``[B, K, S', size]`` as ``[B, S, K, size]``."""
    return by_head[:, :, : call.kv_len].swapaxes(1, 2)


def _row_scratch(call: AttentionCall, cut: Cut) -> dict[str, Any]:
    problem, shape = cut.problem, (cut.kv_heads, cut.rows)
    return {
        "rows": pltpu.VMEM((*shape, problem.head_dim), call.query.dtype),
        "drows": pltpu.VMEM((*shape, problem.value_head_dim), call.query.dtype),
    }


def _query_scratch(cut: Cut) -> dict[str, Any]:
    shape = (cut.kv_heads, cut.problem.head_dim, cut.rows)
    return {"dquery_sums": pltpu.VMEM(shape, jnp.float32)}


def _factors(cut: Cut) -> tuple[tuple[str, float], ...]:
    """The gradients over keys, and what their sums lack."""
    return ("dkey", cut.problem.scale), ("dvalue", 1.0)


# ---- the kernels ------------------------------------------------------------------------------


def _fused_body(cut: Cut, precision, scalars: Scalars, refs: Mapping[str, Any]) -> None:
    b, h, tile, n = (pl.program_id(axis) for axis in range(4))

    @pl.when((tile == 0) & (n == 0))
    def _():
        for name, _ in _factors(cut):
            refs[f"{name}_sums"][...] = jnp.zeros_like(refs[f"{name}_sums"])

    _over_key_blocks(cut, precision, scalars, refs, _Wants(query=True, keys=True))

    @pl.when((tile == cut.tiles - 1) & (n == cut.steps - 1))
    def _():
        heads = pl.ds(h * cut.kv_heads, cut.kv_heads)
        for name, factor in _factors(cut):
            _write_all(cut, refs, name, factor, refs[name].at[b, heads])


def _write_all(cut: Cut, refs: Mapping[str, Any], name: str, factor: float, target: Any) -> None:
    """The sums over all keys, block by block, in the dtype of the gradient."""
    sums, block = refs[f"{name}_sums"], refs[f"{name}_block"]

    def write(j, _):
        keys = pl.ds(pl.multiple_of(j * cut.block_kv, cut.block_kv), cut.block_kv)
        block[...] = (sums[:, keys] * factor).astype(block.dtype)
        pltpu.sync_copy(block, target.at[:, keys])
        return _

    lax.fori_loop(0, cut.num_kv, write, 0)


def _query_body(cut: Cut, precision, scalars: Scalars, refs: Mapping[str, Any]) -> None:
    _over_key_blocks(cut, precision, scalars, refs, _Wants(query=True))


def _over_key_blocks(cut: Cut, precision, scalars: Scalars, refs, wants: _Wants) -> None:
    """The gradient of a block of queries; its rows are packed once, for all key blocks."""
    n = pl.program_id(3)

    @pl.when(n == 0)
    def _():
        _pack(cut, refs, here(cut, scalars))
        refs["dquery_sums"][...] = jnp.zeros_like(refs["dquery_sums"])

    def step(place, *, partial):
        keys = pl.ds(place.kv * cut.block_kv, cut.block_kv)
        _step(cut, precision, scalars, refs, place, keys, wants, partial=partial)

    when_visited(cut, scalars, step)

    @pl.when(n == cut.steps - 1)
    def _():
        sums = refs["dquery_sums"][...] * cut.problem.scale
        refs["dquery"][0] = unpacked(cut, sums).astype(refs["dquery"].dtype)


def _key_body(cut: Cut, precision, scalars: Scalars, refs: Mapping[str, Any]) -> None:
    n = pl.program_id(3)

    @pl.when(n == 0)
    def _():
        for name, _ in _factors(cut):
            refs[f"{name}_sums"][...] = jnp.zeros_like(refs[f"{name}_sums"])

    def step(place, *, partial):
        _pack(cut, refs, place)
        keys = pl.ds(0, cut.block_kv)
        _step(cut, precision, scalars, refs, place, keys, _Wants(keys=True), partial=partial)

    when_visited(cut, scalars, step)

    @pl.when(n == cut.steps - 1)
    def _():
        for name, factor in _factors(cut):
            refs[name][0] = (refs[f"{name}_sums"][...] * factor).astype(refs[name].dtype)


def _pack(cut: Cut, refs: Mapping[str, Any], place: Place) -> None:
    for rows, name in (("rows", "query"), ("drows", "dout")):
        refs[rows][...] = packed(cut, cleaned(cut, refs[name][0], place.q))


def _step(cut: Cut, precision, scalars: Scalars, refs, place, keys, wants, *, partial) -> None:
    """One block of queries and keys; ``keys`` is its place in the sums over queries."""

    def of_head(head):
        tile = Tile(cut, refs, place, head, scalars.dropout)
        weights, dscores = _gradients(tile, precision, partial=partial)
        key, rows = refs["key"][0, head], refs["rows"][head]
        if wants.keys:
            drows = refs["drows"][head]
            refs["dvalue_sums"][head, keys] += contract(weights, drows, (1, 0), precision)
            refs["dkey_sums"][head, keys] += contract(dscores, rows, (1, 0), precision)
        if wants.query:
            refs["dquery_sums"][head] += contract(key, dscores, (0, 0), precision)

    for_each_head(cut, of_head)


def _gradients(tile: Tile, precision, *, partial: bool) -> tuple[jax.Array, jax.Array]:
    """Weights that met the values and gradients of the scaled products, ``[keys, rows]``."""
    refs, head, problem = tile.refs, tile.head, tile.cut.problem
    block = Scores(problem, tile)
    rows, drows = refs["rows"][head], refs["drows"][head]
    scores, ratio = block.scores(contract(refs["key"][0, head], rows, (1, 1), precision))
    lse2 = tile.of_rows("lse2")
    weights = jnp.exp2(scores - lse2)
    if partial:
        weights = jnp.where(block.allowed(), weights, 0.0)
    if tile.has("bias") and problem.q_len % tile.cut.block_q:
        # Behind the last query the bias may be anything.
        weights = jnp.where(lse2 == jnp.inf, 0.0, weights)
    kept = block.kept()
    dweights = contract(refs["value"][0, head], drows, (1, 1), precision)
    dscores = weights * (block.thinned(dweights, kept) - tile.of_rows("delta"))
    if ratio is not None:
        dscores = dscores * (1.0 - ratio * ratio)
    return block.thinned(weights, kept).astype(rows.dtype), dscores.astype(rows.dtype)
