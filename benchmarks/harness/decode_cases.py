"""The decode calls that ``decode_bench.py`` measures, and the bytes and FLOPs that they need."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from axattn.cache import bytes_per_token
from benchmarks.harness.kernel_cases import heads_name, length_name

_SHORT = {"bfloat16": "bf16", "float8_e4m3fn": "fp8"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A few query tokens per row over a cache; the query is bfloat16.

    Attributes:
      length: tokens in a row's cache, S, the queries' own included; of the longest row.
      tokens: query tokens, T: those appended last.
      kind: "dense", "ring" or "paged"; ``page``: tokens per page.
      dtype: of the cache.
      shortest: lengths are spread from here to ``length``, evenly in their logarithm, and one row
        is empty; None: all rows are as long.
      window: keys to the left of a token, besides itself; of a ring, what it holds.
      tree: each token sees its ancestors in a binary tree of the newest tokens, by an array mask.
      latent: values are the first ``value_head_dim`` features of the keys.
      split: ``kv_split_size``.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    value_head_dim: int | None = None
    tokens: int = 1
    kind: str = "dense"
    page: int | None = None
    dtype: str = "bfloat16"
    shortest: int | None = None
    window: int | None = None
    soft_cap: float | None = None
    tree: bool = False
    latent: bool = False
    split: int | None = None

    @property
    def name(self) -> str:
        parts = [
            f"mla{self.heads}" if self.latent else heads_name(self.heads, self.kv_heads),
            None if self.latent or self.head_dim == 128 else f"h{self.head_dim}",
            f"b{self.batch}",
            "ragged" if self.shortest is not None else length_name(self.length),
            None if self.tokens == 1 else f"t{self.tokens}",
            "tree" if self.tree else None,
            None if self.soft_cap is None else f"cap{self.soft_cap:g}",
            None if self.window is None else f"window{length_name(self.window)}",
            self.layout,
            _SHORT.get(self.dtype, self.dtype),
            None if self.split is None else f"split{length_name(self.split)}",
        ]
        return "/".join(part for part in parts if part)

    @property
    def layout(self) -> str:
        return self.kind if self.page is None else f"{self.kind}{self.page}"

    @property
    def value_size(self) -> int:
        """h."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    def lengths(self) -> np.ndarray:
        """int32 [B], the same on every call."""
        if self.shortest is None:
            return np.full(self.batch, self.length, np.int32)
        rng = np.random.default_rng(0)
        spread = np.geomspace(self.shortest, self.length, self.batch - 1)
        return rng.permutation(np.append(np.rint(spread), 0)).astype(np.int32)

    def ancestors(self) -> np.ndarray:
        """bool [T, T]: which of the newest tokens each of them sees, itself included."""
        if not self.tree:
            return np.tri(self.tokens, dtype=bool)
        found = np.eye(self.tokens, dtype=bool)
        for token in range(1, self.tokens):
            found[token] |= found[(token - 1) // 2]
        return found

    def mask(self) -> np.ndarray | None:
        """bool [B, 1, T, S] over the slots of a dense cache, or None without a tree."""
        if not self.tree:
            return None
        mask = np.ones((self.batch, 1, self.tokens, self.length), bool)
        mask[..., self.length - self.tokens :] = self.ancestors()
        return mask

    def keys_seen(self) -> np.ndarray:
        """int [B, T]: keys that each query attends to, exactly."""
        older = np.maximum(self.lengths()[:, None].astype(np.int64) - self.tokens, 0)
        # A row without tokens has no newest ones.
        newest = self.ancestors().sum(1) * (self.lengths()[:, None] > 0)
        seen = older + newest
        return seen if self.window is None else np.minimum(seen, self.window + 1)

    def keys_read(self) -> np.ndarray:
        """int [B]: keys that some query of the row attends to."""
        lengths = self.lengths().astype(np.int64)
        if self.window is None:
            return lengths
        return np.minimum(lengths, self.window + self.tokens)

    def cache_bytes(self) -> int:
        """Of the keys, values and scales that must be read, each once."""
        per_token = bytes_per_token(
            self.kv_heads,
            self.head_dim,
            self.value_size,
            dtype=self.dtype,
            values_in_keys=self.latent,
        )
        return int(self.keys_read().sum()) * per_token

    def bytes(self) -> int:
        """Those, and the query and the output in bfloat16."""
        rows = self.batch * self.tokens * self.heads
        return self.cache_bytes() + 2 * rows * (self.head_dim + self.value_size)

    def flops(self) -> float:
        """Of the matrix products, over the pairs that the mask leaves."""
        return 2.0 * (self.head_dim + self.value_size) * self.heads * int(self.keys_seen().sum())

    def options(self) -> dict[str, Any]:
        """Arguments of ``Cache.attend`` that are no arrays; a ring knows its window."""
        found: dict[str, Any] = {}
        if self.window is not None and self.kind != "ring":
            found["local_window_size"] = (self.window, 0)
        if self.soft_cap is not None:
            found["logits_soft_cap"] = self.soft_cap
        if self.split is not None:
            found["kv_split_size"] = self.split
        return found


_K = 1024
_INT8, _FP8 = {"dtype": "int8"}, {"dtype": "float8_e4m3fn"}


def _paged(page: int, **more: Any) -> dict[str, Any]:
    return {"kind": "paged", "page": page, **more}


def _issue() -> tuple[Case, ...]:
    """What matters most is first: a budget of minutes ends the list early."""

    def gqa(batch, length, **more):
        return Case(batch, length, 32, 8, **more)

    def mqa(batch, length, **more):
        return Case(batch, length, 16, 1, **more)

    def ragged(**more):
        return gqa(32, 32 * _K, shortest=128, **more)

    def gemma(length, **more):
        return Case(16, length, 16, 8, 256, soft_cap=50.0, window=4 * _K, **more)

    def latent(batch, heads, **more):
        return Case(batch, 8 * _K, heads, 1, 576, 512, latent=True, **more)

    return (
        gqa(32, 4 * _K),
        gqa(32, 4 * _K, **_paged(64)),
        gqa(32, 4 * _K, **_INT8),
        gqa(32, 4 * _K, **_FP8),
        gqa(32, 4 * _K, **_paged(64, **_INT8)),
        gqa(32, 4 * _K, **_paged(16)),
        gqa(32, 4 * _K, **_paged(256)),
        latent(64, 128),
        latent(64, 128, **_paged(64)),
        latent(64, 128, **_FP8),
        latent(64, 128, **_paged(64, **_FP8)),
        latent(32, 16),
        gqa(1, 128 * _K),
        gqa(1, 128 * _K, **_paged(64)),
        gqa(1, 128 * _K, **_INT8),
        mqa(32, 8 * _K),
        mqa(32, 8 * _K, **_INT8),
        mqa(1, 128 * _K),
        mqa(1, 128 * _K, **_INT8),
        ragged(),
        ragged(**_paged(64)),
        ragged(split=2 * _K),
        ragged(**_paged(64), split=2 * _K),
        gqa(16, 4 * _K, tokens=4),
        gqa(16, 4 * _K, tokens=16),
        gqa(16, 4 * _K, tokens=8, tree=True),
        Case(64, 4 * _K, 32, 8, 64),
        gemma(4 * _K),
        # Here the window leaves half of the keys.
        gemma(8 * _K),
        gqa(32, 3 * 4 * _K, kind="ring", window=4 * _K),
        gqa(4, 8 * _K, tokens=512),
        gqa(4, 8 * _K, tokens=512, **_paged(64, **_INT8)),
    )


def _smoke() -> tuple[Case, ...]:
    """A few kinds, small."""
    return (
        Case(3, 64, 4, 2, 32),
        Case(4, 64, 4, 2, 32, shortest=8, **_paged(8, **_INT8)),
        Case(2, 64, 4, 1, 192, 128, latent=True, **_FP8),
    )


PRESETS = {"issue": _issue, "smoke": _smoke}
