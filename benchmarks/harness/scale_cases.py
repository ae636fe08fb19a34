"""What ``scale_bench.py`` asks: a layer and a decoding step over the chips of a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from axattn._sharded.costs import STRATEGIES

TABLES = ("layer", "decode")
DIRECTIONS = ("fwd", "fwd+bwd")
CACHE_DTYPES = ("bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a layer, or of the heads of a cache."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell's question.

    Attributes:
      table: of `TABLES`.
      sizes: of the layer.
      chips: of the mesh, which share out the sequence.
      head_ways: ways into which these chips share out the heads first.
      length: tokens of the sequence, or of each row of the cache.
      batch: rows.
      strategy: of `STRATEGIES`; ``"dealt"`` over a cache, whose tokens stay where they are.
      direction: of `DIRECTIONS`; ``"step"`` over a cache.
      dtype: of parameters and activations, or of the cache.
      layout: of the sequence; None over a cache.
    """

    table: str
    sizes: Sizes
    chips: int
    head_ways: int
    length: int
    batch: int
    strategy: str
    direction: str
    dtype: str
    layout: str | None = None

    @property
    def axes(self) -> dict[str, int]:
        """Of the mesh."""
        return {"model": self.head_ways, "context": self.chips // self.head_ways}


def parse_heads(text: str) -> tuple[int, int]:
    """``"32/4"`` as 32 query and 4 key/value heads; ValueError for anything else."""
    heads, _, kv_heads = text.partition("/")
    counts = [int(n) if n.isdecimal() else 0 for n in (heads, kv_heads)]
    if not all(counts) or counts[0] % counts[1]:
        raise ValueError(f"takes query heads and a divisor of them as 32/4, got {text!r}")
    return counts[0], counts[1]


def layers(
    sizes: Sizes,
    length: int,
    direction: str,
    *,
    chips: Sequence[int],
    strategies: Sequence[str],
    head_ways: int,
    layout: str,
) -> Iterator[Case]:
    """One layer over more and more chips, with each strategy."""
    for count in chips:
        for strategy in strategies:
            yield Case(
                "layer", sizes, count, head_ways, length, 1, strategy, direction, "bfloat16", layout
            )


def steps(
    sizes: Sizes, length: int, batch: int, *, chips: Sequence[int], head_ways: int
) -> Iterator[Case]:
    """One step of decoding over more and more chips, with caches of each dtype."""
    for count in chips:
        for dtype in CACHE_DTYPES:
            yield Case("decode", sizes, count, head_ways, length, batch, "dealt", "step", dtype)


__all__ = [
    "CACHE_DTYPES", "DIRECTIONS", "STRATEGIES", "TABLES", "Case", "Sizes", "layers", "parse_heads",
    "steps",
]  # fmt: skip
