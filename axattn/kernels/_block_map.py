"""The block map: which blocks a kernel computes for each tile, full ones before partial ones.

Four numbers per tile suffice for masks that are intervals (causal, windows, lengths, prefixes). For
masks with holes (segments, arrays, given key positions) the blocks are listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn._mask_parts import EMPTY, FULL, PARTIAL, Dense, Segments
from axattn._masks import make_block_row_states
from axattn._stored import UNUSED_POSITION
from axattn.kernels._masks import RowBounds


class BlockMap(NamedTuple):
    """The blocks of each tile, as arrays that a kernel reads."""

    # int32 [B or 1, tiles, 4]: first block, partial blocks before the full ones, full blocks, all.
    spans: jax.Array
    # int32 [B or 1, tiles, blocks]: the blocks in the order of computing, or None.
    order: jax.Array | None

    def as_arrays(self) -> dict[str, jax.Array]:
        """Return what a kernel takes, by name."""
        return {name: array for name, array in self._asdict().items() if array is not None}


def may_have_partial_blocks(call: AttentionCall) -> bool:
    """Say whether the mask may make a block partial; the last block of keys may be, besides."""
    return bool(call.mask.parts) or call.kv_positions is not None


def map_key_blocks(
    call: AttentionCall, block_q: int, block_kv: int, *, longest_list: int | None = None
) -> BlockMap:
    """Map each tile of ``block_q`` query slots to its key blocks.

    If a list had more than ``longest_list`` entries, all blocks from the first to the last of a
    tile are computed, as partial ones.
    """
    states = _compute_block_states(call, block_q, block_kv)
    if call.kv_len % block_kv:
        # The last block has slots that are no keys.
        states = states.at[:, :, -1].min(PARTIAL)
    return _make_block_map(call, states, longest_list)


def map_query_blocks(
    call: AttentionCall, block_q: int, block_kv: int, *, longest_list: int | None = None
) -> BlockMap:
    """Map each tile of ``block_kv`` key slots to its query blocks."""
    return _make_block_map(
        call, _compute_block_states(call, block_q, block_kv).swapaxes(1, 2), longest_list
    )


def span_few_rows(call: AttentionCall, bounds: RowBounds, block_kv: int) -> jax.Array:
    """Find the key blocks of one tile with all query rows, as spans ``[B or 1, 1, 4]``.

    There is no list: the holes of a mask are computed as partial blocks.
    """
    low, high = bounds
    count = -(-call.kv_len // block_kv)
    zero = jnp.zeros((), jnp.int32)
    if call.kv_positions is not None:
        # Positions may be in any order, as in a ring: take all blocks up to the last used slot.
        slots = jnp.arange(1, call.kv_len + 1, dtype=jnp.int32)[None]
        used = jnp.where(call.kv_positions < UNUSED_POSITION, slots, 0).max(1)
        total = jnp.where(high.max(1) > -UNUSED_POSITION, -(-used // block_kv), 0)
        return _join_spans(zero, zero, zero, total)
    first = zero if low is None else jnp.clip(low.min(1) // block_kv, 0, count)
    last = jnp.clip(-(-high.max(1) // block_kv), 0, count)
    total = jnp.maximum(last - first, 0)
    if _has_holes(call):
        return _join_spans(first, zero, zero, total)
    first_full = zero if low is None else jnp.maximum(-(-low.max(1) // block_kv), 0)
    last_full = jnp.minimum(high.min(1), call.kv_len) // block_kv
    full = jnp.maximum(last_full - first_full, 0)
    return _join_spans(first, jnp.where(full > 0, first_full - first, 0), full, total)


def _join_spans(*numbers: jax.Array) -> jax.Array:
    """Join four numbers, each ``[B or 1]`` or a scalar, to ``[B or 1, 1, 4]``."""
    return _stack_numbers(*jnp.broadcast_arrays(*numbers)).reshape(-1, 1, 4)


def _compute_block_states(call: AttentionCall, block_q: int, block_kv: int) -> jax.Array:
    layout = call.layout(block_q, block_kv)
    rows = jax.vmap(make_block_row_states(call.mask, layout))(
        jnp.arange(layout.num_q, dtype=jnp.int32)
    )
    states = jnp.moveaxis(rows, 0, 1)
    if call.kv_positions is not None:
        # Masked keys have far positions. Parts of the mask may not know that.
        nearest, farthest = layout.kv_range(call.kv_positions)
        most = jnp.where(
            nearest >= UNUSED_POSITION, EMPTY, jnp.where(farthest >= UNUSED_POSITION, PARTIAL, FULL)
        )
        states = jnp.minimum(states, most[:, None].astype(states.dtype))
    return states


def _make_block_map(call: AttentionCall, states: jax.Array, longest_list: int | None) -> BlockMap:
    """Make the map from block states ``[B or 1, tiles, blocks]``."""
    some, full = states != EMPTY, states == FULL
    if _has_holes(call) and longest_list is not None and states.size > longest_list:
        full = jnp.zeros_like(full)
    elif _has_holes(call):
        # A stable sort keeps the order among blocks of one state.
        order = jnp.argsort(-states.astype(jnp.int32), axis=-1, stable=True).astype(jnp.int32)
        zero = jnp.zeros(states.shape[:2], jnp.int32)
        return BlockMap(_stack_numbers(zero, zero, full.sum(-1), some.sum(-1)), order)
    count = states.shape[-1]
    index = jnp.arange(count)[None, None]
    first = jnp.argmax(some, -1)
    last = count - jnp.argmax(some[..., ::-1], -1)
    first_full = jnp.argmax(full, -1)
    # Count the full blocks that follow the first full one without a gap.
    behind = jnp.where((index >= first_full[..., None]) & ~full, index, count).min(-1)
    num_full = jnp.where(full.any(-1), behind - first_full, 0)
    before = jnp.where(num_full > 0, first_full - first, 0)
    return BlockMap(
        _stack_numbers(first, before, num_full, jnp.where(some.any(-1), last - first, 0)), None
    )


def _stack_numbers(*numbers: jax.Array) -> jax.Array:
    return jnp.stack([number.astype(jnp.int32) for number in numbers], -1)


def _has_holes(call: AttentionCall) -> bool:
    kinds = {type(part) for part in call.mask.parts}
    return bool(kinds & {Dense, Segments}) or call.kv_positions is not None


class TileBlocks(NamedTuple):
    """The blocks of one tile inside a kernel: scalars, and the row of the order in HBM."""

    first: jax.Array
    before: jax.Array
    full: jax.Array
    total: jax.Array
    order: Any | None

    @classmethod
    def load(cls, gmem: Mapping[str, Any], batch: jax.Array, tile: jax.Array) -> TileBlocks:
        spans = gmem["spans"]
        row = batch if spans.shape[0] > 1 else jnp.int32(0)
        first, before, full, total = (spans[row, tile, jnp.int32(i)] for i in range(4))
        order = gmem["order"].at[row, tile] if "order" in gmem else None
        return cls(first, before, full, total, order)

    def block(self, n: jax.Array) -> jax.Array:
        """Return the ``n``-th block: full ones for n < ``full``, partial ones after them."""
        if self.order is not None:
            return self.order[n]
        left = n - self.full
        partial = jnp.where(left < self.before, self.first + left, self.first + n)
        return jnp.where(n < self.full, self.first + self.before + n, partial)
