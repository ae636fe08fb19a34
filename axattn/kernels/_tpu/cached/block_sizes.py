"""The calls over caches that the kernel takes, and the tiles it cuts them into."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from axattn import _quantization
from axattn._call import AttentionCall
from axattn._typing import present
from axattn.kernels import _masks
from axattn.kernels._problem import Problem, cdiv, round_up
from axattn.kernels._tpu.cached.grid import Cut, padded_rows, slots_are_lanes
from axattn.kernels._tpu.layout import LANES

# Up to this many tokens a tile has all of them, if their rows are not too many.
DECODE_TOKENS = 16

# Rows of all heads of a group in a tile: enough for the matrix unit to be as fast as memory.
MOST_ROWS = 1024
PREFILL_ROWS = 512

# Bytes of a block of keys and values that are worth a copy, and of the scores of a product.
BLOCK_BYTES = 2 * 2**20
SCORE_BYTES = 2**19

BLOCKS = (2048, 1024, 512, 256, 128)

# Scalar memory has 1 MiB.
MOST_PAGES = 2**17


@dataclasses.dataclass(frozen=True)
class CachedTiles:
    block_q: int  # query tokens of a tile
    block_kv: int  # slots of a block, a multiple of 128
    vmem_limit: int | None = None


def refuses(call: AttentionCall) -> str | None:
    """Why this cache is none for the kernel, or None."""
    stored = present(call.stored)
    if stored.dtype not in ("bfloat16", "float32", *_quantization.LIMITS):
        return f"does not support a cache of {stored.dtype}"
    if stored.page_size % 8:
        where = "a row" if stored.block_table is None else "a page"
        return f"needs slots of {where} in a multiple of 8, got {stored.page_size}"
    for name, size in (("head", call.head_dim), ("value head", call.value_head_dim)):
        if size % 8:
            return f"needs a {name} size that is a multiple of 8 over a cache, got {size}"
    if stored.page_size % LANES and _turned(call):
        where = "a row" if stored.block_table is None else "a page"
        return (
            f"needs slots of {where} in a multiple of {LANES} for head sizes of {call.head_dim} "
            f"and {call.value_head_dim}, which a TPU lays out slots last, got {stored.page_size}"
        )
    if stored.block_table is not None and stored.block_table.size > MOST_PAGES:
        return f"takes at most {MOST_PAGES} pages of all rows, got {stored.block_table.size}"
    if call.dropout_key is not None:
        return "does not support dropout over a cache"
    return None


def cached_tiles(call: AttentionCall, vmem_bytes: int) -> CachedTiles:
    """Tiles for a core with so much VMEM: large blocks of keys, then many queries."""
    budget = vmem_bytes * 3 // 4
    longest = round_up(call.kv_len, LANES)
    for block_q in _query_tokens(call):
        for block_kv in BLOCKS:
            if block_kv > max(longest, BLOCKS[-1]):
                continue
            tiles = CachedTiles(block_q, block_kv)
            cut = cut_of(call, tiles, 1)
            block = _stored_bytes(call, cut) * block_kv
            if block > BLOCK_BYTES and block_kv > BLOCKS[-1]:
                continue
            needed = vmem_of(call, cut)
            if needed <= budget:
                limit = None if needed <= 10 * 2**20 else min(2 * needed, vmem_bytes * 15 // 16)
                return dataclasses.replace(tiles, vmem_limit=limit)
    return dataclasses.replace(tiles, vmem_limit=vmem_bytes * 15 // 16)


def _query_tokens(call: AttentionCall) -> list[int]:
    """Tokens of a tile, the best first."""
    most = max(1, MOST_ROWS // call.group)
    if call.q_len <= min(DECODE_TOKENS, most):
        first = call.q_len
    else:
        first = max(8, min(round_up(call.q_len, 8), PREFILL_ROWS // call.group // 8 * 8))
    smaller = [2**n for n in range(12, -1, -1) if 2**n < first]
    return [first, *(n for n in smaller if n >= min(8, first) or first <= DECODE_TOKENS)]


def cut_of(call: AttentionCall, tiles: CachedTiles, cores: int) -> Cut:
    problem, stored = Problem.of(call), present(call.stored)
    paged = stored.block_table is not None
    if tiles.block_kv % LANES:
        raise ValueError(f"block_kv takes a multiple of {LANES}, got {tiles.block_kv}")
    if paged:
        piece = math.gcd(stored.page_size, tiles.block_kv)
    else:
        piece = math.gcd(tiles.block_kv, 512)
    # Asked for parts of a fixed size, a row has the same bits in every batch.
    whole = problem.batch >= cores or call.kv_split_size is not None
    parts = 1 if whole else cdiv(cores, problem.batch)
    return Cut(
        problem,
        stored.dtype,
        paged,
        stored.page_size,
        tiles.block_q,
        tiles.block_kv,
        piece,
        _heads_together(problem, tiles, _quantization.is_quantized(stored.dtype)),
        _turned(call),
        min(cores, problem.batch * parts),
        parts,
    )


def _heads_together(problem: Problem, tiles: CachedTiles, scaled: bool) -> int:
    """Key/value heads of one product: where rows are few, several make one tile of vectors."""
    rows, heads = padded_rows(problem, tiles.block_q), problem.num_kv_heads
    for count in range(heads, 1, -1):
        # Scales have heads on the sublanes, where a slice begins with a whole tile or is one row.
        aligned = count == heads or count % 8 == 0 or not scaled
        if heads % count == 0 and aligned and count * rows * tiles.block_kv * 4 <= SCORE_BYTES:
            return count
    return 1


def _turned(call: AttentionCall) -> frozenset[str]:
    """Which arrays lie with the slots last."""
    arrays = present(call.stored).arrays
    pairs = ("keys", arrays.keys), ("values", arrays.values)
    return frozenset(name for name, x in pairs if x is not None and slots_are_lanes(x.shape[-1]))


def _stored_bytes(call: AttentionCall, cut: Cut) -> int:
    """Of one slot of all heads in VMEM, whose rows are whole lanes."""
    sizes = [call.head_dim]
    if present(call.stored).arrays.values is not None:
        sizes.append(call.value_head_dim)
    return cut.kv_heads * sum(
        _quantization.bytes_per_vector(cut.stored, round_up(size, LANES)) for size in sizes
    )


def vmem_of(call: AttentionCall, cut: Cut) -> int:
    """An estimate of the bytes of VMEM that the kernel needs."""
    size, value_size = (round_up(x, LANES) for x in (call.head_dim, call.value_head_dim))
    width = jnp.dtype(cut.problem.dtype).itemsize
    rows = cut.kv_heads * cut.rows
    kept = rows * (2 * size * width + 2 * value_size * call.query.dtype.itemsize)
    kept += rows * (value_size * 4 + LANES * 4)
    copied = 2 * cut.block_kv * _stored_bytes(call, cut)
    if call.bias is not None and call.bias.shape[2] != 1:
        heads = 1 if call.bias.shape[1] == 1 else cut.kv_heads
        copied += 2 * heads * cut.rows * cut.block_kv * 4
    if _masks.has_dense_mask(call):
        copied += 2 * cut.kv_heads * cut.rows * cut.block_kv * 4
    # Scores, weights and the operands that codes become, of one product.
    scores = 5 * cut.together * cut.rows * cut.block_kv * 4
    converted = width + 4 if _quantization.is_quantized(cut.stored) else width
    operands = cut.together * cut.block_kv * (size + value_size) * converted
    return kept + copied + scores + operands
