"""Block sizes of the chunked path, and the lists of blocks that a query block needs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn._jax_compat import is_known, take_smaller_size
from axattn._mask_parts import EMPTY, FULL
from axattn._masks import varies_by_row


@dataclasses.dataclass(frozen=True)
class ChunkSizes:
    """Block sizes in slots, whether batch rows run one at a time, and the form of products."""

    q: int
    kv: int
    by_row: bool
    folded: bool


def choose_chunk_sizes(call: AttentionCall, platform: str) -> ChunkSizes:
    """Choose block sizes for ``call`` on ``"cpu"`` or on an accelerator."""
    cpu, cached = platform == "cpu", call.stored is not None
    decode = call.is_decode_step
    folded = decode and platform != "tpu" and not cached
    # CPU, measured (2 cores, 1 MiB of L2 each; G = 1, 8, 16; forward and backward): products of
    # smaller blocks are slow, larger ones leave L2. Decode reads longer runs of the cache.
    q = 128 if cpu else 512
    kv = (512 if decode else 256) if cpu else 1024
    # Batch rows with different masks would all compute the union of their blocks; one at a time,
    # each computes its own. Decode steps stay together: products of few rows are slow.
    rows = is_known(lambda: call.batch > 1, otherwise=True)
    many = is_known(lambda: take_smaller_size(call.q_len, q) * call.group >= 128, otherwise=True)
    by_row = rows and many and (cpu or varies_by_row(call.mask))
    if cached and cpu and rows:
        # Head-major keys are fast one row at a time, and each row ends at its own length.
        by_row = True
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
    return ChunkSizes(q, kv, by_row, folded)


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
