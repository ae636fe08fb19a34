"""Cells of ``decode_bench.py``: each a number, or the reason why there is none."""

from __future__ import annotations

import dataclasses

from axattn import aot
from benchmarks.harness import tables, units
from benchmarks.harness.decode_cases import Case
from benchmarks.harness.kernel_rows import IMPOSSIBLE, OK, Verdict


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What the device can do.

    Attributes:
      copied: bytes/s of a copy that was measured in this run, read and written.
      bandwidth, flops: bytes/s and bfloat16 FLOP/s of the data sheet; None for an unknown device.
    """

    copied: float | None = None
    bandwidth: float | None = None
    flops: float | None = None

    @classmethod
    def of(cls, target: aot.Target | None, copied: float | None = None) -> Ceiling:
        if target is None:
            return cls(copied)
        return cls(copied, target.hbm_bandwidth, target.peak_bf16_flops)

    def floor(self, case: Case) -> tuple[float | None, str | None]:
        """Seconds that a call must take, and whether "memory" or "compute" says so."""
        if self.bandwidth is None or self.flops is None:
            return None, None
        times = {"memory": case.bytes() / self.bandwidth, "compute": case.flops() / self.flops}
        bound = max(times, key=times.get)
        return times[bound], bound


@dataclasses.dataclass(frozen=True)
class Cell(Verdict):
    """One implementation on one case.

    Attributes:
      tokens, length: T and S (of the longest row).
      layout, dtype: of the cache.
      status, reason: "ok", or why there is no time.
      seconds: median of ``rounds`` rounds, of all kernels of the call; ``clock`` is "device"
        (CUPTI, cold L2) or "wall".
      bytes: of the keys, values and scales that must be read, once, the query and the output.
      flops: of the products over the pairs that the mask leaves.
      floor_seconds, bound: see `Ceiling.floor`.
      bytes_per_second: ``bytes`` / ``seconds``; ``of_copy``: as part of a copy's rate.
      of_floor: ``floor_seconds`` / ``seconds``.
      best, ratio: the fastest of the others than mosaic_gpu, and its time / this one, the median
        over rounds.
      ratio_is_noise: whether the rounds' ratios spread by more than that differs from 1.
      error, allowed, result, against: see `accuracy` and `decode_check`.
    """

    case: str
    layout: str
    dtype: str
    batch: int
    tokens: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    bytes: int
    flops: float
    direction: str
    implementation: str
    status: str = OK
    reason: str | None = None
    seconds: float | None = None
    rounds: int | None = None
    clock: str | None = None
    floor_seconds: float | None = None
    bound: str | None = None
    bytes_per_second: float | None = None
    of_floor: float | None = None
    of_copy: float | None = None
    best: str | None = None
    ratio: float | None = None
    ratio_is_noise: bool = False
    result: str | None = None
    error: float | None = None
    allowed: float | None = None
    against: str | None = None
    note: str | None = None

    @classmethod
    def of(cls, case: Case, direction: str, implementation: str, **values) -> Cell:
        return cls(
            case=case.name,
            layout=case.layout,
            dtype=case.dtype,
            batch=case.batch,
            tokens=case.tokens,
            length=case.length,
            heads=case.heads,
            kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            value_head_dim=case.value_size,
            bytes=case.bytes(),
            flops=case.flops(),
            direction=direction,
            implementation=implementation,
            **values,
        )


def rated(cell: Cell, case: Case, ceiling: Ceiling) -> Cell:
    """The cell with its rates; one that is faster than the hardware is not to be believed."""
    floor, bound = ceiling.floor(case)
    cell = dataclasses.replace(cell, floor_seconds=floor, bound=bound)
    if cell.seconds is None:
        return cell
    rate = case.bytes() / cell.seconds
    cell = dataclasses.replace(
        cell,
        bytes_per_second=rate,
        of_floor=floor and floor / cell.seconds,
        of_copy=ceiling.copied and rate / ceiling.copied,
    )
    if floor is None or cell.seconds >= floor:
        return cell
    if bound == "memory":
        amounts = (units.amount(value, "B/s") for value in (rate, ceiling.bandwidth))
    else:
        flops = case.flops() / cell.seconds
        amounts = (units.amount(value, "FLOP/s") for value in (flops, ceiling.flops))
    return dataclasses.replace(
        cell, status=IMPOSSIBLE, reason="{} are beyond the peak, {}".format(*amounts)
    )


def floor_text(cell) -> str:
    """``112 us memory``."""
    return f"{units.seconds(cell.floor_seconds)} {cell.bound or ''}".rstrip()


COLUMNS = (
    tables.Column("Case", 46, lambda c: c.case, "left"),
    tables.Column("Implementation", 14, lambda c: c.implementation, "left"),
    tables.Column("Time", 8, lambda c: units.seconds(c.seconds)),
    tables.Column("Floor", 15, floor_text),
    tables.Column("Of floor", 8, lambda c: units.percent(c.of_floor, 1.0)),
    tables.Column("Rate", 9, lambda c: units.amount(c.bytes_per_second, "B/s")),
    tables.Column("Of copy", 7, lambda c: units.percent(c.of_copy, 1.0)),
    tables.Column("best/this", 9, lambda c: units.ratio(c.ratio, c.ratio_is_noise)),
    tables.Column("Best other", 13, lambda c: c.best or units.NOTHING, "left"),
    tables.Column("Error/allowed", 15, lambda c: c.errors),
    tables.Column("", 0, lambda c: c.remark, "left"),
)
