"""What the two decode kernels share: the call cut into parts, and the walk through them.

Every worker is one block of threads that stays for the whole call and walks through its share of
the keys (`schedule`). A producer warpgroup keeps copies in flight across the borders of sequences;
what the others make of a part is written with its LSE, and `merge` joins the parts.

Flash decoding: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from axattn._call import AttentionCall
from axattn.kernels import _block_map
from axattn.kernels._block_map import Visits
from axattn.kernels._hopper import cost, primitives
from axattn.kernels._hopper.kv_loader import Source
from axattn.kernels._hopper.pipeline import Ring
from axattn.kernels._hopper.primitives import div, rem
from axattn.kernels._hopper.rows import ROWS
from axattn.kernels._hopper.scores import Rows, Tiles, score_tile
from axattn.kernels._hopper.split_kv import pack_gqa
from axattn.kernels._hopper.split_kv.combine import Partials, merge
from axattn.kernels._hopper.split_kv.pack_gqa import Packing
from axattn.kernels._hopper.split_kv.stream_k import (
    Line,
    Part,
    Shape,
    Share,
    begin_of_rows,
    each_part,
)
from axattn.kernels._problem import Problem, cdiv


@dataclasses.dataclass(frozen=True)
class Cut:
    """Static facts about the kernel."""

    problem: Problem
    source: Source
    packing: Packing
    shape: Shape
    tiles: Any
    masked: bool  # whether any block can be partial
    entries: int  # partial results per part

    @property
    def block_kv(self) -> int:
        return self.tiles.block_kv

    @property
    def warpgroups(self) -> int:
        """Those that compute."""
        return self.tiles.warpgroups

    def buffer(self, name: str, arrays: Mapping[str, Any], stages: int) -> Ring | None:
        """A ring for a bias or a mask over queries and keys, where there is one."""
        if name not in arrays:
            return None
        buffer = primitives.flat((stages, ROWS, self.block_kv), arrays[name].dtype)
        return Ring.scratch(stages, buffer, consumers=1)


@dataclasses.dataclass(frozen=True)
class Body:
    """What makes a kernel of the walk.

    ``scratch(cut, arrays)``: its shared memory; rings "query", "key", "bias", "allowed" and "value"
    (None where values are in the keys) are filled here. ``compute(work)`` runs in the warpgroups
    that compute. ``entries``: partial results per part; ``rows(packing)``: their rows in HBM.
    """

    name: str
    scratch: Callable[[Cut, Mapping[str, Any]], dict[str, Any]]
    compute: Callable[[Work], Any]
    entries: int
    rows: Callable[[Packing], int]


def run(
    call: AttentionCall, tiles: Any, body: Body, *, workers: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32.

    ``workers``: blocks of threads that fit the chip at a time.
    """
    cut, arrays = _plan(call, tiles, body.entries, workers, interpret)
    rows = body.rows(cut.packing)
    out = Partials.structs(cut.shape.parts * cut.entries, rows, cut.packing, cut.problem)
    partials = primitives.kernel(
        functools.partial(_body, cut, body, tuple(arrays)),
        name=body.name,
        out=tuple(out),
        scratch=body.scratch(cut, arrays),
        work=cut.shape.grid * cut.packing.tiles,
        warpgroups=cut.warpgroups + 1,
        cost=cost.few_rows(call, arrays, out),
        interpret=interpret,
        reduction_bytes=0,  # rows only are reduced, within a warp
    )(*arrays.values())
    return merge(call, cut, Partials(*partials), arrays["begin"])


def _plan(
    call: AttentionCall, tiles: Any, entries: int, workers: int, interpret: bool
) -> tuple[Cut, dict[str, jax.Array]]:
    """How the call is cut, and all arrays of the kernel."""
    found = pack_gqa.of(call)
    problem = Problem.of(call, interpret=interpret)
    packing = Packing(call.group, call.q_len)
    blocks = cdiv(call.kv_len, tiles.block_kv)
    split = call.kv_split_size
    if split is not None:
        split = min(cdiv(split, tiles.block_kv), blocks)
    shape = Shape(
        call.batch,
        call.num_kv_heads,
        max(1, workers // packing.tiles),
        split,
        blocks,
    )
    spans = _block_map.of_few_rows(found.call, found.bounds, tiles.block_kv)
    total = jnp.broadcast_to(spans[:, 0, 3], (call.batch,))
    arrays = {**found.arrays, "spans": spans, "begin": begin_of_rows(total, shape)}
    masked = bool(found.call.mask.parts) or found.call.kv_positions is not None
    masked = masked or call.kv_len % tiles.block_kv > 0
    source = Source.of(found.call)
    return Cut(problem, source, packing, shape, tiles, masked, entries), arrays


class Work(NamedTuple):
    """What a warpgroup needs besides the part that it works on."""

    cut: Cut
    gmem: Mapping[str, Any]
    smem: Mapping[str, Any]
    share: Share
    tile: jax.Array
    warpgroup: jax.Array

    def each_part(self, body: Callable[[Work, Part], None]) -> jax.Array:
        """Calls ``body(work, part)`` for each part; how many visits they had in all."""

        def visits_of(batch):
            return Visits.load(self.gmem, batch, jnp.int32(0))

        heads = self.cut.problem.num_kv_heads
        own = functools.partial(body, self)
        return each_part(self.share, heads, visits_of, own)

    def rows(self, part: Part) -> Rows:
        return Rows(part.batch, part.kv_head, jnp.int32(0), self.tile * ROWS)


def _body(cut: Cut, body: Body, names: tuple[str, ...], *refs, **smem) -> None:
    gmem = dict(zip((*names, *Partials._fields), refs, strict=True))
    index, warpgroup = lax.axis_index("work"), lax.axis_index("warpgroup")
    # Tiles of the same keys side by side: the second one reads them from L2.
    worker, tile = div(index, cut.packing.tiles), rem(index, cut.packing.tiles)
    share = Line(gmem["begin"], cut.shape).share(worker)
    work = Work(cut, gmem, smem, share, tile, warpgroup)

    @pl.when(warpgroup < cut.warpgroups)
    def _():
        primitives.claim_registers(cut.warpgroups, searching=True)
        body.compute(work)

    @pl.when(warpgroup == cut.warpgroups)
    def _():
        primitives.claim_registers(cut.warpgroups, producer=True, searching=True)
        _produce(work)


def _produce(work: Work) -> None:
    rings = [name for name in ("key", *Tiles._fields, "value") if work.smem[name] is not None]
    total = work.each_part(_produce_part)
    work.smem["query"].drain(work.share.parts)
    for name in rings:
        work.smem[name].drain(total)


def _produce_part(work: Work, part: Part) -> None:
    cut, gmem, smem = work.cut, work.gmem, work.smem
    copied = pl.ds(0, cut.packing.copied_rows)
    own = pl.ds(work.tile * ROWS, cut.packing.copied_rows)

    def fill_query():
        head = part.batch * cut.problem.num_kv_heads + part.kv_head
        smem["query"].copy(part.index, gmem["query"].at[head, own], copied)

    def step(i, _):
        slot = part.visits.block(part.first + i) * cut.block_kv
        places = cut.source.places(gmem, part.batch, part.kv_head, slot, cut.block_kv)
        n = part.base + i
        cut.source.fill(smem["key"], n, gmem, "key", places)
        # Behind the first keys: they need not wait until the last part's queries are done with.
        pl.when(i == 0)(fill_query)
        for name in Tiles._fields:
            if smem[name] is not None:
                tile = score_tile(gmem[name], work.rows(part), own, pl.ds(slot, cut.block_kv))
                smem[name].copy(n, tile, copied)
        if smem["value"] is not None:
            cut.source.fill(smem["value"], n, gmem, "value", places)

    lax.fori_loop(0, part.count, step, None)
    pl.when(part.count == 0)(fill_query)
