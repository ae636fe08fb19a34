"""What a kernel knows about a call while it is traced."""

from __future__ import annotations

import dataclasses
import math

from axattn.call import AttentionCall

LOG2E = math.log2(math.e)

# A warpgroup multiplies 64 rows at a time.
ROWS = 64

# TMA cuts rows into groups of 8 (the swizzled shared-memory atom): lengths in HBM are multiples.
ROW_GROUP = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and options of a call; hashable, the same for all kernels of the call."""

    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: str
    scale: float
    logits_soft_cap: float | None
    dropout_rate: float
    broadcast_dropout: bool
    interpret: bool

    @classmethod
    def of(cls, call: AttentionCall, *, interpret: bool = False) -> Problem:
        return cls(
            call.batch,
            call.q_len,
            call.kv_len,
            call.num_heads,
            call.num_kv_heads,
            call.head_dim,
            call.value_head_dim,
            call.product_dtype.name,
            call.scale,
            call.logits_soft_cap,
            call.dropout_rate if call.dropout_key is not None else 0.0,
            call.broadcast_dropout,
            interpret,
        )

    @property
    def group(self) -> int:
        """Query heads per key/value head, G."""
        return self.num_heads // self.num_kv_heads

    @property
    def stored_q_len(self) -> int:
        """T as the arrays have it in HBM."""
        return round_up(self.q_len, ROW_GROUP)

    @property
    def stored_kv_len(self) -> int:
        return round_up(self.kv_len, ROW_GROUP)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return cdiv(a, b) * b
