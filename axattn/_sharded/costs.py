"""A cost model of the strategies: bytes, FLOPs and seconds of each, by arithmetic."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np

from axattn._masks import Mask
from axattn._sharded import layouts, ulysses
from axattn.aot._targets import Target
from axattn.aot._targets import target as find_target

STRATEGIES = ("ring", "gather", "ulysses")

# Query positions of each chunk for which keys are counted.
SAMPLES = 16


def _read_v5p(name: str) -> Any:
    return dataclasses.field(default_factory=lambda: getattr(Links.from_target("v5p"), name))


@dataclasses.dataclass(frozen=True)
class Links:
    """Rates of a device, from its data sheet. The defaults are those of a TPU v5p.

    Attributes:
      flops: FLOP/s of matrix products in bfloat16.
      bytes: bytes/s to one neighbour, one way.

    Example:
      >>> from axattn import parallel
      >>> parallel.Links().bytes, parallel.Links.from_target("v6e").bytes
      (100000000000.0, 100000000000.0)
      >>> slow = parallel.Links(bytes=10e9)  # for links= of attention and explain
    """

    flops: float = _read_v5p("flops")
    bytes: float = _read_v5p("bytes")

    @classmethod
    def from_target(cls, target: str | Target) -> Links:
        """Return the rates of a chip of ``axattn.aot.TARGETS``, by its data sheet.

        Args:
          target: a name, or an `axattn.aot.Target`.

        Raises:
          ValueError: an unknown target, or the CPU, which has no such figures.
        """
        chip = find_target(target)
        if chip.peak_bf16_flops is None or chip.ici_bandwidth is None:
            raise ValueError(f"target takes an accelerator, got {chip.name!r}")
        return cls(chip.peak_bf16_flops, chip.ici_bandwidth / chip.ici_links)

    @classmethod
    def of(cls, target: str | Target) -> Links:
        """Return the same as `from_target`: a deprecated name.

        Args:
          target: as in `from_target`.

        Raises:
          ValueError: as in `from_target`.
        """
        message = "axattn.parallel.Links.of is deprecated: use axattn.parallel.Links.from_target"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return cls.from_target(target)


@dataclasses.dataclass(frozen=True)
class ShardSizes:
    """Sizes of a call on one device. The sequence is not sharded yet: T and S are whole."""

    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    itemsize: int


@dataclasses.dataclass(frozen=True)
class StrategyCost:
    """What a strategy costs one device, forward. It prints as one line.

    Attributes:
      strategy: "ring", "gather" or "ulysses".
      refusal: why the strategy does not support the call, or None.
      sent: bytes that the busiest device sends.
      flops: FLOPs of the busiest device.
      held: bytes of other devices' keys and values that it stores at a time.
      seconds: estimated time to compute and to send, overlapped where the strategy overlaps them.
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


def estimate_costs(
    sizes: ShardSizes, mask: Mask, layout: str | None, shards: int, links: Links
) -> list[StrategyCost]:
    """Return the cost of every strategy, the fastest first."""
    pairs = _count_pairs(sizes, mask, layout, shards)
    distances = layouts.list_ring_distances(mask, layout, shards, sizes.q_len, sizes.kv_len)
    costs = [
        _estimate_ring(sizes, pairs, distances, links),
        _estimate_gather(sizes, pairs, links),
        _estimate_ulysses(sizes, pairs, links),
    ]
    return sorted(costs, key=lambda cost: cost.seconds)


def _count_kv_bytes(sizes: ShardSizes, shards: int) -> float:
    """Return the bytes of one shard's keys and values."""
    head_sizes = sizes.head_dim + sizes.value_head_dim
    return sizes.batch * sizes.kv_len / shards * sizes.num_kv_heads * head_sizes * sizes.itemsize


def _count_flops(sizes: ShardSizes, pairs: float) -> float:
    return 2.0 * sizes.batch * sizes.num_heads * pairs * (sizes.head_dim + sizes.value_head_dim)


def _estimate_ring(
    sizes: ShardSizes, pairs: np.ndarray, distances: tuple[int, ...], links: Links
) -> StrategyCost:
    shards = np.arange(len(pairs))
    block = _count_kv_bytes(sizes, len(pairs))
    # A step computes while the next keys are being sent; all devices wait for the slowest.
    seconds = 0.0
    for i, distance in enumerate(distances):
        busiest = pairs[shards, (shards - distance) % len(pairs)].max()
        sends = block * (distances[i + 1] - distance) if i + 1 < len(distances) else 0.0
        seconds += max(_count_flops(sizes, busiest) / links.flops, sends / links.bytes)
    flops, sent = _count_flops(sizes, pairs.sum(1).max()), block * distances[-1]
    held = min(2, len(distances) - 1) * block
    return StrategyCost("ring", None, sent, flops, held, seconds)


def _estimate_gather(sizes: ShardSizes, pairs: np.ndarray, links: Links) -> StrategyCost:
    shards, busiest = len(pairs), _count_flops(sizes, pairs.sum(1).max())
    sent = _count_kv_bytes(sizes, shards) * (shards - 1)
    # Both directions of the ring at a time.
    seconds = sent / (2 * links.bytes) + busiest / links.flops
    return StrategyCost("gather", None, sent, busiest, sent, seconds)


def _estimate_ulysses(sizes: ShardSizes, pairs: np.ndarray, links: Links) -> StrategyCost:
    shards = len(pairs)
    refusal = ulysses.find_refusal(sizes.num_heads, sizes.num_kv_heads, shards)
    if refusal:
        return StrategyCost("ulysses", refusal)
    flops = _count_flops(sizes, float(pairs.sum()) / shards)
    head_sizes = sizes.head_dim + sizes.value_head_dim
    tokens = sizes.batch * sizes.q_len / shards
    rows = tokens * sizes.num_heads * head_sizes * sizes.itemsize
    keys = _count_kv_bytes(sizes, shards) * max(1, shards // sizes.num_kv_heads)
    sent = (rows + keys) * (shards - 1) / shards
    # On a ring a part travels a quarter of the way round on average, in both directions.
    seconds = sent * shards / 4 / (2 * links.bytes) + flops / links.flops
    return StrategyCost("ulysses", None, sent, flops, keys, seconds)


def _count_pairs(sizes: ShardSizes, mask: Mask, layout: str | None, shards: int) -> np.ndarray:
    """Count the pairs that attend, for each shard of queries and each shard of keys.

    Keys are counted for a sample of the queries.
    """
    rows = sizes.q_len / shards
    if layout is None:
        return np.full((shards, shards), rows * sizes.kv_len / shards)
    lengths = sizes.q_len, sizes.kv_len
    queries, keys = (np.array(layouts.list_chunks(layout, shards, n)) for n in lengths)
    at = np.linspace(queries[..., 0], queries[..., 1], SAMPLES, axis=-1).round()
    first, last = layouts.compute_key_range(mask, at.reshape(shards, -1))
    # [shard of queries, sample, shard of keys, their chunk]
    low = np.maximum(first[..., None, None], keys[..., 0])
    high = np.minimum(last[..., None, None], keys[..., 1])
    return np.maximum(high - low + 1, 0).sum(-1).mean(1) * rows
