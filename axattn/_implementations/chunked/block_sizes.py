"""Block sizes of the chunked path, and the lists of blocks that a query block needs."""

from __future__ import annotations

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn._jax_compat import cpu_moves_bfloat16, is_known, take_smaller_size
from axattn._mask_parts import EMPTY, FULL
from axattn._masks import varies_by_row


@dataclasses.dataclass(frozen=True)
class ChunkSizes:
    """Block sizes in slots, what runs one after the other, and the form of products."""

    q: int
    kv: int
    heads: int  # key/value heads at a time
    by_row: bool  # batch rows one at a time
    folded: bool
    wide_results: bool  # results in the making are in the accumulator's dtype


def choose_chunk_sizes(call: AttentionCall, platform: str, *, backward: bool = False) -> ChunkSizes:
    """Choose block sizes of one pass of ``call`` on ``"cpu"`` or on an accelerator."""
    cpu, cached = platform == "cpu", call.stored is not None
    decode = call.is_decode_step
    folded = decode and platform != "tpu" and not cached
    heads, most_q = call.num_kv_heads, 512
    if cpu:
        # Products of fewer rows and keys are slow; larger tiles leave the cache. The sums of the
        # backward pass run over rows: it takes fewer, and more heads.
        most_q = 128 if backward else 256
    # Decode reads longer runs of the cache.
    q, kv = most_q, (512 if decode else 256) if cpu else 1024
    # Batch rows with different masks would all compute the union of their blocks; one at a time,
    # each computes its own. Decode steps stay together: products of few rows are slow.
    rows = is_known(lambda: call.batch > 1, otherwise=True)
    many = is_known(lambda: take_smaller_size(call.q_len, q) * call.group >= 128, otherwise=True)
    by_row = rows and many and (cpu or varies_by_row(call.mask))
    if cached and cpu and rows:
        # Head-major keys are fast one row at a time, and each row ends at its own length.
        by_row = True
    if cpu and not cached and not decode and (by_row or not rows):
        q, heads = _fit_tile(call, q, _find_tile_scores() // kv)
    if not cpu:
        # The tile of scores is bounded, so that memory stays O(T + S).
        batch = 1 if by_row else call.batch

        def too_large():
            scores = batch * call.num_heads * take_smaller_size(call.q_len, q) * kv
            return is_known(lambda: 4 * scores > 2**25, otherwise=True)

        while q > 64 and too_large():
            q //= 2
        while kv > 128 and too_large():
            kv //= 2
    # A block is never longer than its array; symbolic lengths give symbolic blocks.
    q, kv = take_smaller_size(call.q_len, q), take_smaller_size(call.kv_len, kv)
    if call.stored is not None and call.stored.block_table is not None:
        kv = max(kv // call.stored.page_size, 1) * call.stored.page_size  # whole pages
    wide_results = cpu and call.query.dtype == jnp.bfloat16 and not cpu_moves_bfloat16()
    return ChunkSizes(q, kv, heads, by_row, folded, wide_results)


def _fit_tile(call: AttentionCall, q: int, rows: int) -> tuple[int, int]:
    """Choose query slots and key/value heads for a tile of at most ``rows`` rows."""
    while q > 16 and q * call.group > rows:
        q //= 2
    used = call.q_len if is_known(lambda: call.q_len < q, otherwise=False) else q
    most = max(rows // (used * call.group), 1)
    divisors = (n for n in range(1, call.num_kv_heads + 1) if call.num_kv_heads % n == 0)
    return q, max(n for n in divisors if n <= most)


@functools.cache
def _find_tile_scores() -> int:
    """Find how many float32 scores of one tile the level-2 caches of this machine's cores hold.

    1 MiB for each core was the fastest where the cache has 1 MiB (AMD EPYC) and where it has 2
    (Intel Xeon with AMX); see benchmarks/crossover_bench.py.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = "SC_LEVEL2_CACHE_SIZE" in getattr(os, "sysconf_names", ())
    size = os.sysconf("SC_LEVEL2_CACHE_SIZE") if known else 0
    return (cores or 1) * (min(size, 2**20) if size > 0 else 2**20) // 4


@dataclasses.dataclass(frozen=True)
class ChunkList:
    """The key/value blocks to compute: the first ``count`` of ``order``."""

    order: jax.Array  # int32 [num_kv]
    count: jax.Array  # int32


def list_chunks(row: jax.Array, num_kv: int, has_tail: bool) -> tuple[ChunkList, ChunkList]:
    """List full and partial blocks from a row of block states ``[B or 1, num_kv]``.

    A block is full if it is full in every batch row, and left out if it is empty in every one.
    With ``has_tail`` the last block shares slots with the one before, so it is never full.
    """
    full = (row == FULL).all(0)
    some = (row != EMPTY).any(0)
    if has_tail:
        full &= jnp.arange(num_kv) < num_kv - 1
    return _list_chosen(full), _list_chosen(some & ~full)


def _list_chosen(chosen: jax.Array) -> ChunkList:
    # A stable sort puts chosen blocks first and keeps their order.
    return ChunkList(
        jnp.argsort(~chosen, stable=True).astype(jnp.int32), chosen.sum(dtype=jnp.int32)
    )
