"""One (query block, key/value block) pair of the chunked path: its slices and its scores.

No array is padded to whole blocks. The last block starts earlier, so that it ends with the array;
the slots that it shares with the block before are masked.
"""

from __future__ import annotations

import dataclasses
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

    @classmethod
    def from_call(cls, call: AttentionCall, blocks: ChunkSizes) -> ChunkGrid:
        return cls(call, blocks, call.layout(blocks.q, blocks.kv))

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

    def compute_scores(self, dots: jax.Array, q: Span, kv: Span) -> tuple[jax.Array, jax.Array]:
        """Return the scores before the mask, and the capped products (for the cap's derivative)."""
        capped = cap_scores(self.call, dots)
        bias = compute_bias(self.call, q, kv)
        return (capped if bias is None else capped + bias), capped

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


def _slice_block(block: int | jax.Array, size: int, length: int, positions: jax.Array) -> Span:
    start = jnp.minimum(block * size, length - size)
    return Span(start, size, lax.dynamic_slice_in_dim(positions, start, size, 1))
