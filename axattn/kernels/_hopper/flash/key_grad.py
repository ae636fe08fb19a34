"""The gradients of keys and values, summed over the group inside the kernel.

A block of work owns a tile of keys of one key/value head and visits the query rows of all G heads
that read it, so that HBM never holds a gradient of the size of N heads. Its tiles of scores are
transposed: keys along the rows.
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
from jax.experimental.pallas import mosaic_gpu as plgpu

from axattn._typing import present
from axattn.kernels import _block_map
from axattn.kernels._hopper import cost, primitives
from axattn.kernels._hopper.block_sizes import KeyGradTiles
from axattn.kernels._hopper.operands import Operands, with_transposed_tiles
from axattn.kernels._hopper.pipeline import Ring, produce
from axattn.kernels._hopper.primitives import div, rem
from axattn.kernels._hopper.rows import ROWS, stored_length
from axattn.kernels._hopper.scores import Rows, Scores, Tiles, score_tile
from axattn.kernels._problem import Problem, cdiv


@dataclasses.dataclass(frozen=True)
class Cut:
    """Tiles of keys. Each warpgroup has 64 of them and both gradients, or (``split``: large heads,
    whose accumulators fill a warpgroup's registers) two share 64 and have one gradient each."""

    problem: Problem
    tiles: KeyGradTiles
    masked: bool

    @property
    def shares(self) -> int:
        """Groups of 64 keys in a block of work."""
        return 1 if self.tiles.split else self.tiles.warpgroups

    @property
    def kv_block(self) -> int:
        return ROWS * self.shares

    @property
    def num_kv(self) -> int:
        return cdiv(self.problem.kv_len, self.kv_block)

    @property
    def work(self) -> int:
        return self.problem.batch * self.problem.num_kv_heads * self.num_kv

    def item(self, index: jax.Array, warpgroup: jax.Array) -> Item:
        """The first keys of a head first: they have the most queries under causal masks."""
        tile, head = rem(index, self.num_kv), div(index, self.num_kv)
        heads = self.problem.num_kv_heads
        share = jnp.int32(0) if self.tiles.split else warpgroup
        slot = tile * self.kv_block + share * ROWS
        return Item(div(head, heads), rem(head, heads), tile, share, slot)


class Item(NamedTuple):
    """One warpgroup's keys."""

    batch: jax.Array
    kv_head: jax.Array
    tile: jax.Array
    share: jax.Array
    slot: jax.Array


class _Sums(NamedTuple):
    """Accumulators of a warpgroup: ``[64, H]`` and ``[64, h]``; None where the other one has it."""

    dkey: jax.Array | None
    dvalue: jax.Array | None


def key_grad(
    problem: Problem, operands: Operands, tiles: KeyGradTiles
) -> tuple[jax.Array, jax.Array]:
    """dK ``[B, S, K, H]`` and dV ``[B, S, K, h]``; operands as in `query_grad`."""
    operands = with_transposed_tiles(operands)
    call = operands.call
    masked = bool(call.mask.parts) or call.kv_positions is not None
    cut = Cut(problem, tiles, masked)
    plan = _block_map.of_keys(call, tiles.block_q, cut.kv_block)
    arrays = {**operands.arrays, **plan.arrays()}
    dtype = jnp.dtype(problem.dtype)
    out = tuple(
        jax.ShapeDtypeStruct(
            (problem.batch, stored_length(problem.kv_len), problem.num_kv_heads, size), dtype
        )
        for size in (problem.head_dim, problem.value_head_dim)
    )
    dkey, dvalue = primitives.kernel(
        functools.partial(_body, cut, tuple(arrays)),
        name="axattn_key_grad",
        out=out,
        scratch=_scratch(cut, arrays),
        work=cut.work,
        warpgroups=tiles.warpgroups + 1,
        cost=cost.key_grad(call, arrays, out, (tiles.block_q, cut.kv_block), split=tiles.split),
        interpret=problem.interpret,
    )(*arrays.values())
    return dkey[:, : problem.kv_len], dvalue[:, : problem.kv_len]


def _scratch(cut: Cut, arrays: Mapping[str, Any]) -> dict[str, Any]:
    problem, stages, rows = cut.problem, cut.tiles.stages, cut.tiles.block_q
    dtype = jnp.dtype(problem.dtype)

    def keys(size):
        return primitives.swizzled((cut.shares, ROWS, size), dtype, rows)

    def queries(size):
        tile = primitives.swizzled((stages, rows, size), dtype, rows)
        vector = primitives.flat((stages, rows), jnp.float32)
        return Ring.scratch(stages, (tile, vector), copies=2, consumers=cut.tiles.warpgroups)

    def extra(name):
        if name not in arrays:
            return None
        tile = primitives.flat((stages, cut.kv_block, rows), arrays[name].dtype)
        return Ring.scratch(stages, tile, consumers=cut.tiles.warpgroups)

    return {
        "key": keys(problem.head_dim),
        "value": keys(problem.value_head_dim),
        "keys_full": plgpu.Barrier(num_arrivals=2, num_barriers=cut.shares),
        "query": queries(problem.head_dim),
        "dout": queries(problem.value_head_dim),
        "bias": extra("bias"),
        "allowed": extra("allowed"),
        "readers": plgpu.Barrier(num_arrivals=2) if cut.tiles.split else None,
    }


class _Work(NamedTuple):
    cut: Cut
    gmem: Mapping[str, Any]
    smem: Mapping[str, Any]
    item: Item
    plan: _block_map.Visits

    def own(self, name: str) -> Any:
        return self.smem[name].at[self.item.share]

    def keys_of(self, name: str) -> Any:
        """This warpgroup's keys of ``[B, S, K, size]`` in HBM."""
        item = self.item
        return self.gmem[name].at[item.batch, pl.ds(item.slot, ROWS), item.kv_head]

    def rows(self, member: jax.Array, n: jax.Array) -> Rows:
        """The query rows of visit ``n`` to one of the heads."""
        head = self.item.kv_head * self.cut.problem.group + member
        slot = self.plan.block(n) * self.cut.tiles.block_q
        return Rows(self.item.batch, head, slot, slot)


def _body(cut: Cut, names: tuple[str, ...], *refs, **smem) -> None:
    gmem = dict(zip((*names, "dkey", "dvalue"), refs, strict=True))
    warpgroup, groups = lax.axis_index("warpgroup"), cut.tiles.warpgroups
    item = cut.item(lax.axis_index("work"), warpgroup)
    plan = _block_map.Visits.load(gmem, item.batch, item.tile)
    work = _Work(cut, gmem, smem, item, plan)

    def compute(**gradients):
        primitives.claim_registers(groups)
        _compute(work, **gradients)

    if cut.tiles.split:
        pl.when(warpgroup == 0)(lambda: compute(dvalue=True, dkey=False))
        pl.when(warpgroup == 1)(lambda: compute(dvalue=False, dkey=True))
    else:
        pl.when(warpgroup < groups)(lambda: compute(dvalue=True, dkey=True))

    @pl.when(warpgroup == groups)
    def _():
        primitives.claim_registers(groups, producer=True)
        _produce(work)


def _produce(work: _Work) -> None:
    cut, gmem, item = work.cut, work.gmem, work.item
    for share in range(cut.shares):
        slots = pl.ds(item.tile * cut.kv_block + share * ROWS, ROWS)
        for name in ("key", "value"):
            source = gmem[name].at[item.batch, slots, item.kv_head]
            plgpu.copy_gmem_to_smem(
                source, work.smem[name].at[share], work.smem["keys_full"].at[share]
            )
    keys = pl.ds(item.tile * cut.kv_block, cut.kv_block)

    def sources(step):
        rows = work.rows(lax.div(step, work.plan.total), lax.rem(step, work.plan.total))
        slots = pl.ds(rows.slot, cut.tiles.block_q)

        def source(name):
            if name in Tiles._fields:
                return score_tile(gmem[name], rows, keys, slots)
            vector = {"query": "lse2", "dout": "delta"}[name]
            return (
                gmem[name].at[rows.batch, slots, rows.head],
                gmem[vector].at[rows.batch, rows.head, slots],
            )

        return source

    rings = {name: work.smem[name] for name in ("query", *Tiles._fields, "dout")}
    produce(rings, work.plan.total * cut.problem.group, sources)


def _compute(work: _Work, *, dkey: bool, dvalue: bool) -> None:
    cut, plan, problem = work.cut, work.plan, work.cut.problem
    plgpu.barrier_wait(work.own("keys_full"))

    def member(head, sums):
        def step(partial):
            return functools.partial(_step, work, head, partial=partial)

        sums = lax.fori_loop(0, plan.full, step(False), sums)
        return lax.fori_loop(plan.full, plan.total, step(True), sums) if cut.masked else sums

    sums = _Sums(
        primitives.zeros((ROWS, problem.head_dim)) if dkey else None,
        primitives.zeros((ROWS, problem.value_head_dim)) if dvalue else None,
    )
    sums = lax.fori_loop(0, problem.group, member, sums)
    if cut.tiles.split:
        # Each one's result overwrites what the other one may still read.
        plgpu.barrier_arrive(work.smem["readers"])
        plgpu.barrier_wait(work.smem["readers"])
    if dkey:
        _write(work, "key", "dkey", sums.dkey * problem.scale)
    if dvalue:
        _write(work, "value", "dvalue", sums.dvalue)
    plgpu.wait_smem_to_gmem(0)


def _write(work: _Work, buffer: str, name: str, gradient: jax.Array) -> None:
    # The keys and values have been read for the last time.
    work.own(buffer)[...] = gradient.astype(work.cut.problem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(work.own(buffer), work.keys_of(name))


def _step(work: _Work, head: jax.Array, n, sums: _Sums, *, partial: bool) -> _Sums:
    """One block of query rows of one head."""
    cut, smem, problem = work.cut, work.smem, work.cut.problem
    step = head * work.plan.total + n
    rows = work.rows(head, n)
    scores = Scores(problem, work.gmem, rows, {}, (ROWS, cut.tiles.block_q), q_axis=1)
    kv_slot = work.item.slot
    # What dropout keeps needs many registers to find, and one bit per score to hold: it is first.
    tiles = Tiles.wait(smem, step, pl.ds(work.item.share * ROWS, ROWS))
    kept = scores.kept(kv_slot)
    query, lse = smem["query"].wait(step)
    share = primitives.unknown(work.item.share)
    dots = primitives.product(smem["key"].at[share], primitives.transposed(query))
    lse = primitives.load_vector(lse, 1)
    weights = scores.weights(dots, lse, kv_slot, tiles, kept, partial=partial)
    Tiles.release(smem, step)

    dout, delta = smem["dout"].wait(step)
    dkey, dvalue = sums
    other = smem["value"].at[share], primitives.transposed(dout)
    add = functools.partial(primitives.add_product, interpret=problem.interpret)
    if dvalue is not None:
        dropped = weights.dropped().astype(problem.dtype)
    if dkey is None:
        dvalue = add(present(dvalue), dropped, dout)
    elif dvalue is None:
        dweights = primitives.product(*other)
    else:
        dvalue, dweights = primitives.add_product_and_product(
            dvalue, dropped, dout, other, interpret=problem.interpret
        )
    if dkey is not None:
        # A vector along the columns takes many registers: it is loaded when it is needed.
        delta = primitives.load_vector(delta, 1)
        dscores = weights.dscores(dweights, delta).astype(problem.dtype)
        dkey = add(dkey, dscores, query)
    plgpu.commit_smem()  # threads have read the LSE and delta, and TMA writes them next
    smem["query"].release(step)
    smem["dout"].release(step)
    return _Sums(dkey, dvalue)
