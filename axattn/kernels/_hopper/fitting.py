"""Block sizes that fit shared memory, as Mosaic GPU lays the kernels' scratch out."""

from __future__ import annotations

import dataclasses
from typing import Any

from axattn._call import AttentionCall
from axattn.kernels._hopper.block_sizes import (
    BackwardBlockSizes,
    DecodeBlockSizes,
    ForwardBlockSizes,
    MLABlockSizes,
    classify_call,
    find_row,
)
from axattn.kernels._hopper.kv_loader import KVLoader
from axattn.kernels._hopper.primitives import ROWS, SHARED_BYTES
from axattn.kernels._hopper.split_kv.decode import count_staged_columns
from axattn.kernels._masks import has_dense_mask

# Rows that a warpgroup cleans or converts at a time, and a score tile's columns.
_BLOCK_KV = 64

# More in flight than this hides no more latency.
_MOST_STAGES = 8

# Mosaic GPU starts every buffer at a multiple of this.
_ALIGNMENT = 1024
_BARRIER = 8
# What Pallas reserves in a kernel that reduces (`CompilerParams.reduction_scratch_bytes`).
_REDUCTION = 2048

_HALF, _FLOAT, _BYTE = 2, 4, 1


def choose_forward_block_sizes(call: AttentionCall) -> ForwardBlockSizes:
    sizes = _choose("forward", call)
    return sizes if call.stored is None else _fit_cache(sizes, call)


def choose_backward_block_sizes(call: AttentionCall) -> BackwardBlockSizes:
    return BackwardBlockSizes(_choose("query_grad", call), _choose("key_grad", call))


def choose_decode_block_sizes(call: AttentionCall) -> DecodeBlockSizes:
    """Return the most blocks in flight; one warpgroup where two leave no room."""
    choices = [DecodeBlockSizes(_BLOCK_KV, stages, 2) for stages in range(_MOST_STAGES, 0, -2)]
    choices += [DecodeBlockSizes(_BLOCK_KV, stages, 1) for stages in (3, 2, 1)]
    return _first_that_fits(call, choices, count_decode_bytes)


def choose_mla_block_sizes(call: AttentionCall) -> MLABlockSizes:
    choices = [MLABlockSizes(_BLOCK_KV, stages) for stages in range(_MOST_STAGES // 2, 0, -1)]
    return _first_that_fits(call, choices, count_mla_bytes)


def _choose(kernel: str, call: AttentionCall) -> Any:
    sizes, score_tiles = find_row(kernel, call), classify_call(call) == "biased"
    return shrink_to_fit(kernel, sizes, call.head_dim, call.value_head_dim, score_tiles=score_tiles)


def shrink_to_fit(
    kernel: str, sizes: Any, head_dim: int, value_head_dim: int, *, score_tiles: bool
) -> Any:
    """Return the sizes, or smaller ones where they do not fit shared memory.

    Those of the table fit their own head sizes. Where H and h are not those, the forward kernel has
    a buffer more.
    """
    heads = (head_dim, value_head_dim)
    while count_flash_bytes(kernel, sizes, *heads, score_tiles=score_tiles) > SHARED_BYTES:
        values = dataclasses.asdict(sizes)
        stages = {k: v for k, v in values.items() if k.endswith("stages") and v > 1}
        if stages:
            name = max(stages, key=stages.__getitem__)
            sizes = dataclasses.replace(sizes, **{name: stages[name] - 1})
        else:
            (name,) = (name for name in values if name.startswith("block"))
            sizes = dataclasses.replace(sizes, **{name: values[name] // 2})
    return sizes


def _fit_cache(sizes: ForwardBlockSizes, call: AttentionCall) -> ForwardBlockSizes:
    """Return sizes for a cache, whose blocks are cleaned and converted 64 rows at a time."""
    kv, score_tiles = KVLoader.from_call(call), classify_call(call) == "biased"
    # Converting 128 keys at a time takes more registers than there are.
    blocks = [
        n for n in (sizes.block_kv, ROWS) if n % ROWS == 0 and not (kv.is_quantized and n > ROWS)
    ]
    choices = [
        dataclasses.replace(sizes, block_kv=block, stages=stages)
        for block in dict.fromkeys(blocks)
        for stages in range(max(sizes.stages, 2), 0, -1)
    ]
    heads = (call.head_dim, call.value_head_dim)
    fitting = (
        one
        for one in choices
        if count_cache_bytes(one, kv, *heads, score_tiles=score_tiles) <= SHARED_BYTES
    )
    return next(fitting, choices[-1])


def _first_that_fits(call: AttentionCall, choices, count):
    """Return the first choice that shared memory holds, or else the last one."""
    kv = KVLoader.from_call(call)
    tile_bytes = 0
    if call.bias is not None:
        # In 4 bytes, also where a bias per head and key becomes one over rows and keys.
        tile_bytes += 4
    if has_dense_mask(call):
        tile_bytes += 1
    heads = call.head_dim, call.value_head_dim
    fitting = (one for one in choices if count(one, kv, *heads, tile_bytes) <= SHARED_BYTES)
    return next(fitting, choices[-1])


def count_flash_bytes(
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


def count_cache_bytes(
    tiles: Any, source: Any, head_dim: int, value_head_dim: int, *, score_tiles: bool
) -> int:
    """Bytes of a block of work of the forward kernel over a cache."""
    sizes = (head_dim, value_head_dim)
    total = count_flash_bytes("forward", tiles, *sizes, score_tiles=score_tiles) + 2 * _BARRIER
    if not source.is_quantized:
        return total
    # Operands of one block, and rings of codes in place of those of 16-bit numbers.
    own = [tiles.block_kv * size * _HALF for size in sizes]
    codes = [source.count_bytes(tiles.stages, tiles.block_kv, size) for size in sizes]
    return total - tiles.stages * sum(own) + _total([*own, *codes[0], *codes[1]], 0)


# ---- decode: one function per kernel ------------------------------------------------------------


def count_decode_bytes(tiles: Any, source: Any, head: int, value_head: int, tile_bytes: int) -> int:
    """Of `decode`; ``tile_bytes``: bytes per score of a bias and a mask over queries and keys."""
    groups, stages, keys = tiles.warpgroups, tiles.stages, tiles.block_kv
    buffers = [2 * ROWS * head * _HALF, groups * ROWS * _FLOAT]
    buffers.append(groups * ROWS * count_staged_columns(value_head) * _FLOAT)
    rings = [source.count_bytes(stages, keys, size) for size in (head, value_head)]
    if source.is_quantized:
        sizes = {head, value_head}
        buffers += [groups * keys * size * _HALF for size in sizes]
    buffers += [stages * ROWS * keys * tile_bytes]
    barriers = 2 * 2 + 4 * _ring(stages)
    return _total([*buffers, *rings[0], *rings[1]], barriers)


def count_mla_bytes(tiles: Any, source: Any, head: int, value_head: int, tile_bytes: int) -> int:
    """Of `decode_mla`."""
    stages, keys = tiles.stages, tiles.block_kv
    buffers = [ROWS * head * _HALF, ROWS * keys * _HALF, 2 * ROWS * _FLOAT]
    if source.is_quantized:
        buffers.append(keys * head * _HALF)
    buffers += [stages * ROWS * keys * tile_bytes]
    barriers = 3 * 2 + 1 + 3 * _ring(stages)
    return _total([*buffers, *source.count_bytes(stages, keys, head)], barriers)


def _total(buffers: list[int], barriers: int) -> int:
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in buffers) + _BARRIER * barriers
