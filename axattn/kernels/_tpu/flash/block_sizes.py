"""Block sizes, from the chip's VMEM and a model of the time that a call takes.

No TPU was at hand. The rates of the model are the vendors' peaks and rough guesses; it only has to
say which of a few candidates is best. That the chosen sizes compile is tested
(tests/aot/test_tpu.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from axattn._call import AttentionCall
from axattn._jax_compat import TpuChip
from axattn.kernels import _masks
from axattn.kernels._block_bounds import bound_blocks
from axattn.kernels._problem import Problem, cdiv, round_up
from axattn.kernels._tpu.flash import cost
from axattn.kernels._tpu.flash.backward import declare_fused, declare_key_grad, declare_query_grad
from axattn.kernels._tpu.flash.blocks import KernelMemory
from axattn.kernels._tpu.flash.forward import declare_forward
from axattn.kernels._tpu.flash.grid import (
    TpuBackwardBlockSizes,
    TpuBlockSizes,
    TpuFlashTiling,
    choose_kv_heads,
)
from axattn.kernels._tpu.layout import LANES, SUBLANES

# The part of VMEM that XLA may give to a kernel, and the part of this that the estimate may fill.
LIMIT, FILLED = 0.92, 0.8

# Seconds: of a step of the grid, and of each head's chain of dependent operations in it.
STEP, CHAIN = 0.35e-6, 0.3e-6

# Scores per second of the vector unit of a core: about ten operations each.
VECTOR_RATE = 5e11

# More rows than these gain nothing, and their scores fill VMEM.
MAX_ROWS = 2048

# Float32 numbers in the tiles of scores that are alive at once. The compiler unrolls operations on
# all of them: with twice as many it takes half a minute.
MAX_SCORES = 3 * 2**20


@dataclasses.dataclass(frozen=True)
class FlashKernel:
    """A kernel, and the values that the choice of its block sizes counts.

    The pairs say how many arrays of the key head size, and of the value head size, the compiler
    keeps in VMEM besides what is declared. They are guesses, from above.
    """

    work: cost.KernelWork
    declare: Callable[[AttentionCall, TpuFlashTiling], KernelMemory]
    row_products: tuple[int, int]  # float32, over rows
    packed_rows: tuple[int, int] = (0, 0)  # in the query's dtype, over rows
    kv_products: tuple[int, int] = (0, 0)  # float32, over a block of keys


FORWARD = FlashKernel(cost.FORWARD, declare_forward, (1, 0), packed_rows=(0, 1))
FUSED = FlashKernel(cost.FUSED, declare_fused, (0, 1))
QUERY_GRAD = FlashKernel(cost.QUERY_GRAD, declare_query_grad, (0, 1))
KEY_GRAD = FlashKernel(cost.KEY_GRAD, declare_key_grad, (1, 1), kv_products=(1, 1))

# Vectors over rows for each key/value head of a step, those that are declared among them.
ROW_VECTORS = 16


def choose_forward_block_sizes(call: AttentionCall, chip: TpuChip) -> TpuBlockSizes:
    return _choose(call, chip, FORWARD)[1]


def choose_backward_block_sizes(call: AttentionCall, chip: TpuChip) -> TpuBackwardBlockSizes:
    """Choose the fused kernel if the gradients of all keys fit VMEM, and it is faster than two."""
    fused = _choose(call, chip, FUSED, needed=False)
    query, key = _choose(call, chip, QUERY_GRAD), _choose(call, chip, KEY_GRAD)
    # The cores of a chip share out batch rows and key/value heads; the two kernels can share out
    # blocks as well.
    shares = call.batch * call.num_kv_heads // choose_kv_heads(call)
    idle = cdiv(shares, chip.cores) * chip.cores / shares
    if fused is not None and fused[0] * idle <= query[0] + key[0]:
        return TpuBackwardBlockSizes(fused[1])
    return TpuBackwardBlockSizes(query[1], key[1])


def find_least_vmem_bytes(call: AttentionCall) -> int:
    """Return the bytes of VMEM that the kernels of a call and of its gradients need at least."""
    kernels, candidates = (FORWARD, QUERY_GRAD, KEY_GRAD), list(list_candidates(call))
    return max(min(estimate_vmem_bytes(call, k, *blocks) for blocks in candidates) for k in kernels)


def _choose(call: AttentionCall, chip: TpuChip, kernel: FlashKernel, *, needed: bool = True):
    """Return the seconds and the sizes of the best candidate.

    If none fits: of the one with the fewest bytes, or None if the kernel is not ``needed``.
    """
    candidates = list(list_candidates(call))
    fitting = [
        (estimate_time(call, chip, kernel, *blocks).total, blocks)
        for blocks in candidates
        if fits(call, chip, kernel, *blocks)
    ]
    if not fitting and not needed:
        return None
    smallest = math.inf, min(candidates, key=lambda b: estimate_vmem_bytes(call, kernel, *b))
    seconds, (block_q, block_kv) = min(fitting, default=smallest)
    return seconds, TpuBlockSizes(block_q, block_kv, int(chip.vmem_bytes * LIMIT))


def list_candidates(call: AttentionCall) -> Iterator[tuple[int, int]]:
    """Yield all pairs ``(block_q, block_kv)`` that are tried."""
    # Blocks of bias and mask are transposed and put side by side, which is easy in whole lanes.
    has_tiles = call.bias is not None or bool(_masks.list_dense_masks(call))
    first = LANES if has_tiles else SUBLANES
    for i in range(8):
        block_q = first << i
        if i and block_q * call.group > MAX_ROWS:
            break
        for j in range(5):
            if j == 0 or LANES << (j - 1) < call.kv_len:
                yield block_q, LANES << j
        if block_q >= call.q_len:
            break


def fits(
    call: AttentionCall, chip: TpuChip, kernel: FlashKernel, block_q: int, block_kv: int
) -> bool:
    """Say whether VMEM has room for such blocks, and the compiler does not take too long."""
    most = int(chip.vmem_bytes * LIMIT) * FILLED
    scores = kernel.work.live_scores * call.group * block_q * block_kv
    return scores <= MAX_SCORES and estimate_vmem_bytes(call, kernel, block_q, block_kv) <= most


def estimate_vmem_bytes(
    call: AttentionCall, kernel: FlashKernel, block_q: int, block_kv: int
) -> int:
    """Return the bytes of what a kernel declares, and an upper estimate of the rest."""
    kv_heads = choose_kv_heads(call)
    tiling = TpuFlashTiling(Problem.from_call(call), block_q, block_kv, kv_heads, call.heads_first)
    memory = kernel.declare(call, tiling)
    return memory.count_vmem_bytes() + _estimate_live_bytes(call, kernel, tiling, memory)


def _estimate_live_bytes(
    call: AttentionCall, kernel: FlashKernel, tiling: TpuFlashTiling, memory: KernelMemory
) -> int:
    """Estimate from above the values of a step that the compiler keeps in VMEM."""
    kv_heads, row_lanes = tiling.kv_heads, round_up(tiling.rows, LANES)
    sizes, itemsize = (call.head_dim, call.value_head_dim), call.query.dtype.itemsize
    head, value = padded = [round_up(size, LANES) for size in sizes]
    widest = max(padded)
    tile = tiling.block_kv * row_lanes * 4
    total = kernel.work.live_scores * tile
    # Bias and mask, transposed and as 32-bit numbers; a mask for each head.
    if "bias" in memory.inputs:
        total += 2 * tile
    if "allowed" in memory.inputs:
        heads = memory.inputs["allowed"].shape[1]
        total += 2 * tile + 2 * (tiling.heads - heads) * tiling.block_q * tiling.block_kv
    # The sums, transposed at the end, and what a step adds to them.
    total += kv_heads * row_lanes * (2 * widest + _add_sizes(kernel.row_products, sizes)) * 4
    total += kv_heads * tiling.rows * _add_sizes(kernel.packed_rows, padded) * itemsize
    total += kv_heads * tiling.block_kv * _add_sizes(kernel.kv_products, padded) * 4
    # Blocks of queries, two buffers each, as wide as the larger head size.
    heads = tiling.heads if call.heads_first else round_up(tiling.heads, SUBLANES)
    missing = _add_sizes(kernel.work.query_arrays, (widest - head, widest - value))
    total += 2 * tiling.block_q * heads * missing * itemsize
    vectors = ROW_VECTORS * kv_heads * SUBLANES * row_lanes * 4
    return total + max(0, vectors - memory.count_vmem_bytes(only_vectors=True))


def _add_sizes(counts: tuple[int, int], sizes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


class TimeEstimate(NamedTuple):
    """Seconds of one core for one batch row: of each unit by itself, and of all together."""

    products: float
    vector: float
    memory: float
    total: float


def estimate_time(
    call: AttentionCall, chip: TpuChip, kernel: FlashKernel, block_q: int, block_kv: int
) -> TimeEstimate:
    """Estimate the time of a kernel by its longest unit, with some time for each step."""
    work, kv_heads = kernel.work, choose_kv_heads(call)
    sizes, itemsize = (call.head_dim, call.value_head_dim), call.query.dtype.itemsize
    per_tile = bound_blocks(call, block_q, block_kv, work.major)
    blocks, idle_steps = per_tile.sum(), (per_tile.max() - per_tile).sum()
    num_q = cdiv(call.q_len, block_q)
    scores = kv_heads * call.group * block_q * block_kv
    head, value = (round_up(s, LANES) for s in sizes)
    lanes = work.key_products * head + work.value_products * value
    products = 2 * scores * lanes / chip.bf16_flops
    if itemsize == 4:
        products *= 4
    vector = work.live_scores / FORWARD.work.live_scores * scores / VECTOR_RATE
    # Rows that do not fill their last lanes.
    vector *= round_up(call.group * block_q, LANES) / (call.group * block_q)
    loaded = call.group * block_q if work.major == "kv" else block_kv
    memory = kv_heads * loaded * sum(sizes) * itemsize / chip.hbm_bandwidth
    step = max(products, vector, memory) + STEP + kv_heads * CHAIN
    # Each block of queries is loaded, packed and written once.
    rows = sum(work.query_arrays) * num_q * block_q * kv_heads * call.group
    row_time = rows * max(sizes) * itemsize / chip.hbm_bandwidth
    total = blocks * step + idle_steps * STEP + row_time
    parts = blocks * products, blocks * vector, blocks * memory + row_time, total
    return TimeEstimate(*(float(part) * call.num_kv_heads / kv_heads for part in parts))
