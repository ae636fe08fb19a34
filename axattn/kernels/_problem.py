"""The static facts of a call, for kernels."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import jax

from axattn._call import AttentionCall

LOG2E = math.log2(math.e)


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
    def from_call(cls, call: AttentionCall, *, interpret: bool = False) -> Problem:
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


_Number = TypeVar("_Number", int, jax.Array)


def cdiv(a: _Number, b: int) -> _Number:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return cdiv(a, b) * b
