"""Shared memory that a block of work takes: the kernels' `_scratch`, as Mosaic GPU lays it out."""

from __future__ import annotations

from typing import Any

from axattn.kernels.hopper.problem import ROWS

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
    aligned = sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in buffers)
    return aligned + (_REDUCTION if kernel == "forward" else 0) + _BARRIER * barriers


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
