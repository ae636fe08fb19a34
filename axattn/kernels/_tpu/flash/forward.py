"""Flash attention forward: a grid over batch, key/value heads, query blocks and their key blocks.

Dao, arXiv 2307.08691; Shazeer, arXiv 1911.02150 for the shared keys. A block of keys is fetched
once for all query heads of its group, whose rows lie together in one operand of the matrix unit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from axattn._call import AttentionCall
from axattn.kernels import _masks
from axattn.kernels._problem import LOG2E, Problem
from axattn.kernels._scores import Scores, State, contract, finished, softmax
from axattn.kernels._tpu.flash import cost, operands
from axattn.kernels._tpu.flash import grid as cuts
from axattn.kernels._tpu.flash.block_sizes import Tiles
from axattn.kernels._tpu.flash.call import kernel
from axattn.kernels._tpu.flash.grid import Cut, Scalars
from axattn.kernels._tpu.flash.tile import Tile, for_each_head, packed, unpacked, when_visited


def forward(
    call: AttentionCall, tiles: Tiles, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, N, h]`` in the query's dtype, LSE float32 ``[B, T, N]``."""
    call = _masks.fold_key_masks(call)
    problem = Problem.of(call)
    cut, scalars = cuts.of_call(call, problem, tiles.block_q, tiles.block_kv, "q")
    inputs = operands.of(call, cut)
    if call.sinks is not None:
        sinks = call.sinks.astype(jnp.float32)[None, :, None] * LOG2E
        inputs["sinks"] = operands.over_rows(cut, sinks)
    lse_shape = (problem.batch, problem.num_kv_heads, cut.num_q, 1, cut.rows)
    outputs = {
        "out": operands.result_of_queries(cut, problem.value_head_dim, call.query.dtype),
        "lse": operands.of_row_vectors(cut, jax.ShapeDtypeStruct(lse_shape, jnp.float32)),
    }
    out, lse = kernel(
        functools.partial(_body, cut, call.precision),
        cut,
        scalars,
        inputs,
        outputs,
        scratch={
            "rows": pltpu.VMEM((cut.kv_heads, cut.rows, problem.head_dim), call.query.dtype),
            "sums": pltpu.VMEM((cut.kv_heads, problem.value_head_dim, cut.rows), jnp.float32),
            "top": pltpu.VMEM((cut.kv_heads, 1, cut.rows), jnp.float32),
            "total": pltpu.VMEM((cut.kv_heads, 1, cut.rows), jnp.float32),
        },
        cost=cost.forward(call, cut),
        sequential=1,
        vmem_limit=tiles.vmem_limit,
        interpret=interpret,
    )
    return operands.as_queries(cut, out), operands.rows_apart(cut, lse)


def _body(cut: Cut, precision, scalars: Scalars, refs: Mapping[str, Any]) -> None:
    n = pl.program_id(3)

    pl.when(n == 0)(lambda: _start(cut, refs))

    def step(place, *, partial):
        def of_head(head):
            tile = Tile(cut, refs, place, head, scalars.dropout)
            _step(tile, precision, partial=partial)

        for_each_head(cut, of_head)

    when_visited(cut, scalars, step)
    pl.when(n == cut.steps - 1)(lambda: _finish(cut, refs))


def _start(cut: Cut, refs: Mapping[str, Any]) -> None:
    refs["rows"][...] = packed(cut, refs["query"][0])
    refs["sums"][...] = jnp.zeros_like(refs["sums"])
    if "sinks" in refs:
        # A sink is a key with its own logit and no value: the softmax starts with it.
        sinks = refs["sinks"][0, :, 0]
        refs["top"][...] = sinks
        refs["total"][...] = jnp.where(sinks == -jnp.inf, 0.0, 1.0)
    else:
        refs["top"][...] = jnp.full_like(refs["top"], -jnp.inf)
        refs["total"][...] = jnp.zeros_like(refs["total"])


def _step(tile: Tile, precision, *, partial: bool) -> None:
    refs, head = tile.refs, tile.head
    block = Scores(tile.cut.problem, tile)
    dots = contract(refs["key"][0, head], refs["rows"][head], (1, 1), precision)
    scores, _ = block.scores(dots)
    if partial:
        scores = jnp.where(block.allowed(), scores, -jnp.inf)
    weights, decay, state = softmax(scores, State(refs["top"][head], refs["total"][head]), 0)
    refs["top"][head], refs["total"][head] = state
    value = refs["value"][0, head]
    weights = block.thinned(weights, block.kept()).astype(value.dtype)
    refs["sums"][head] = refs["sums"][head] * decay + contract(value, weights, (0, 0), precision)


def _finish(cut: Cut, refs: Mapping[str, Any]) -> None:
    share, lse = finished(State(refs["top"][...], refs["total"][...]))
    refs["out"][0] = unpacked(cut, refs["sums"][...] * share).astype(refs["out"].dtype)
    refs["lse"][0, :, 0] = lse
