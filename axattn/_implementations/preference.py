"""What ``implementation=None`` takes: the measured crossovers, in one place.

Training shapes are chosen by shape and mask alone, the same for every platform: a choice by
platform would have JAX save the residuals of both paths for the backward pass. Only for short calls
in a process without accelerators, which may be lowered for one, the einsum stands beside the
kernels; XLA drops the residuals of the other path.
"""

from __future__ import annotations

import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn._implementations import mosaic_gpu
from axattn._jax_compat import is_known
from axattn._typing import present

# CPU, 2 cores with AVX-512, jax 0.10.2, float32 and bfloat16, H=128, causal: the chunked path
# overtakes the einsum between T=256 (2^20 scores at N=16) and T=512 (2^22), forward and backward;
# see benchmarks/crossover_bench.py. On accelerators, where its speed is not measured, the same
# bound keeps the einsum's float32 logits under 8 MiB.
CHUNKED_FROM_SCORES = 2**21

# A decode step (few query rows) is a read of the cache, and one einsum reads it best (the chunked
# path adds a copy of each block), until its logits would take this many bytes.
DECODE_LOGITS_BYTES = 2**27

# With key/value lengths the einsum cleans K and V behind them, in a copy of both; the chunked path
# skips them. (CPU, float32, B=4 N=96 K=8 T=1 S=4096: 4x at full length, 28x at an eighth.)
RAGGED_FROM_KEYS = 1024


# The Hopper kernels come first wherever they take a call: its bytes and its work say so, since no
# kernel is measured yet. All but a decode step over few keys, where the several small programs that
# plan it cost more than XLA's reading everything.
HOPPER_DECODE_FROM_KEYS = 1024


# The implementations whose refusals `choose` reads.
ASKED = ("xla_chunked", "mosaic_gpu", "mosaic_tpu")


def choose(call: AttentionCall, platform: str, reasons: dict[str, str | None]) -> str:
    """The name that ``None`` means for ``call`` lowered on ``platform``."""
    if reasons["xla_chunked"] is not None:
        return "xla"
    scores = call.batch * call.num_heads * call.q_len * call.kv_len
    if call.stored is not None:
        return _over_cache(call, platform, scores, reasons)
    long = _exceeds(call.q_len, mosaic_gpu.DECODE_TOKENS)
    if reasons["mosaic_gpu"] is None and (
        long or _exceeds(call.kv_len, HOPPER_DECODE_FROM_KEYS - 1)
    ):
        # A Hopper GPU is at hand. Elsewhere the other flash path, so that both share residuals.
        return "mosaic_gpu" if platform == "cuda" else "xla_chunked"
    if reasons["mosaic_tpu"] is None and long:
        # Likewise a TPU. (A decode step over arrays would have them copied, head by head.)
        return "mosaic_tpu" if platform == "tpu" else "xla_chunked"
    if call.mask.kv_lengths() is not None and _exceeds(call.kv_len, RAGGED_FROM_KEYS - 1):
        return "xla_chunked"
    if call.is_decode_step:
        # On CPU the chunked path skips what the mask empties, and XLA copies a cache that was just
        # updated for the einsum (8 times slower in a layer at S=8192). In bfloat16 XLA before jax
        # 0.11 widens the whole cache for the loop, and on TPU it copies it into another layout.
        skips = platform == "cpu" and call.mask.parts and call.query.dtype == jnp.float32
        return "xla_chunked" if skips or _exceeds(4 * scores, DECODE_LOGITS_BYTES) else "xla"
    return "xla_chunked" if _exceeds(scores, CHUNKED_FROM_SCORES - 1) else "xla"


def _over_cache(
    call: AttentionCall, platform: str, scores: int, reasons: dict[str, str | None]
) -> str:
    """A cache is longer than what it holds, and these end where that ends."""
    for kernels, there in (("mosaic_gpu", "cuda"), ("mosaic_tpu", "tpu")):
        if platform == there and reasons[kernels] is None:
            return kernels
    if present(call.stored).block_table is not None or platform != "tpu":
        return "xla_chunked"
    # TPUs fuse the cleaning of unused slots into the products; the chunked path copies each block.
    return "xla_chunked" if _exceeds(4 * scores, DECODE_LOGITS_BYTES) else "xla"


def _exceeds(size: int, bound: int) -> bool:
    """Whether a size is larger; a symbolic one, which may be, counts as large."""
    return is_known(lambda: size > bound, otherwise=True)
