"""Where tokens are: which positions each shard of a sequence has, and which shards need which.

Shard r of n has the slots ``[r S / n, (r + 1) S / n)``. Its positions are, by layout:

    contiguous   those same numbers
    zigzag       of 2n chunks the r-th and the r-th from behind: causal masks then leave every shard
                 the same work (as in Llama-3's training, arXiv:2407.21783, section 3.3.2)
"""

from __future__ import annotations

import numpy as np

from axattn import mask_parts as parts
from axattn.masks import Mask

LAYOUTS = ("contiguous", "zigzag")


def runs(layout: str, shards: int, length: int) -> list[list[tuple[int, int]]]:
    """Per shard its runs of consecutive positions, (first, last) each.

    Raises:
      ValueError: another layout, or a length that its chunks do not divide.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout takes one of {LAYOUTS}, got {layout!r}")
    chunks = shards if layout == "contiguous" else 2 * shards
    if length % chunks:
        raise ValueError(
            f"layout {layout!r} takes lengths that are a multiple of {chunks} on {shards} shards, "
            f"got {length}"
        )
    size = length // chunks

    def run(chunk: int) -> tuple[int, int]:
        return chunk * size, (chunk + 1) * size - 1

    if layout == "contiguous":
        return [[run(r)] for r in range(shards)]
    return [[run(r), run(chunks - 1 - r)] for r in range(shards)]


def positions(layout: str, shards: int, length: int) -> np.ndarray:
    """The position of every slot, int32 ``[length]``: also the order that brings tokens there.

    >>> positions("zigzag", 2, 8).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    found = runs(layout, shards, length)
    return np.concatenate([np.arange(a, b + 1, dtype=np.int32) for row in found for a, b in row])


def may_attend(mask: Mask, query: tuple[int, int], key: tuple[int, int]) -> bool:
    """Whether a run of queries may see any of a run of keys, by what is known while tracing."""
    return all(_part_allows(part, *query, *key) for part in mask.parts)


def _part_allows(part, q_first: int, q_last: int, k_first: int, k_last: int) -> bool:
    if isinstance(part, parts.Causal) and isinstance(part.offset, int):
        return q_last + part.offset >= k_first
    if isinstance(part, parts.Window):
        left = part.left is None or k_last >= q_first - part.left
        return left and (part.right is None or k_first <= q_last + part.right)
    if isinstance(part, parts.Prefix) and isinstance(part.length, int):
        return k_first < part.length or q_last >= k_first
    return True


def hops(mask: Mask, layout: str | None, shards: int, q_len: int, kv_len: int) -> tuple[int, ...]:
    """The distances at which some shard needs another's keys: 0, and those that the mask leaves.

    At distance d shard r has the keys of shard r - d. ``layout`` None: positions that are not known
    here, and all distances.
    """
    if layout is None:
        return tuple(range(shards))
    queries, keys = runs(layout, shards, q_len), runs(layout, shards, kv_len)

    def needed(distance: int) -> bool:
        return any(
            may_attend(mask, q, k)
            for r in range(shards)
            for q in queries[r]
            for k in keys[(r - distance) % shards]
        )

    return (0, *(d for d in range(1, shards) if needed(d)))


def allowed(mask: Mask, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Which positions attend to which, bool, by what is known while tracing; arrays broadcast."""
    found = np.ones(np.broadcast_shapes(query.shape, key.shape), bool)
    for part in mask.parts:
        if isinstance(part, parts.Causal) and isinstance(part.offset, int):
            found &= query + part.offset >= key
        elif isinstance(part, parts.Prefix) and isinstance(part.length, int):
            found &= (key < part.length) | (query >= key)
        elif isinstance(part, parts.Window):
            if part.left is not None:
                found &= key >= query - part.left
            if part.right is not None:
                found &= key <= query + part.right
    return found


def speaks_of_positions(mask: Mask) -> bool:
    return any(isinstance(p, parts.Causal | parts.Window | parts.Prefix) for p in mask.parts)
