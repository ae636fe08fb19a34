"""Attention over a cache: decode steps, latent ones, and prompts over what is stored.

The cache stays where it is: a step reads the blocks of its row, through the block table where there
is one, all key/value heads at a time, each once for all query heads of its group (Shazeer, arXiv
1911.02150), and takes the softmax online (Milakov & Gimelshein, arXiv 1805.02867). While a block is
computed on, the next one is on its way, also if it is another row's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from axattn._call import AttentionCall
from axattn._jax_compat import result_of
from axattn._typing import present
from axattn.kernels import _cost, _masks
from axattn.kernels._scores import Scores, State, finished, precision_of, softmax
from axattn.kernels._tpu.cached import codes as cached_codes
from axattn.kernels._tpu.cached import copies as cached_copies
from axattn.kernels._tpu.cached import operands
from axattn.kernels._tpu.cached.block_sizes import CachedTiles, cut_of
from axattn.kernels._tpu.cached.copies import Copies, Fetch
from axattn.kernels._tpu.cached.grid import Cut, Scalars, scalars
from axattn.kernels._tpu.cached.tile import Tile, columns, lanes


def attend(
    call: AttentionCall, tiles: CachedTiles, *, cores: int = 1, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, N, h]`` in the query's dtype, LSE float32 ``[B, T, N]``.

    ``cores``: how many share the work of one call, 2 on chips whose cores are one device.
    """
    call = _masks.fold_key_masks(call)
    cut = cut_of(call, tiles, cores)
    out, lse = _run(call, cut, tiles.vmem_limit, interpret)
    out = operands.unpacked(cut, out)
    lse = operands.unpacked(cut, jnp.swapaxes(lse, 3, 4)[..., 0])
    return (out, lse) if cut.parts == 1 else _joined(call, cut, out, lse)


def _run(call: AttentionCall, cut: Cut, vmem_limit, interpret) -> tuple[jax.Array, jax.Array]:
    """``[results, K, tiles, rows, h]`` and ``[results, K, tiles, 1, row_lanes]``."""
    problem = cut.problem
    query = operands.queries(call, cut)
    limits = _masks.bounds(call)
    vectors = operands.row_vectors(call, cut, limits)
    sources = operands.sources(call, cut)
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    dtype = call.query.dtype if cut.parts == 1 else jnp.float32
    shape = (cut.results, cut.kv_heads, cut.tiles)
    outputs = [
        result_of(query, (*shape, cut.rows, problem.value_head_dim), dtype),
        result_of(query, (*shape, 1, cut.row_lanes), jnp.float32),
    ]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(Scalars._fields),
        grid=cut.grid,
        in_specs=[_spec(cut, x.shape) for x in (query, *vectors.values())]
        + [in_place] * len(sources),
        out_specs=[_spec(cut, x.shape) for x in outputs],
        scratch_shapes=_scratch(cut, sources),
    )
    return pl.pallas_call(
        functools.partial(_kernel, cut, call.precision, tuple(vectors), tuple(sources)),
        out_shape=outputs,
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit,
        ),
        cost_estimate=_cost.over_all_keys(call),
        interpret=interpret,
        name="axattn_cached",
    )(*scalars(call, cut, limits), query, *vectors.values(), *sources.values())


def _spec(cut: Cut, shape: tuple[int, ...]) -> pl.BlockSpec:
    """A tile of ``[results or B or 1, K or 1, tiles, ...]``, all heads."""
    rows = shape[0]

    def index(core, i, tile, *_):
        result, tile = cut.place(core, i, tile)
        row = 0 if rows == 1 else result if rows == cut.results else result // cut.parts
        return row, 0, tile, 0, 0

    return pl.BlockSpec((1, shape[1], 1, *shape[3:]), index)


def _scratch(cut: Cut, sources: Mapping[str, jax.Array]) -> list[Any]:
    buffers = (
        pltpu.VMEM(cached_copies.buffer_shape(cut, name, array), array.dtype)
        for name, array in sources.items()
    )
    return [
        *buffers,
        pltpu.SemaphoreType.DMA((2, len(sources))),
        pltpu.SMEM((1,), jnp.int32),  # blocks copied so far: whose turn it is
        pltpu.VMEM((cut.kv_heads, cut.rows, cut.problem.value_head_dim), jnp.float32),
        pltpu.VMEM((cut.kv_heads, cut.rows, 2), jnp.float32),  # maximum and sum
    ]


def _joined(call: AttentionCall, cut: Cut, out, lse) -> tuple[jax.Array, jax.Array]:
    """One result per row of the batch, from those of its parts."""
    out = out.reshape(-1, cut.parts, *out.shape[1:])
    lse = lse.reshape(-1, cut.parts, *lse.shape[1:])
    top = lse.max(1, keepdims=True)
    share = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = share.sum(1)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = (out * share[..., None]).sum(1) / total[..., None]
    lse = jnp.where(empty, -jnp.inf, top[:, 0] + jnp.log(total))
    return out.astype(call.query.dtype), lse


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of the grid: its refs, and where it is."""

    cut: Cut
    precision: Any
    scalars: Scalars
    query: Any
    vectors: Mapping[str, Any]
    copies: Copies
    sums: Any  # [K, rows, h]
    state: Any  # [K, rows, 2]
    step: Any
    part: Any

    def span(self, i: int) -> jax.Array:
        return self.scalars.spans[self.step * 4 + i]

    def fetch(self, step, n) -> Fetch:
        """Block ``n`` of those that a step visits."""
        cut = self.cut
        batch = lax.div(step, jnp.int32(cut.tiles * cut.parts))
        return Fetch(batch, lax.rem(step, jnp.int32(cut.tiles)), self.scalars.spans[step * 4] + n)


def _kernel(cut: Cut, precision, vectors, sources, *arguments) -> None:
    refs = iter(arguments)

    def named(names):
        return {name: next(refs) for name in names}

    looked_up, query = Scalars(**named(Scalars._fields)), next(refs)
    vectors, hbm, out, lse = named(vectors), named(sources), next(refs), next(refs)
    buffers, (semaphores, turns, sums, state) = named(sources), refs
    copies = Copies(cut, looked_up, hbm, buffers, semaphores)
    core, i, tile = (pl.program_id(axis) for axis in range(3))
    result = core * cut.per_core + i
    step = _Step(
        cut,
        precision,
        looked_up,
        query,
        vectors,
        copies,
        sums,
        state,
        result * cut.tiles + tile,
        lax.rem(result, jnp.int32(cut.parts)),
    )

    @pl.when((i == 0) & (tile == 0))
    def _():
        turns[0] = 0
        first = looked_up.following[cut.results * cut.tiles + core]
        pl.when(first >= 0)(lambda: copies.start(step.fetch(first, 0), 0))

    @pl.when(result < cut.results)
    def _():
        _start(step)
        total, turn = step.span(3), turns[0]
        lax.fori_loop(0, total, functools.partial(_visit, step, turn), None)
        turns[0] = turn + total
        _finish(step, out, lse)


def _start(step: _Step) -> None:
    step.sums[...] = jnp.zeros_like(step.sums)
    shape = step.state.shape[:2]
    top, total = jnp.full((*shape, 1), -jnp.inf, jnp.float32), jnp.zeros((*shape, 1), jnp.float32)
    if "sinks" in step.vectors:
        # A sink is a key with its own logit and no value: the softmax (of one part) starts with it.
        sinks = columns(step.vectors["sinks"][0, :, 0], step.cut.rows)
        if step.cut.parts > 1:
            sinks = jnp.where(step.part == 0, sinks, -jnp.inf)
        top = jnp.broadcast_to(sinks, top.shape)
        total = jnp.where(top == -jnp.inf, 0.0, 1.0)
    step.state[:, :, 0:1] = top
    step.state[:, :, 1:2] = total


def _visit(step: _Step, turn, n, _) -> None:
    """The next block is sent for, this one waited for and computed on."""
    copies, slot = step.copies, (turn + n) & 1
    total = step.span(3)
    more = n + 1 < total
    following = jnp.where(more, step.step, step.scalars.following[step.step])
    to_come = step.fetch(jnp.maximum(following, 0), jnp.where(more, n + 1, 0))
    pl.when(following >= 0)(lambda: copies.start(to_come, 1 - slot))
    here = step.fetch(step.step, n)
    copies.wait(here, slot)
    full = (n >= step.span(1)) & (n < step.span(2))
    pl.when(full)(lambda: _compute(step, here, slot, partial=False))
    pl.when(jnp.logical_not(full))(lambda: _compute(step, here, slot, partial=True))


def _compute(step: _Step, here: Fetch, slot, *, partial: bool) -> None:
    cut = step.cut

    def of_heads(i, _):
        head = i * cut.together
        start = here.block * cut.block_kv
        tile = Tile(cut, step.vectors, step.copies.buffers, slot, start, head)
        _update(step, tile, step.scalars.ends[here.batch], partial=partial)
        return _

    count = cut.kv_heads // cut.together
    if count == 1:
        of_heads(0, None)
    else:
        lax.fori_loop(0, count, of_heads, None)


def _update(step: _Step, tile: Tile, end, *, partial: bool) -> None:
    """The online softmax of some heads, and their weighted values."""
    block = Scores(step.cut.problem, tile)
    heads = pl.ds(tile.head, step.cut.together)
    keys = _numbers(step, tile, "keys")
    features = 1 if "keys" in step.cut.turned else 2
    dots = _product(step.query[0, heads, 0], keys, features, step.precision)
    if tile.has("key_scales"):
        dots = dots * tile.of_keys("key_scales")
    scores, _ = block.scores(dots)
    allowed = None
    if partial:
        allowed = block.allowed()
        scores = jnp.where(allowed, scores, -jnp.inf)
    state = State(step.state[heads, :, 0:1], step.state[heads, :, 1:2])
    weights, decay, state = softmax(scores, state, 2)
    step.state[heads, :, 0:1], step.state[heads, :, 1:2] = state
    values, slots, scales = _values(step, tile, keys, end, partial=partial)
    if scales is not None:
        weights = weights * scales
        if partial:  # a scale may be NaN where no token is
            weights = jnp.where(present(allowed), weights, 0.0)
    summed = _product(weights.astype(values.dtype), values, slots, step.precision)
    step.sums[heads] = step.sums[heads] * decay + summed


def _values(step: _Step, tile: Tile, keys, end, *, partial: bool):
    """Values ``[heads, keys, h]`` or ``[heads, h, keys]``, zero where they could be NaN.

    With the axis of the keys, and scales or None.
    """
    cut = step.cut
    name, scales = ("values", "value_scales") if tile.has("values") else ("keys", "key_scales")
    slots = 2 if name in cut.turned else 1
    if name == "values":
        values = _numbers(step, tile, "values")
    elif slots == 2:
        values = keys[:, : cut.problem.value_head_dim]
    else:
        values = keys[:, :, : cut.problem.value_head_dim]
    if partial and cached_codes.may_be_nan(cut.stored):
        used = tile.used(end, slots)
        values = jnp.where(used, values, jnp.zeros((), values.dtype))
    return values, slots, tile.of_keys(scales) if tile.has(scales) else None


def _numbers(step: _Step, tile: Tile, name: str) -> jax.Array:
    cut = step.cut
    codes = tile.buffers[name][tile.slot, pl.ds(tile.head, cut.together)]
    return cached_codes.numbers(codes, cut.stored, cut.problem.dtype)


def _product(a: jax.Array, b: jax.Array, axis: int, precision: Any) -> jax.Array:
    """Per head, a's last axis with ``axis`` of b, in float32."""
    precision = precision_of(a, precision)
    return lax.dot_general(
        a,
        b,
        (((2,), (axis,)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _finish(step: _Step, out, lse) -> None:
    cut = step.cut

    def of_heads(i, _):
        heads = pl.ds(i * cut.together, cut.together)
        share, logs = finished(State(step.state[heads, :, 0:1], step.state[heads, :, 1:2]))
        out[0, heads, 0] = (step.sums[heads] * share).astype(out.dtype)
        lse[0, heads, 0, :, pl.ds(0, cut.rows)] = lanes(logs)
        return _

    lax.fori_loop(0, cut.kv_heads // cut.together, of_heads, None)
