"""The attention calls that ``kernel_bench.py`` measures, and the FLOPs that they need."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Matrix products of the backward pass / those of the forward pass, by convention (5 / 2): what a
# kernel computes again is not counted.
BACKWARD = 2.5
DIRECTIONS = {"fwd": 1.0, "bwd": BACKWARD, "fwd+bwd": 1.0 + BACKWARD}

_TOKENS = 16 * 1024


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, T = S.

    Attributes:
      documents: lengths of the documents that are packed into the row, which causal attention does
        not leave.
      window: keys to the left of a token, besides itself.
    """

    name: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    causal: bool = True
    documents: tuple[int, ...] = ()
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dtype: str = "bfloat16"

    @property
    def mask(self) -> str:
        """What the table calls it."""
        if self.documents:
            return f"{len(self.documents)} documents"
        if self.window is not None:
            return f"window {self.window}"
        return "causal" if self.causal else "full"

    def keys_per_row(self) -> np.ndarray:
        """Keys that each query row attends to, exactly."""
        if not self.causal:
            return np.full(self.length, self.length)
        lengths = self.documents or (self.length,)
        seen = np.concatenate([np.arange(1, length + 1) for length in lengths])
        return seen if self.window is None else np.minimum(seen, self.window + 1)

    def flops(self, direction: str) -> float:
        """Of the matrix products, over the pairs that the mask allows."""
        pairs = int(self.keys_per_row().sum()) * self.batch * self.heads
        return DIRECTIONS[direction] * 2.0 * (self.head_dim + self.value_head_dim) * pairs

    def structs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Query, key, value and the output's cotangent."""

        def struct(heads, size):
            return jax.ShapeDtypeStruct((self.batch, self.length, heads, size), self.dtype)

        return (
            struct(self.heads, self.head_dim),
            struct(self.kv_heads, self.head_dim),
            struct(self.kv_heads, self.value_head_dim),
            struct(self.heads, self.value_head_dim),
        )

    def input_bytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in self.structs())

    def extras(self, heads: int | None = None) -> dict[str, jax.Array]:
        """Small arrays besides, for the first ``heads`` query heads: segment ids, sinks."""
        found = {}
        if self.documents:
            ids = np.repeat(np.arange(len(self.documents)), self.documents)
            found["segments"] = jnp.asarray(ids[None], jnp.int32)
        if self.sinks:
            sinks = np.random.default_rng(1).standard_normal(self.heads, np.float32)
            found["sinks"] = jnp.asarray(sinks[:heads])
        return found

    def options(self) -> dict[str, Any]:
        """Arguments of attention that are no arrays."""
        found: dict[str, Any] = {"is_causal": self.causal}
        if self.window is not None:
            found["local_window_size"] = (self.window, 0)
        if self.soft_cap is not None:
            found["logits_soft_cap"] = self.soft_cap
        return found


def heads_name(heads: int, kv_heads: int) -> str:
    """``gqa32/8``."""
    return f"{'mqa' if kv_heads == 1 else 'gqa'}{heads}/{kv_heads}"


def length_name(length: int) -> str:
    """``4k`` for 4096."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _plain(heads: int, kv_heads: int, length: int, head_dim: int, *, causal: bool) -> Case:
    shape = f"{heads_name(heads, kv_heads)}/{length_name(length)}/{head_dim}"
    name = f"{'causal' if causal else 'full'}/{shape}"
    batch = max(1, _TOKENS // length)
    return Case(name, batch, length, heads, kv_heads, head_dim, head_dim, causal)


def _documents(length: int, count: int) -> tuple[int, ...]:
    """Lengths of all sizes that fill ``length``, the same on every call."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, length), count - 1, replace=False))
    return tuple(int(n) for n in np.diff([0, *cuts, length]))


_GQA, _MQA = (32, 8), (16, 1)


def _issue() -> tuple[Case, ...]:
    """What matters most is first: a budget of minutes ends the list early."""
    lengths = (16384, 4096, 8192, 32768)
    found = [
        _plain(*heads, length, size, causal=True)
        for length in lengths[:2]
        for heads in (_GQA, _MQA)
        for size in (128, 64, 256)
    ]
    one = {"batch": 1, "length": _TOKENS, "heads": 32, "kv_heads": 8}
    even = one | {"head_dim": 128, "value_head_dim": 128}
    found += [
        Case("packed/12", **even, documents=_documents(_TOKENS, 12)),
        Case("window/1024", **even, window=1024),
        # Gemma 2: 8 query heads of 256 over 4, scores capped at 50, every other layer a window.
        Case("gemma/cap50", 1, _TOKENS, 8, 4, 256, 256, soft_cap=50.0),
        # gpt-oss: 64 query heads of 64 over 8, and learned sinks.
        Case("gpt-oss/sinks", 1, _TOKENS, 64, 8, 64, 64, sinks=True),
        Case("h192/128", **one, head_dim=192, value_head_dim=128),
    ]
    found += [
        _plain(*heads, _TOKENS, size, causal=False)
        for heads in (_GQA, _MQA)
        for size in (128, 64, 256)
    ]
    found += [
        _plain(*heads, length, size, causal=True)
        for length in lengths[2:]
        for heads in (_GQA, _MQA)
        for size in (128, 64, 256)
    ]
    return tuple(found)


def _smoke() -> tuple[Case, ...]:
    """One of each kind, small."""
    small = {"batch": 1, "length": 64, "heads": 4, "kv_heads": 2}
    even = small | {"head_dim": 16, "value_head_dim": 16}
    return (
        Case("causal", **even),
        Case("full", **even, causal=False),
        Case("packed", **even, documents=_documents(64, 3)),
        Case("window", **even, window=8),
        Case("cap", **even, soft_cap=5.0),
        Case("sinks", **even, sinks=True),
        Case("h32/16", **small, head_dim=32, value_head_dim=16),
    )


PRESETS = {"issue": _issue, "smoke": _smoke}
