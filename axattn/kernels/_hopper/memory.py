"""Shared memory that a block of work takes: the kernels' `_scratch`, as Mosaic GPU lays it out."""

from __future__ import annotations

from typing import Any

from axattn.kernels._hopper.rows import ROWS

# Dynamic shared memory of one block on Hopper: 227 KiB.
SHARED_BYTES = 232_448

# Mosaic GPU starts every buffer at a multiple of this.
_ALIGNMENT = 1024
_BARRIER = 8
# What Pallas reserves in a kernel that reduces (`CompilerParams.reduction_scratch_bytes`).
_REDUCTION = 2048

_HALF, _FLOAT, _BYTE = 2, 4, 1


def shared_bytes(
    kernel: str, tiles: Any, head_dim: int, value_head_dim: int, *, score_tiles: bool
) -> int:
    """Bytes of a block of work.

    Args:
      kernel: ``"forward"``, ``"query_grad"`` or ``"key_grad"``.
      tiles: its tiles.
      score_tiles: count tiles of a bias and a mask over queries and keys, at their largest: a
        float32 bias together with a mask array.
    """
    buffers, barriers = _SCRATCH[kernel](tiles, head_dim, value_head_dim)
    if score_tiles:
        stages, rows, columns = _SCORE_TILES[kernel](tiles)
        buffers = buffers + [stages * rows * columns * size for size in (_FLOAT, _BYTE)]
        barriers += 2 * _ring(stages)
    return _total(buffers, barriers) + (_REDUCTION if kernel == "forward" else 0)


def _ring(stages: int) -> int:
    """Barriers of a ring: each set is full at times, and free at times."""
    return 2 * stages


def _forward(tiles: Any, head: int, value_head: int) -> tuple[list[int], int]:
    rows, keys, stages = ROWS * tiles.warpgroups, tiles.block_kv, tiles.stages
    buffers = [
        rows * head * _HALF,
        rows * _FLOAT,  # the LSE
        stages * keys * head * _HALF,
        stages * keys * value_head * _HALF,
    ]
    if head != value_head:  # else the output takes the query's place
        buffers.append(rows * value_head * _HALF)
    turns = 1 if tiles.warpgroups == 2 else 0
    return buffers, 2 * _ring(stages) + tiles.warpgroups + turns


def _query_grad(tiles: Any, head: int, value_head: int) -> tuple[list[int], int]:
    rows, keys = ROWS * tiles.warpgroups, tiles.block_kv
    buffers = [
        rows * head * _HALF,
        rows * value_head * _HALF,
        tiles.key_stages * keys * head * _HALF,
        tiles.value_stages * keys * value_head * _HALF,
    ]
    return buffers, _ring(tiles.key_stages) + _ring(tiles.value_stages) + tiles.warpgroups


def _key_grad(tiles: Any, head: int, value_head: int) -> tuple[list[int], int]:
    shares = 1 if tiles.split else tiles.warpgroups
    keys, rows, stages = ROWS * shares, tiles.block_q, tiles.stages
    vectors = stages * rows * _FLOAT
    buffers = [
        keys * head * _HALF,
        keys * value_head * _HALF,
        stages * rows * head * _HALF,
        vectors,
        stages * rows * value_head * _HALF,
        vectors,
    ]
    return buffers, 2 * _ring(stages) + shares + (1 if tiles.split else 0)


_SCRATCH = {"forward": _forward, "query_grad": _query_grad, "key_grad": _key_grad}

# Stages, rows and columns of the tiles over queries and keys.
_SCORE_TILES = {
    "forward": lambda tiles: (tiles.stages, ROWS * tiles.warpgroups, tiles.block_kv),
    "query_grad": lambda tiles: (1, ROWS * tiles.warpgroups, tiles.block_kv),
    "key_grad": lambda tiles: (
        tiles.stages,
        ROWS * (1 if tiles.split else tiles.warpgroups),
        tiles.block_q,
    ),
}


def cache_bytes(
    tiles: Any, source: Any, head_dim: int, value_head_dim: int, *, score_tiles: bool
) -> int:
    """Bytes of a block of work of the forward kernel over a cache."""
    sizes = (head_dim, value_head_dim)
    total = shared_bytes("forward", tiles, *sizes, score_tiles=score_tiles) + 2 * _BARRIER
    if not source.scaled:
        return total
    # Operands of one block, and rings of codes in place of those of 16-bit numbers.
    own = [tiles.block_kv * size * _HALF for size in sizes]
    codes = [source.stored_bytes(tiles.stages, tiles.block_kv, size) for size in sizes]
    return total - tiles.stages * sum(own) + _total([*own, *codes[0], *codes[1]], 0)


# ---- decode: one function per kernel ------------------------------------------------------------


def decode_bytes(tiles: Any, source: Any, head: int, value_head: int, tile_bytes: int) -> int:
    """Of `decode`; ``tile_bytes``: bytes per score of a bias and a mask over queries and keys."""
    groups, stages, keys = tiles.warpgroups, tiles.stages, tiles.block_kv
    buffers = [2 * ROWS * head * _HALF, groups * ROWS * _FLOAT]
    buffers.append(groups * ROWS * staged_columns(value_head) * _FLOAT)
    rings = [source.stored_bytes(stages, keys, size) for size in (head, value_head)]
    if source.scaled:
        sizes = {head, value_head}
        buffers += [groups * keys * size * _HALF for size in sizes]
    buffers += [stages * ROWS * keys * tile_bytes]
    barriers = 2 * 2 + 4 * _ring(stages)
    return _total([*buffers, *rings[0], *rings[1]], barriers)


def latent_bytes(tiles: Any, source: Any, head: int, value_head: int, tile_bytes: int) -> int:
    """Of `latent`."""
    stages, keys = tiles.stages, tiles.block_kv
    buffers = [ROWS * head * _HALF, ROWS * keys * _HALF, 2 * ROWS * _FLOAT]
    if source.scaled:
        buffers.append(keys * head * _HALF)
    buffers += [stages * ROWS * keys * tile_bytes]
    barriers = 3 * 2 + 1 + 3 * _ring(stages)
    return _total([*buffers, *source.stored_bytes(stages, keys, head)], barriers)


def staged_columns(value_head_dim: int) -> int:
    """Columns of a result that `decode` sends to HBM at a time: large heads leave little room."""
    fitting = (64, 32, 16) if value_head_dim <= 192 else (32, 16)
    return next(n for n in fitting if value_head_dim % n == 0)


def _total(buffers: list[int], barriers: int) -> int:
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in buffers) + _BARRIER * barriers
