"""What ``implementation=None`` takes, per platform: the measured crossovers, in one place."""

from __future__ import annotations

from axattn.call import AttentionCall

# Measured on CPU (2 cores, AVX-512, jax 0.10.2; benchmarks/crossover_bench.py).
CPU_CHUNKED_FROM_SCORES = 2**21

# On accelerators the einsum's float32 logits are held to this many bytes; above it memory decides.
# Not measured for speed on a device.
LOGITS_BYTES = 2**27


def choose(call: AttentionCall, platform: str, reasons: dict[str, str | None]) -> str:
    """The name that ``None`` means for ``call`` lowered on ``platform``."""
    scores = call.batch * call.num_heads * call.q_len * call.kv_len
    if platform == "cpu":
        return "xla_chunked" if scores >= CPU_CHUNKED_FROM_SCORES else "xla"
    return "xla_chunked" if 4 * scores > LOGITS_BYTES else "xla"
