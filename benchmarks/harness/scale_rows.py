"""Cells of ``scale_bench.py``, their columns, and the roofline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.harness import tables, units
from benchmarks.harness.rows import OK
from benchmarks.harness.scale_cases import Case
from benchmarks.harness.tables import Column


@dataclasses.dataclass(frozen=True)
class Cell:
    """What the compiler says of one case, per chip; seconds and bytes. Nothing was run.

    Attributes:
      table ... layout: the case.
      where: the target.
      device: what JAX calls the device.
      status, reason: as in `benchmarks.harness.rows.Row`.
      memory_bytes: arguments + outputs + temporaries - aliased; ``argument_bytes`` and
        ``temp_bytes`` are parts of it. ``memory_kind``: "HBM", or "host" on a CPU.
      sent: bytes that a chip sends, by kind of collective; see `axattn.aot.Collective`.
      flops: by arithmetic, half of all pairs where the mask is causal.
      compiled_flops, bytes_accessed: the compiler's estimates, in which kernels count all pairs of
        every block that a shard may see: on the layer upper bounds. Or lower bounds, where
        ``cost_is_lower_bound``.
      roofline: the longest of FLOPs, bytes accessed and bytes sent at the chip's published rates,
        and ``bound`` which one. With an upper bound of bytes accessed it is one, too.
      estimate: of the attention forward, by `axattn.parallel.explain`.
    """

    table: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    chips: int
    head_ways: int
    length: int
    batch: int
    strategy: str
    direction: str
    dtype: str
    layout: str | None
    where: str
    device: str | None = None
    status: str = OK
    reason: str | None = None
    memory_kind: str | None = None
    memory_bytes: int | None = None
    argument_bytes: int | None = None
    temp_bytes: int | None = None
    requested_bytes: int | None = None
    available_bytes: int | None = None
    sent: Mapping[str, float] = dataclasses.field(default_factory=dict)
    flops: float | None = None
    compiled_flops: float | None = None
    bytes_accessed: float | None = None
    cost_is_lower_bound: bool = False
    roofline: float | None = None
    bound: str | None = None
    estimate: float | None = None
    compile_seconds: float | None = None
    notes: str | None = None


def of_case(case: Case, where: str, **values: Any) -> Cell:
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    fields |= dataclasses.asdict(fields.pop("sizes"))
    return Cell(**fields, where=where, **values)


def roofline(
    chip: Any, flops: float, accessed: float | None, sent: Mapping[str, float]
) -> tuple[float | None, str | None]:
    """Seconds at the rates of a target, and which rate bounds; None where it has none.

    What goes to one neighbour goes over one link, everything else over all links at once.
    """
    rates = chip.peak_bf16_flops and chip.hbm_bandwidth and chip.ici_bandwidth
    if not rates or accessed is None:
        return None, None
    to_one = sent.get("collective-permute", 0.0)
    others = sum(sent.values()) - to_one
    found = {
        "FLOPs": flops / chip.peak_bf16_flops,
        "HBM": accessed / chip.hbm_bandwidth,
        "links": (to_one * chip.ici_links + others) / chip.ici_bandwidth,
    }
    bound = max(found, key=found.get)
    return found[bound], bound


def _sent(*kinds: str):
    def cell(row: Cell) -> str:
        if row.status != OK:
            return units.NOTHING
        return units.size(sum(row.sent.get(kind, 0.0) for kind in kinds) or None)

    return cell


def _bound(row: Cell) -> str:
    if row.roofline is None:
        return units.NOTHING
    most = "<" if row.table == "layer" and row.bound == "HBM" else ""
    return f"{most}{units.seconds(row.roofline)} ({row.bound})"


def _why(row: Cell) -> str:
    return "" if row.status == OK else tables.reason(row, limit=160)


def columns(table: str, platform: str) -> list[Column]:
    """The columns for cells of one table."""
    memory = "Host memory" if platform == "cpu" else "HBM"
    first = {
        "layer": Column("Strategy", 8, lambda c: c.strategy, "left"),
        "decode": Column("Cache", 8, lambda c: c.dtype, "left"),
    }[table]
    estimate = Column("Estimate", 9, lambda c: units.seconds(c.estimate))
    return [
        Column("Chips", 5, lambda c: str(c.chips)),
        first,
        Column(memory, 9, lambda c: units.size(c.memory_bytes)),
        Column("Arguments", 9, lambda c: units.size(c.argument_bytes)),
        Column("Temp", 9, lambda c: units.size(c.temp_bytes)),
        Column("Permuted", 9, _sent("collective-permute")),
        Column("Gathered", 9, _sent("all-gather")),
        Column("Reduced", 9, _sent("all-reduce", "reduce-scatter")),
        Column("All-to-all", 10, _sent("all-to-all", "ragged-all-to-all")),
        Column("FLOPs", 8, lambda c: units.amount(c.flops) if c.status == OK else units.NOTHING),
        Column("Compiled", 8, lambda c: units.amount(c.compiled_flops)),
        Column("Accessed", 8, tables.bytes_accessed),
        Column("Roofline", 16, _bound),
        *([estimate] if table == "layer" else []),
        Column("", 0, _why, "left"),
    ]
