"""Upper bounds of the blocks that a tile needs, from what is known of a mask while tracing."""

from __future__ import annotations

import numpy as np

from axattn._call import AttentionCall
from axattn._mask_parts import Causal, Static, Window
from axattn.kernels._problem import cdiv


def bound_blocks(call: AttentionCall, block_q: int, block_kv: int, major: str) -> np.ndarray:
    """Bound the blocks that each tile of the outer loop (``major``: "q" or "kv") needs.

    Structure in arrays (lengths, segments, offsets) excludes nothing.
    """
    before, after = _find_reach(call)
    own, other, length, others = block_q, block_kv, call.q_len, call.kv_len
    if major == "kv":
        own, other, length, others = other, own, others, length
        before, after = after, before
    starts = np.arange(0, length, own)
    ends = np.minimum(starts + own, length) - 1
    count = cdiv(others, other)
    first = np.zeros_like(starts) if before is None else (starts - before) // other
    last = np.full_like(starts, count) if after is None else (ends + after) // other + 1
    return np.maximum(np.clip(last, 0, count) - np.clip(first, 0, count), 0)


def _find_reach(call: AttentionCall) -> tuple[int | None, int | None]:
    """Find how far before and after itself a query sees; None: no bound is known."""
    before = after = None
    if call.q_positions is not None or call.kv_positions is not None:
        return before, after
    for part in call.mask.parts:
        if isinstance(part, Window):
            before, after = _take_smaller(before, part.left), _take_smaller(after, part.right)
        elif isinstance(part, Causal) and isinstance(part.offset, Static):
            after = _take_smaller(after, part.offset)
    return before, after


def _take_smaller(a: int | None, b: int | None) -> int | None:
    return a if b is None else int(b) if a is None else min(a, int(b))
