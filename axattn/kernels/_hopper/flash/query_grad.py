"""The gradient of the query: the weights are computed again from the LSE, block by block.

Dao, arXiv 2307.08691, algorithm 2, cut so that every gradient has one writer and no atomic
addition: a tile of query rows here, a tile of keys in `key_grad`. The same call twice is bitwise
equal; the price is two matrix products more than one sweep would need.
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

from axattn.kernels import _block_map
from axattn.kernels._hopper import cost, primitives
from axattn.kernels._hopper.block_sizes import QueryGradTiles
from axattn.kernels._hopper.flash.grid import Cut, Work, run
from axattn.kernels._hopper.operands import Operands
from axattn.kernels._hopper.pipeline import Ring
from axattn.kernels._hopper.rows import ROWS, stored_length
from axattn.kernels._hopper.scores import Scores, Tiles
from axattn.kernels._problem import Problem


def query_grad(problem: Problem, operands: Operands, tiles: QueryGradTiles) -> jax.Array:
    """dQ ``[B, T, N, H]``; ``operands`` have ``dout``, ``lse2`` and ``delta`` besides."""
    cut = Cut.of(problem, operands, tiles.block_kv, tiles.warpgroups, packing=False)
    plan = _block_map.of_queries(operands.call, cut.q_block, cut.block_kv)
    arrays = {**operands.arrays, **plan.arrays()}
    shape = (problem.batch, stored_length(problem.q_len), problem.num_heads, problem.head_dim)
    out = jax.ShapeDtypeStruct(shape, jnp.dtype(problem.dtype))
    dquery = primitives.kernel(
        functools.partial(_body, cut, tuple(arrays)),
        name="axattn_query_grad",
        out=out,
        scratch=_scratch(cut, tiles, arrays),
        work=cut.work,
        warpgroups=cut.warpgroups + 1,
        cost=cost.query_grad(operands.call, arrays, out, (cut.q_block, cut.block_kv)),
        interpret=problem.interpret,
    )(*arrays.values())
    return dquery[:, : problem.q_len]


def _scratch(cut: Cut, tiles: QueryGradTiles, arrays: Mapping[str, Any]) -> dict[str, Any]:
    problem, groups, keys = cut.problem, cut.warpgroups, cut.block_kv
    dtype = jnp.dtype(problem.dtype)

    def ring(stages, buffer):
        return Ring.scratch(stages, buffer, consumers=groups)

    def extra(name):
        shape = (1, ROWS * groups, keys)
        return ring(1, primitives.flat(shape, arrays[name].dtype)) if name in arrays else None

    source, sizes = cut.source, (problem.head_dim, problem.value_head_dim)
    return {
        "query": primitives.swizzled((groups, ROWS, problem.head_dim), dtype, keys),
        "dout": primitives.swizzled((groups, ROWS, problem.value_head_dim), dtype, keys),
        "key": source.ring(tiles.key_stages, keys, sizes[0], consumers=groups),
        "value": source.ring(tiles.value_stages, keys, sizes[1], consumers=groups),
        "bias": extra("bias"),
        "allowed": extra("allowed"),
        "rows_full": plgpu.Barrier(num_arrivals=2, num_barriers=groups),
    }


def _body(cut: Cut, names: tuple[str, ...], *refs, **smem) -> None:
    run(cut, dict(zip((*names, "dquery"), refs, strict=True)), smem, _compute)


def _compute(work: Work) -> None:
    cut = work.cut
    full = work.own("rows_full")
    plgpu.copy_gmem_to_smem(work.rows_of("query"), work.own("query"), full)
    plgpu.copy_gmem_to_smem(work.rows_of("dout"), work.own("dout"), full)
    shape = (ROWS, cut.block_kv)
    scores = Scores.of(cut.problem, work.gmem, work.item.rows, shape, q_axis=0)
    lse, delta = (primitives.load_vector(work.vector_of(name), 0) for name in ("lse2", "delta"))
    plgpu.barrier_wait(full)

    def step(partial):
        return functools.partial(_step, work, scores, lse, delta, partial=partial)

    dquery = primitives.zeros((ROWS, cut.problem.head_dim))
    dquery = lax.fori_loop(0, work.plan.full, step(False), dquery)
    if cut.masked:
        dquery = lax.fori_loop(work.plan.full, work.plan.total, step(True), dquery)
    work.own("query")[...] = (dquery * cut.problem.scale).astype(cut.problem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(work.own("query"), work.rows_of("dquery"))
    plgpu.wait_smem_to_gmem(0)


def _step(
    work: Work, scores: Scores, lse, delta, n, dquery: jax.Array, *, partial: bool
) -> jax.Array:
    """One block of keys."""
    problem, smem = work.cut.problem, work.smem
    kv_slot = work.plan.block(n) * work.cut.block_kv if partial or scores.reads_keys else None
    # What dropout keeps needs many registers to find, and one bit per score to hold: it is first.
    tiles = Tiles.wait(smem, n, pl.ds(work.warpgroup * ROWS, ROWS))
    kept = scores.kept(kv_slot)

    key, value = smem["key"].wait(n).numbers, smem["value"].wait(n).numbers
    own = primitives.unknown(work.warpgroup)
    operands = smem["query"].at[own], primitives.transposed(key)
    other = smem["dout"].at[own], primitives.transposed(value)
    light = tiles == Tiles()
    if light:
        dots, dweights = primitives.products(operands, other)
    else:
        dots = primitives.product(*operands)
    weights = scores.weights(dots, lse, kv_slot, tiles, kept, partial=partial)
    if not light:
        dweights = primitives.product(*other)
    smem["value"].release(n)
    Tiles.release(smem, n)
    dscores = weights.dscores(dweights, delta).astype(problem.dtype)
    dquery = primitives.add_product(dquery, dscores, key, interpret=problem.interpret)
    smem["key"].release(n)
    return dquery
