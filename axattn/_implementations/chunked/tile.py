"""One (query block, key/value block) pair of the chunked path: its slices and its scores.

No array is padded to whole blocks. The last block starts earlier, so that it ends with the array;
the slots that it shares with the block before are masked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from axattn._call import AttentionCall
from axattn._implementations.chunked.block_sizes import ChunkSizes, list_chunks
from axattn._implementations.scores import cap_scores, compute_bias, compute_mask
from axattn._jax_compat import is_known
from axattn._mask_parts import PARTIAL, BlockLayout, Span
from axattn._masks import find_q_lengths, zero_unused


@dataclasses.dataclass(frozen=True)
class ChunkGrid:
    """A call and its blocks."""

    call: AttentionCall
    blocks: ChunkSizes
    layout: BlockLayout
    row: int | jax.Array = 0  # where the call begins in the whole call
    head: int | jax.Array = 0

    @classmethod
    def from_call(cls, call: AttentionCall, blocks: ChunkSizes, row=0, head=0) -> ChunkGrid:
        return cls(call, blocks, call.layout(blocks.q, blocks.kv), row, head)

    @property
    def q_has_tail(self) -> bool:
        return self.call.q_len % self.blocks.q != 0

    @property
    def kv_has_tail(self) -> bool:
        return self.call.kv_len % self.blocks.kv != 0

    def make_q_span(self, i: int | jax.Array) -> Span:
        return _slice_block(i, self.blocks.q, self.call.q_len, self.layout.q_positions)

    def make_kv_span(self, j: int | jax.Array) -> Span:
        return _slice_block(j, self.blocks.kv, self.call.kv_len, self.layout.kv_positions)

    def find_own_rows(self, i: int | jax.Array, q: Span) -> jax.Array:
        """Find the rows ``[q]`` of block ``i`` that belong to no earlier block."""
        return q.slots >= i * self.blocks.q

    def take_query_rows(self, array: jax.Array, q: Span, *, clean: bool = False) -> jax.Array:
        """Slice slots ``q`` of ``[B, T, N, ...]``; ``clean`` zeroes those from the length on."""
        rows = lax.dynamic_slice_in_dim(array, q.start, q.size, 1)
        return zero_unused(rows, q.slots, find_q_lengths(self.call.mask)) if clean else rows

    def compute_mask(
        self, i: int | jax.Array, j: int | jax.Array, q: Span, kv: Span, *, fresh_rows: bool
    ) -> jax.Array | None:
        """Compute the mask of a partial block, like ``[B, K, G, q, kv]``, or None for all True."""
        ok = compute_mask(self.call, q, kv)
        if self.kv_has_tail:
            fresh = (kv.slots >= j * self.blocks.kv)[None, None, None, None]
            ok = fresh if ok is None else ok & fresh
        if fresh_rows and self.q_has_tail:
            fresh = self.find_own_rows(i, q)[None, None, None, :, None]
            ok = fresh if ok is None else ok & fresh
        return ok

    def take_part(self, array: jax.Array) -> jax.Array:
        """Slice the rows and heads of this part of the call from ``[B, T, N, ...]``."""
        call = self.call
        sizes = (call.batch, call.q_len, call.num_heads, *array.shape[3:])
        if sizes == array.shape:
            return array
        start = make_start(array.ndim, self.row, 0, self.head)
        return lax.dynamic_slice(array, start, sizes)

    @property
    def scores_are_scaled_dots(self) -> bool:
        """Whether scores are ``scale * dots`` with a positive scale, and in the order of dots."""
        call = self.call
        others = (call.logits_soft_cap, call.bias, call.alibi_slopes, call.traced_scale)
        return call.scale > 0 and all(other is None for other in others)

    @property
    def score_unit(self) -> float:
        """The factor that the softmax still multiplies scores by, as it does for free.

        A scaled tile would be one more array to write and to read: XLA:CPU fuses the factor into
        the exponential, but not into the maximum.
        """
        return self.call.scale if self.scores_are_scaled_dots else 1.0

    def compute_scores(
        self,
        dots: jax.Array,
        q: Span,
        kv: Span,
        *,
        turn: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the scores before the mask, and the capped products (for the cap's derivative).

        ``turn`` brings a bias ``[B, K, G, q, kv]`` into the order of ``dots``.
        """
        capped = cap_scores(self.call, dots)
        bias = compute_bias(self.call, q, kv)
        if bias is None:
            return capped, capped
        return capped + (bias if turn is None else turn(bias)), capped

    def sweep_keys(
        self, i: int | jax.Array, row: jax.Array, step: Callable, state: Any, *, fresh_rows: bool
    ) -> Any:
        """Run ``state = step(j, state, partial)`` over the blocks that query block ``i`` needs.

        ``row`` has the block states of ``i``. ``partial`` (static) says that the mask must be
        evaluated. With ``fresh_rows`` the rows that a tail block shares are masked too, so all of
        its blocks are partial.
        """
        num_kv = self.layout.num_kv
        if num_kv == 1:
            return step(0, state, True)
        tail_rows = fresh_rows and self.q_has_tail
        if not self.call.mask.parts and not tail_rows:
            # With static trip counts XLA, and its cost analysis, know the work.
            whole = num_kv - self.kv_has_tail
            state = lax.fori_loop(0, whole, lambda j, state: step(j, state, False), state)
            return step(num_kv - 1, state, True) if self.kv_has_tail else state
        if tail_rows:
            row = jnp.where(i == self.layout.num_q - 1, jnp.minimum(row, PARTIAL), row)
        if is_known(lambda: self.blocks.q * self.call.group < 128, otherwise=False):
            # For few rows the mask costs nothing. One loop over all blocks lets XLA choose one
            # layout for the cache; with two loops it copied the cache.
            row = jnp.minimum(row, PARTIAL)
            _, chunks = list_chunks(row, num_kv, self.kv_has_tail)
            return lax.fori_loop(
                0, chunks.count, lambda n, state: step(chunks.order[n], state, True), state
            )
        full, partial = list_chunks(row, num_kv, self.kv_has_tail)
        state = lax.fori_loop(
            0, full.count, lambda n, state: step(full.order[n], state, False), state
        )
        return lax.fori_loop(
            0, partial.count, lambda n, state: step(partial.order[n], state, True), state
        )


def run_parts(
    call: AttentionCall, blocks: ChunkSizes, run: Callable[[ChunkGrid, Any], Any], results: Any
) -> Any:
    """Run ``results = run(grid, results)`` over what runs one after the other: rows, heads."""
    groups = call.num_kv_heads // blocks.heads

    def run_part(row, group, results):
        part = call.row(row) if blocks.by_row else call
        if groups > 1:
            part = part.heads(group * blocks.heads, blocks.heads)
        head = group * blocks.heads * call.group
        return run(ChunkGrid.from_call(part, blocks, row, head), results)

    def run_row(row, results):
        if groups == 1:
            return run_part(row, 0, results)
        return lax.fori_loop(0, groups, functools.partial(run_part, row), results)

    if not blocks.by_row:
        return run_row(0, results)
    return lax.fori_loop(0, call.batch, run_row, results)


def make_start(ndim: int, *first: int | jax.Array) -> tuple[jax.Array, ...]:
    """Make the start of a dynamic slice from its first indices: one dtype, under x64, too."""
    return tuple(jnp.asarray(n, jnp.int32) for n in (*first, *[0] * (ndim - len(first))))


def _slice_block(block: int | jax.Array, size: int, length: int, positions: jax.Array) -> Span:
    start = jnp.minimum(block * size, length - size)
    return Span(start, size, lax.dynamic_slice_in_dim(positions, start, size, 1))
