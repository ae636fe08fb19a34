"""Layouts of a sequence: the positions on each shard, and which shards need which.

Shard r of n has the slots ``[r S / n, (r + 1) S / n)``. Its positions are, by layout::

    contiguous   those same numbers
    zigzag       of 2n chunks, the r-th from the front and the r-th from the end: every shard then
                 has the same work under causal masks (as in Llama-3's training,
                 arXiv:2407.21783, section 3.3.2)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from axattn import _mask_parts as parts
from axattn._masks import Mask

LAYOUTS = ("contiguous", "zigzag")

_FAR = 1 << 40


def check_layout(layout: str) -> None:
    """Raise ValueError for an unknown layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout takes one of {LAYOUTS}, got {layout!r}")


def check_length(layout: str, shards: int, length: int) -> None:
    """Raise ValueError for an unknown layout, or a length that its chunks do not divide."""
    check_layout(layout)
    chunks = _count_chunks(layout, shards)
    if length % chunks:
        raise ValueError(
            f"layout {layout!r} takes lengths that are a multiple of {chunks} on {shards} shards, "
            f"got {length}"
        )


def _count_chunks(layout: str, shards: int) -> int:
    return shards if layout == "contiguous" else 2 * shards


def list_chunks(layout: str, shards: int, length: int) -> list[list[tuple[int, int]]]:
    """Return for each shard its chunks of consecutive positions, (first, last) each.

    Raises:
      ValueError: as `check_length`.
    """
    check_length(layout, shards, length)
    chunks = _count_chunks(layout, shards)
    size = length // chunks

    def bound_chunk(chunk: int) -> tuple[int, int]:
        return chunk * size, (chunk + 1) * size - 1

    if layout == "contiguous":
        return [[bound_chunk(r)] for r in range(shards)]
    return [[bound_chunk(r), bound_chunk(chunks - 1 - r)] for r in range(shards)]


def positions(layout: str, shards: int, length: int) -> np.ndarray:
    """Return the position of every slot, which is also the order to permute tokens by.

    In "zigzag" a shard has one early and one late chunk, and so every shard has the same work under
    causal masks (as in https://arxiv.org/abs/2407.21783, section 3.3.2).

    Args:
      layout: "contiguous" or "zigzag".
      shards: number of shards of the sequence.
      length: tokens of the whole sequence; a multiple of ``shards``, for "zigzag" of twice as many.

    Returns:
      numpy int32 ``[length]``.

    Raises:
      ValueError: an unknown layout, or a length that its chunks do not divide.

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
    chunks = [chunk for row in list_chunks(layout, shards, length) for chunk in row]
    return np.concatenate([np.arange(a, b + 1, dtype=np.int32) for a, b in chunks])


def compute_positions(layout: str, slots: jax.Array, shards: int, length: int) -> jax.Array:
    """Compute the positions of some slots in the program, without a constant of ``length``."""
    if layout == "contiguous":
        return slots
    size = length // shards
    shard, within = slots // size, slots % size
    chunk = size // 2
    return jnp.where(
        within < chunk, shard * chunk + within, (2 * shards - 2 - shard) * chunk + within
    )


def compute_key_range(mask: Mask, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last position that each query position sees.

    Mask parts whose numbers are traced do not count. Both results grow with the position.
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


def list_ring_distances(
    mask: Mask, layout: str | None, shards: int, q_len: int, kv_len: int
) -> tuple[int, ...]:
    """Return the distances of the ring steps that the mask does not empty; 0 is always there.

    At distance d shard r attends to the keys of shard r - d. With ``layout`` None the positions are
    not known while tracing, and all distances are returned.
    """
    if layout is None:
        return tuple(range(shards))
    queries, keys = (np.array(list_chunks(layout, shards, n)) for n in (q_len, kv_len))
    first, _ = compute_key_range(mask, queries[..., 0])
    _, last = compute_key_range(mask, queries[..., 1])
    # [shard of queries, their chunk, shard of keys, their chunk]
    needed = keys[..., 1] >= first[..., None, None]
    needed &= keys[..., 0] <= last[..., None, None]
    r, s = np.nonzero(needed.any((1, 3)))
    return tuple(sorted({0, *((r - s) % shards).tolist()}))


def clip_length(length: jax.Array, first: jax.Array | int, size: int) -> jax.Array:
    """Return how many of the ``size`` slots from ``first`` on lie below ``length``."""
    return jnp.clip(length - first, 0, size)


def uses_positions(mask: Mask) -> bool:
    """Return whether a part of the mask compares positions."""
    return any(isinstance(p, parts.Causal | parts.Window | parts.Prefix) for p in mask.parts)
