"""Block sizes, from the chip's VMEM and a model of the time that a call takes.

No TPU was at hand: the model's rates are the vendors' peaks and rough guesses, and what it is
asked is only which of a few candidates is best. That the choices compile is tested
(tests/aot/test_tpu.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from axattn._call import AttentionCall
from axattn._jax_compat import TpuChip
from axattn.kernels import _masks
from axattn.kernels._block_bounds import blocks_per_tile
from axattn.kernels._problem import cdiv, round_up
from axattn.kernels._tpu.flash.grid import TpuBackwardBlockSizes, TpuBlockSizes, choose_kv_heads
from axattn.kernels._tpu.layout import LANES, SUBLANES

# Of VMEM, what XLA may give a kernel, and how much of that our estimate may fill.
LIMIT, FILLED = 0.92, 0.8

# Seconds: of a step of the grid, and of each head's chain of dependent operations in it.
STEP, CHAIN = 0.35e-6, 0.3e-6

# Scores per second of the vector unit of a core: about ten operations each.
VECTOR_RATE = 5e11

# More rows than these gain nothing, and their scores fill VMEM.
MAX_ROWS = 2048

# Float32 numbers in the tiles of scores that are alive at once: the compiler unrolls them all, and
# takes half a minute for twice as many.
MAX_SCORES = 3 * 2**20


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """What a kernel holds and does, per pair of blocks."""

    head: int  # products over the key head size
    value: int
    rows: int  # arrays [block_q, heads, size] that come and go
    scores: int  # tiles of float32 scores that are alive at once
    whole_keys: bool = False  # float32 gradients of all keys and values
    own_keys: bool = False  # those of a block


FORWARD = KernelWork(1, 1, 2, 3)
FUSED = KernelWork(3, 2, 3, 5, whole_keys=True)
QUERY_GRAD = KernelWork(2, 1, 3, 5)
KEY_GRAD = KernelWork(2, 2, 2, 5, own_keys=True)


def choose_forward_block_sizes(call: AttentionCall, chip: TpuChip) -> TpuBlockSizes:
    return _choose(call, chip, FORWARD)[1]


def choose_backward_block_sizes(call: AttentionCall, chip: TpuChip) -> TpuBackwardBlockSizes:
    """One pass where all gradients of a group's keys and values fit VMEM, and it is faster."""
    fused = _choose(call, chip, FUSED, needed=False)
    query, key = _choose(call, chip, QUERY_GRAD), _choose(call, chip, KEY_GRAD)
    # The cores of a chip share out rows of the batch and key/value heads; only two passes have
    # blocks to share out, too.
    shares = call.batch * call.num_kv_heads // choose_kv_heads(call)
    idle = cdiv(shares, chip.cores) * chip.cores / shares
    if fused is not None and fused[0] * idle <= query[0] + key[0]:
        return TpuBackwardBlockSizes(fused[1])
    return TpuBackwardBlockSizes(query[1], key[1])


def find_least_vmem_bytes(call: AttentionCall) -> int:
    """VMEM, in bytes, that the kernels of a call and of its gradients need at the least."""
    works, candidates = (FORWARD, QUERY_GRAD, KEY_GRAD), list(list_candidates(call))
    return max(min(estimate_vmem_bytes(call, w, *blocks) for blocks in candidates) for w in works)


def _choose(call: AttentionCall, chip: TpuChip, work: KernelWork, *, needed: bool = True):
    """(seconds, tiles) of the best candidate; None, or the smallest, where none fits."""
    limit = int(chip.vmem_bytes * LIMIT)
    candidates = list(list_candidates(call))
    fitting = [
        (estimate_time(call, chip, work, *blocks).total, blocks)
        for blocks in candidates
        if fits(call, chip, work, *blocks)
    ]
    if not fitting and not needed:
        return None
    smallest = math.inf, min(candidates, key=lambda b: estimate_vmem_bytes(call, work, *b))
    seconds, (block_q, block_kv) = min(fitting, default=smallest)
    return seconds, TpuBlockSizes(block_q, block_kv, limit)


def list_candidates(call: AttentionCall) -> Iterator[tuple[int, int]]:
    """Queries and keys of a block, of all that are tried."""
    # TpuBlockSizes of bias and mask are turned around and put side by side: whole lanes are easy.
    tiled = call.bias is not None or _masks.has_dense_mask(call)
    first = LANES if tiled else SUBLANES
    for i in range(8):
        block_q = first << i
        if i and block_q * call.group > MAX_ROWS:
            break
        for j in range(5):
            if j == 0 or LANES << (j - 1) < call.kv_len:
                yield block_q, LANES << j
        if block_q >= call.q_len:
            break


def fits(call: AttentionCall, chip: TpuChip, work: KernelWork, block_q: int, block_kv: int) -> bool:
    """Whether VMEM holds such blocks by the estimate, and the compiler will take its time well."""
    most = int(chip.vmem_bytes * LIMIT) * FILLED
    scores = work.scores * call.group * block_q * block_kv
    return estimate_vmem_bytes(call, work, block_q, block_kv) <= most and scores <= MAX_SCORES


def estimate_vmem_bytes(call: AttentionCall, work: KernelWork, block_q: int, block_kv: int) -> int:
    """An estimate, from above, of what a kernel takes."""
    size, kv_heads = call.query.dtype.itemsize, choose_kv_heads(call)
    rows, heads = call.group * block_q, kv_heads * call.group
    if not call.heads_first:
        heads = round_up(heads, SUBLANES)
    head, value = (round_up(s, LANES) for s in (call.head_dim, call.value_head_dim))
    widest = max(head, value)
    row_lanes = round_up(rows, LANES)
    total = 2 * work.rows * block_q * heads * widest * size
    total += 2 * kv_heads * block_kv * (head + value) * size
    # Packed rows, their sums, and a few vectors over rows.
    total += kv_heads * rows * (head + value) * size
    total += kv_heads * row_lanes * (call.head_dim + call.value_head_dim) * 4
    total += 8 * 2 * kv_heads * SUBLANES * row_lanes * 4
    total += work.scores * block_kv * row_lanes * 4
    # Turning the sums around at the end.
    total += 2 * kv_heads * row_lanes * widest * 4
    if work.whole_keys:
        total += kv_heads * round_up(call.kv_len, block_kv) * (head + value) * 4
        total += kv_heads * block_kv * (head + value) * size
    if work.own_keys:
        total += 2 * kv_heads * block_kv * (head + value) * (4 + size)
    if call.bias is not None and min(call.bias.shape[2:]) > 1:
        own = kv_heads * call.group if call.bias.shape[1] > 1 else 1
        total += 2 * own * block_q * block_kv * call.bias.dtype.itemsize + block_kv * row_lanes * 8
    if _masks.has_dense_mask(call):
        total += 2 * kv_heads * call.group * block_q * block_kv + block_kv * row_lanes * 8
    return total


class TimeEstimate(NamedTuple):
    """Seconds of one core for the blocks of one batch row: what its units would take by themselves,
    and what all take together."""

    products: float
    vector: float
    memory: float
    total: float


def estimate_time(
    call: AttentionCall, chip: TpuChip, work: KernelWork, block_q: int, block_kv: int
) -> TimeEstimate:
    kv_heads = choose_kv_heads(call)
    sizes = call.head_dim, call.value_head_dim
    visited = blocks_per_tile(call, block_q, block_kv, "kv" if work.own_keys else "q")
    blocks, skipped = visited.sum(), (visited.max() - visited).sum()
    num_q = cdiv(call.q_len, block_q)
    scores = kv_heads * call.group * block_q * block_kv
    head, value = (round_up(s, LANES) for s in sizes)
    products = 2 * scores * (work.head * head + work.value * value) / chip.bf16_flops
    if call.query.dtype.itemsize == 4:
        products *= 4
    vector = work.scores / FORWARD.scores * scores / VECTOR_RATE
    # Rows that do not fill their last lanes.
    vector *= round_up(call.group * block_q, LANES) / (call.group * block_q)
    size = call.query.dtype.itemsize
    loaded = call.group * block_q if work.own_keys else block_kv
    memory = kv_heads * loaded * sum(sizes) * size / chip.hbm_bandwidth
    step = max(products, vector, memory) + STEP + kv_heads * CHAIN
    # What a block of queries costs besides: its rows come and go, and are packed.
    row_bytes = work.rows * num_q * block_q * kv_heads * call.group * max(sizes) * size
    rows = row_bytes / chip.hbm_bandwidth
    total = blocks * step + skipped * STEP + rows
    parts = blocks * products, blocks * vector, blocks * memory + rows, total
    return TimeEstimate(*(float(part) * call.num_kv_heads / kv_heads for part in parts))
