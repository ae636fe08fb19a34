"""What ``implementation=None`` takes: the measured crossovers, in one place.

Calls with gradients are decided by shape and mask alone, the same for every platform: else JAX
would save the residuals of two paths. The exception is a short call in a process without
accelerators, which may be lowered for one: it has the einsum beside the kernels, and XLA drops the
residuals that are not used.
"""

from __future__ import annotations

import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn._implementations import mosaic_gpu
from axattn._jax_compat import is_known
from axattn._masks import find_kv_lengths
from axattn._typing import present

# CPU, 2 cores of a Xeon with AVX-512, causal, float32 and bfloat16, both directions: the chunked
# path skips blocks where a head has 512 x 512 scores or more, and is then faster from 2^20 scores
# of all heads on; where a head has fewer, from 2^22 on, and only forward. See
# benchmarks/crossover_bench.py. It is not measured on accelerators; there the same bounds keep the
# einsum's logits under 16 MiB.
CHUNKED_FROM_SCORES = 2**20
SHORT_SCORES = 2**18  # T * S below it
CHUNKED_FROM_SHORT_SCORES = 2**22

# In a decode step (few query rows) one einsum reads the cache fastest: the chunked path copies each
# block. Beyond this many bytes of logits the chunked path is taken all the same.
DECODE_LOGITS_BYTES = 2**27

# With key/value lengths the einsum copies K and V to zero their unused slots; the chunked path
# skips these. (CPU, float32, B=4 N=96 K=8 T=1 S=4096: 4x at full length, 28x at an eighth.)
RAGGED_FROM_KEYS = 1024


# The Hopper kernels are preferred by arithmetic (bytes and FLOPs): none has been measured yet. The
# exception is decode over few keys, where the small programs that plan it cost more than they save.
HOPPER_DECODE_FROM_KEYS = 1024


# The implementations whose refusals `choose_implementation` reads.
ASKED = ("xla_chunked", "mosaic_gpu", "mosaic_tpu")


def choose_implementation(
    call: AttentionCall, platform: str, reasons: dict[str, str | None]
) -> str:
    """Return the name that ``None`` means for ``call`` lowered on ``platform``."""
    if reasons["xla_chunked"] is not None:
        return "xla"
    scores = call.batch * call.num_heads * call.q_len * call.kv_len
    if call.stored is not None:
        return _choose_over_cache(call, platform, scores, reasons)
    long = _exceeds(call.q_len, mosaic_gpu.DECODE_TOKENS)
    if reasons["mosaic_gpu"] is None and (
        long or _exceeds(call.kv_len, HOPPER_DECODE_FROM_KEYS - 1)
    ):
        # A Hopper GPU is here. Other platforms take a flash path, too, to share its residuals.
        return "mosaic_gpu" if platform == "cuda" else "xla_chunked"
    if reasons["mosaic_tpu"] is None and long:
        # A TPU is here, likewise. (For decode over arrays the kernel would copy each head.)
        return "mosaic_tpu" if platform == "tpu" else "xla_chunked"
    if find_kv_lengths(call.mask) is not None and _exceeds(call.kv_len, RAGGED_FROM_KEYS - 1):
        return "xla_chunked"
    if call.is_decode_step:
        # On CPU the chunked path skips empty blocks, while for the einsum XLA copies a cache that
        # was just updated (8 times slower in a layer at S=8192). Not in bfloat16, where XLA before
        # jax 0.11 widens the whole cache for the loop, nor on TPU, where it copies the cache.
        skips = platform == "cpu" and call.mask.parts and call.query.dtype == jnp.float32
        return "xla_chunked" if skips or _exceeds(4 * scores, DECODE_LOGITS_BYTES) else "xla"
    is_short = not _exceeds(call.q_len * call.kv_len, SHORT_SCORES - 1)
    bound = CHUNKED_FROM_SHORT_SCORES if is_short else CHUNKED_FROM_SCORES
    return "xla_chunked" if _exceeds(scores, bound - 1) else "xla"


def _choose_over_cache(
    call: AttentionCall, platform: str, scores: int, reasons: dict[str, str | None]
) -> str:
    """Choose for a call over a cache, which is longer than what it holds."""
    for kernels, there in (("mosaic_gpu", "cuda"), ("mosaic_tpu", "tpu")):
        if platform == there and reasons[kernels] is None:
            return kernels
    if present(call.stored).block_table is not None or platform != "tpu":
        return "xla_chunked"
    # TPUs fuse the zeroing of unused slots into the products; the chunked path copies each block.
    return "xla_chunked" if _exceeds(4 * scores, DECODE_LOGITS_BYTES) else "xla"


def _exceeds(size: int, bound: int) -> bool:
    """Say whether a size is larger; a symbolic one, which may be, counts as large."""
    return is_known(lambda: size > bound, otherwise=True)
