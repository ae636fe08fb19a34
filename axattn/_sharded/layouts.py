"""Where tokens are: which positions each shard of a sequence has, and which shards need which.

Shard r of n has the slots ``[r S / n, (r + 1) S / n)``. Its positions are, by layout::

    contiguous   those same numbers
    zigzag       of 2n chunks the r-th and the r-th from behind: causal masks then leave every shard
                 the same work (as in Llama-3's training, arXiv:2407.21783, section 3.3.2)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from axattn import _mask_parts as parts
from axattn._masks import Mask

LAYOUTS = ("contiguous", "zigzag")

_FAR = 1 << 40


def check(layout: str) -> None:
    """ValueError for another one."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout takes one of {LAYOUTS}, got {layout!r}")


def runs(layout: str, shards: int, length: int) -> list[list[tuple[int, int]]]:
    """Per shard its runs of consecutive positions, (first, last) each.

    Raises:
      ValueError: another layout, or a length that its chunks do not divide.
    """
    check(layout)
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
    """The position of every slot: also the order that brings tokens there.

    In "zigzag" a shard has one early and one late chunk, so that causal masks leave every shard the
    same work (as in https://arxiv.org/abs/2407.21783, section 3.3.2).

    Args:
      layout: "contiguous" or "zigzag".
      shards: of the sequence.
      length: tokens of the whole; a multiple of ``shards``, or of twice as many for "zigzag".

    Returns:
      numpy int32 ``[length]``.

    Raises:
      ValueError: another layout, or a length that its chunks do not divide.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn import parallel
      >>> order = parallel.positions("zigzag", shards=2, length=8)
      >>> order.tolist()
      [0, 1, 6, 7, 2, 3, 4, 5]
      >>> tokens = jnp.arange(8)[order]  # as layout="zigzag" has them; argsort brings them back
      >>> tokens[order.argsort()].tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    found = runs(layout, shards, length)
    return np.concatenate([np.arange(a, b + 1, dtype=np.int32) for row in found for a, b in row])


def of_slots(layout: str, slots: jax.Array, shards: int, length: int) -> jax.Array:
    """The same of some slots, while a program runs: nothing of the sequence's length is stored."""
    if layout == "contiguous":
        return slots
    own = length // shards
    shard, within = slots // own, slots % own
    chunk = own // 2
    return jnp.where(
        within < chunk, shard * chunk + within, (2 * shards - 2 - shard) * chunk + within
    )


def reach(mask: Mask, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last position that a query at a position sees, by what is known while tracing.

    Both grow with the position.
    """
    query = np.asarray(query, np.int64)
    first, last = np.full_like(query, -_FAR), np.full_like(query, _FAR)
    for part in mask.parts:
        if isinstance(part, parts.Causal) and isinstance(part.offset, int):
            last = np.minimum(last, query + part.offset)
        elif isinstance(part, parts.Prefix) and isinstance(part.length, int):
            last = np.minimum(last, np.maximum(query, part.length - 1))
        elif isinstance(part, parts.Window):
            if part.left is not None:
                first = np.maximum(first, query - part.left)
            if part.right is not None:
                last = np.minimum(last, query + part.right)
    return first, last


def hops(mask: Mask, layout: str | None, shards: int, q_len: int, kv_len: int) -> tuple[int, ...]:
    """The distances at which some shard needs another's keys: 0, and those that the mask leaves.

    At distance d shard r has the keys of shard r - d. ``layout`` None: positions that are not known
    here, and all distances.
    """
    if layout is None:
        return tuple(range(shards))
    queries, keys = (np.array(runs(layout, shards, n)) for n in (q_len, kv_len))
    first, last = reach(mask, queries[..., 0])[0], reach(mask, queries[..., 1])[1]
    # [shard of queries, their run, shard of keys, their run]
    needed = keys[..., 1] >= first[..., None, None]
    needed &= keys[..., 0] <= last[..., None, None]
    r, s = np.nonzero(needed.any((1, 3)))
    return tuple(sorted({0, *((r - s) % shards).tolist()}))


def speaks_of_positions(mask: Mask) -> bool:
    return any(isinstance(p, parts.Causal | parts.Window | parts.Prefix) for p in mask.parts)
