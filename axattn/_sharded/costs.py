"""What each strategy moves and computes, by arithmetic: the choice of one, and a table to print."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from axattn._masks import Mask
from axattn._sharded import layouts, ulysses
from axattn.aot._targets import Target
from axattn.aot._targets import target as find_target

STRATEGIES = ("ring", "gather", "ulysses")

# Queries that are looked at of each run of a shard, to count pairs.
SAMPLES = 16


def _v5p(name: str) -> Any:
    return dataclasses.field(default_factory=lambda: getattr(Links.of("v5p"), name))


@dataclasses.dataclass(frozen=True)
class Links:
    """Rates of a device, from its data sheet: of products, and of what it sends to a neighbour.

    By default those of a TPU v5p.

    Attributes:
      flops: FLOP/s in bfloat16.
      bytes: bytes/s to a neighbour, one way.

    Example:
      >>> from axattn import parallel
      >>> parallel.Links().bytes, parallel.Links.of("v6e").bytes
      (100000000000.0, 100000000000.0)
      >>> slow = parallel.Links(bytes=10e9)  # for links= of attention and explain
    """

    flops: float = _v5p("flops")
    bytes: float = _v5p("bytes")

    @classmethod
    def of(cls, target: str | Target) -> Links:
        """Those of a chip of ``axattn.aot.TARGETS``, by its data sheet.

        Args:
          target: a name, or an `axattn.aot.Target`.

        Raises:
          ValueError: an unknown target, or the CPU, which has no such figures.
        """
        chip = find_target(target)
        if chip.peak_bf16_flops is None or chip.ici_bandwidth is None:
            raise ValueError(f"target takes an accelerator, got {chip.name!r}")
        return cls(chip.peak_bf16_flops, chip.ici_bandwidth / chip.ici_links)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One device's share before the sequence is cut, but for T and S, which are whole."""

    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    itemsize: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a strategy costs one device, forward; printed, a line.

    Attributes:
      strategy: "ring", "gather" or "ulysses".
      refusal: why the strategy does not take the call, or None.
      sent: bytes that the busiest device sends.
      flops: of the busiest device.
      held: bytes of keys and values of others that it holds at once.
      seconds: of both by arithmetic, overlapped where the strategy overlaps.
    """

    strategy: str
    refusal: str | None = None
    sent: float = 0.0
    flops: float = 0.0
    held: float = 0.0
    seconds: float = float("inf")

    def __str__(self) -> str:
        if self.refusal:
            return f"{self.strategy:8} {self.refusal}"
        return (
            f"{self.strategy:8} {self.seconds * 1e3:9.3f} ms  sends {self.sent / 2**20:9.1f} MiB  "
            f"holds {self.held / 2**20:9.1f} MiB  {self.flops / 1e12:9.3f} TFLOP"
        )


def costs(
    problem: Problem, mask: Mask, layout: str | None, shards: int, links: Links
) -> list[Cost]:
    """Of every strategy, the one to take first."""
    pairs = _pairs(problem, mask, layout, shards)
    hops = layouts.hops(mask, layout, shards, problem.q_len, problem.kv_len)
    found = [
        _ring(problem, pairs, hops, links),
        _gather(problem, pairs, links),
        _ulysses(problem, pairs, links),
    ]
    return sorted(found, key=lambda cost: cost.seconds)


def _kv_bytes(p: Problem, shards: int) -> float:
    """Of one shard's keys and values."""
    size = p.head_dim + p.value_head_dim
    return p.batch * p.kv_len / shards * p.num_kv_heads * size * p.itemsize


def _flops(p: Problem, pairs: float) -> float:
    return 2.0 * p.batch * p.num_heads * pairs * (p.head_dim + p.value_head_dim)


def _ring(p: Problem, pairs: np.ndarray, hops: tuple[int, ...], links: Links) -> Cost:
    shards = np.arange(len(pairs))
    block = _kv_bytes(p, len(pairs))
    # Hop by hop, computing while the next keys are on their way; all wait for the slowest.
    seconds = 0.0
    for i, distance in enumerate(hops):
        busiest = pairs[shards, (shards - distance) % len(pairs)].max()
        sends = block * (hops[i + 1] - distance) if i + 1 < len(hops) else 0.0
        seconds += max(_flops(p, busiest) / links.flops, sends / links.bytes)
    busiest = pairs.sum(1).max()
    held = min(2, len(hops) - 1) * block
    return Cost("ring", None, block * hops[-1], _flops(p, busiest), held, seconds)


def _gather(p: Problem, pairs: np.ndarray, links: Links) -> Cost:
    shards, busiest = len(pairs), _flops(p, pairs.sum(1).max())
    sent = _kv_bytes(p, shards) * (shards - 1)
    # Both ways around at once.
    seconds = sent / (2 * links.bytes) + busiest / links.flops
    return Cost("gather", None, sent, busiest, sent, seconds)


def _ulysses(p: Problem, pairs: np.ndarray, links: Links) -> Cost:
    shards = len(pairs)
    refusal = ulysses.refuses(p.num_heads, p.num_kv_heads, shards)
    if refusal:
        return Cost("ulysses", refusal)
    flops = _flops(p, float(pairs.sum()) / shards)
    rows = p.batch * p.q_len / shards * p.num_heads * (p.head_dim + p.value_head_dim) * p.itemsize
    keys = _kv_bytes(p, shards) * max(1, shards // p.num_kv_heads)
    sent = (rows + keys) * (shards - 1) / shards
    # On a ring a part travels a quarter of the way round on average, both ways.
    seconds = sent * shards / 4 / (2 * links.bytes) + flops / links.flops
    return Cost("ulysses", None, sent, flops, keys, seconds)


def _pairs(p: Problem, mask: Mask, layout: str | None, shards: int) -> np.ndarray:
    """Pairs of tokens that attend, of each shard's queries with each shard's keys.

    Of some queries, spread over the shard, keys are counted.
    """
    rows = p.q_len / shards
    if layout is None:
        return np.full((shards, shards), rows * p.kv_len / shards)
    queries, keys = (np.array(layouts.runs(layout, shards, n)) for n in (p.q_len, p.kv_len))
    at = np.linspace(queries[..., 0], queries[..., 1], SAMPLES, axis=-1).round()
    first, last = layouts.reach(mask, at.reshape(shards, -1))
    # [shard of queries, sample, shard of keys, their run]
    low = np.maximum(first[..., None, None], keys[..., 0])
    high = np.minimum(last[..., None, None], keys[..., 1])
    return np.maximum(high - low + 1, 0).sum(-1).mean(1) * rows
