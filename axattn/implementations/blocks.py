"""How the chunked path cuts a call: block sizes, and which blocks of a row are visited."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from axattn.call import AttentionCall
from axattn.implementations.products import DECODE_ROWS
from axattn.mask_parts import EMPTY, FULL


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes in slots, whether batch rows go one at a time, and the form of the products."""

    q: int
    kv: int
    by_row: bool
    folded: bool


def choose(call: AttentionCall, platform: str) -> Blocks:
    """Block sizes for ``call`` on ``"cpu"`` or on an accelerator."""
    cpu, cached = platform == "cpu", call.stored is not None
    decode = call.q_len * call.num_heads <= DECODE_ROWS
    folded = decode and platform != "tpu" and not cached
    # CPU, measured (2 cores, 1 MiB of L2 each; G = 1, 8, 16; forward and backward): smaller tiles
    # make poor products, larger ones fall out of the cache. Decode reads longer runs of the cache.
    q = min(call.q_len, 128 if cpu else 512)
    kv = (512 if decode else 256) if cpu else 1024
    # Rows whose masks differ would all visit the union of their blocks; done one at a time, each
    # visits its own. Too few query rows make poor products, so decode steps stay together.
    by_row = call.batch > 1 and q * call.group >= 128 and (cpu or call.mask.varies_by_row)
    if cached and cpu and call.batch > 1:
        # Head-major keys make good products of one row; rows of many lengths each end at their own.
        by_row = True
    if not cpu:
        # Accelerators have the room; the tile of scores is bounded to keep memory O(T + S).
        batch = 1 if by_row else call.batch
        while q > 64 and 4 * batch * call.num_heads * q * kv > 2**25:
            q //= 2
        while kv > 128 and 4 * batch * call.num_heads * q * kv > 2**25:
            kv //= 2
    kv = min(call.kv_len, kv)
    if cached and call.stored.block_table is not None:
        kv = max(kv // call.stored.page_size, 1) * call.stored.page_size  # whole pages
    return Blocks(q, kv, by_row, folded)


class Visits(NamedTuple):
    """The key/value blocks to visit: the first ``count`` of ``order``."""

    order: jax.Array  # int32 [num_kv]
    count: jax.Array  # int32


def visits(row: jax.Array, num_kv: int, has_tail: bool) -> tuple[Visits, Visits]:
    """Full and partial blocks from a row of block states ``[B or 1, num_kv]``.

    A block is full when it is full in every batch row, and visited when it is not empty in all.
    With ``has_tail`` the last block shares slots with the one before: partial at best.
    """
    full = (row == FULL).all(0)
    some = (row != EMPTY).any(0)
    if has_tail:
        full &= jnp.arange(num_kv) < num_kv - 1
    return _in_order(full), _in_order(some & ~full)


def _in_order(chosen: jax.Array) -> Visits:
    # A stable sort puts the chosen blocks first, in their own order.
    return Visits(jnp.argsort(~chosen, stable=True).astype(jnp.int32), chosen.sum(dtype=jnp.int32))
