"""Cells of ``layer_bench.py``, their columns, and what they say together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import noise, tables, units
from benchmarks.harness.layer_cases import BASELINE, Case
from benchmarks.harness.rows import OK
from benchmarks.harness.tables import Column

HERE = "here"


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is known of one case in one place; seconds and bytes.

    Attributes:
      model ... fused_qkv: the case.
      where: ``"here"`` (it ran on this machine) or the target that it was compiled for.
      device: what JAX calls the device.
      status, reason: as in `benchmarks.harness.rows.Row`.
      is_default: whether axattn takes this implementation when not told which.
      time, time_std, runs: median and standard deviation of so many runs; ``clock`` says of what.
      memory_bytes, temp_bytes: what the compiler plans: arguments + outputs + temporaries -
        aliased, and the temporaries of these. ``memory_kind``: "HBM", or "host" on a CPU.
      peak_bytes: the device allocator's high-water mark after one run.
      flops, bytes_accessed: the compiler's estimates for one run; lower bounds where
        ``cost_is_lower_bound``, the FLOPs then at least those by arithmetic.
      roofline: seconds, not measured: the longer of these two at the chip's published rates.
      speedup, memory_ratio, roofline_ratio: the baseline's time over this one's, this one's memory
        over the baseline's, the baseline's roofline over this one's (where both are no bounds);
        ``speedup_is_noise`` where the times spread by more than they differ.
    """

    model: str
    hidden: int
    heads: int
    kv_heads: int | None
    seq_len: int
    batch: int
    layer: str
    implementation: str
    form: str | None
    dtype: str
    direction: str
    heads_at_once: bool
    fused_qkv: bool
    where: str
    device: str | None = None
    status: str = OK
    reason: str | None = None
    is_default: bool = False
    time: float | None = None
    time_std: float | None = None
    runs: int | None = None
    clock: str | None = None
    memory_kind: str | None = None
    memory_bytes: int | None = None
    temp_bytes: int | None = None
    peak_bytes: int | None = None
    requested_bytes: int | None = None
    available_bytes: int | None = None
    compile_seconds: float | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    cost_is_lower_bound: bool = False
    roofline: float | None = None
    speedup: float | None = None
    speedup_is_noise: bool = False
    memory_ratio: float | None = None
    roofline_ratio: float | None = None
    notes: str | None = None

    @property
    def name(self) -> str:
        """The implementation, with what is particular of it; starred if axattn takes it."""
        parts = [self.implementation, *([self.form] if self.form else [])]
        if not self.heads_at_once:
            parts.append("head by head")
        if self.fused_qkv:
            parts.append("one QKV product")
        return ", ".join(parts) + (" *" if self.is_default else "")


def of_case(case: Case, where: str, **values: Any) -> Cell:
    model = case.model
    return Cell(
        model=model.name,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=case.kv_heads,
        seq_len=model.seq_len,
        batch=model.batch,
        layer=case.layer,
        implementation=case.implementation,
        form=case.form,
        dtype=case.dtype,
        direction=case.direction,
        heads_at_once=case.heads_at_once,
        fused_qkv=case.fused_qkv,
        where=where,
        **values,
    )


def compared(cell: Cell, base: Cell | None) -> Cell:
    """``cell`` with its ratios to ``base``."""
    if base is None:
        return cell
    bounds = base.cost_is_lower_bound or cell.cost_is_lower_bound
    return dataclasses.replace(
        cell,
        speedup=units.quotient(base.time, cell.time),
        speedup_is_noise=base is not cell
        and noise.of_times(cell.time, cell.time_std, base.time, base.time_std),
        memory_ratio=units.quotient(cell.memory_bytes, base.memory_bytes),
        roofline_ratio=None if bounds else units.quotient(base.roofline, cell.roofline),
    )


def _roofline(cell: Cell) -> str:
    return (">" if cell.cost_is_lower_bound and cell.roofline else "") + units.seconds(
        cell.roofline
    )


def _time(cell: Cell) -> str:
    if cell.time is None:
        return units.NOTHING
    return f"{units.seconds(cell.time)} +- {units.seconds(cell.time_std)}"


def _why(cell: Cell) -> str:
    return "" if cell.status == OK else tables.reason(cell, limit=160)


def columns(where: str, platform: str, first: str = "layer") -> list[Column]:
    """The columns for cells of one place; ``first`` is the field that tells them apart."""
    memory = "Host memory" if platform == "cpu" else "HBM"
    shared = [
        Column(first.replace("_", " ").capitalize(), 21, lambda c: str(getattr(c, first)), "left"),
        Column("Implementation", 22, lambda c: c.name, "left"),
    ]
    sizes = [
        Column(memory, 11, lambda c: units.size(c.memory_bytes)),
        Column("Temp", 9, lambda c: units.size(c.temp_bytes)),
        Column("Memory ratio", 12, lambda c: units.ratio(c.memory_ratio)),
    ]
    why = Column("", 0, _why, "left")
    if where == HERE:
        peak = [Column("HBM peak", 9, lambda c: units.size(c.peak_bytes))]
        return [
            *shared,
            Column("Time", 20, _time),
            Column("Speed-up", 8, lambda c: units.ratio(c.speedup, c.speedup_is_noise)),
            *sizes,
            *(peak if platform != "cpu" else []),
            why,
        ]
    return [
        *shared,
        *sizes,
        Column("FLOPs", 9, tables.flops),
        Column("Accessed", 9, tables.bytes_accessed),
        Column("Roofline", 9, _roofline),
        why,
    ]


@dataclasses.dataclass(frozen=True)
class Best:
    """The best cell of a layer, by time where it ran, else by memory."""

    model: str
    layer: str
    where: str
    best: str
    speedup: float | None
    speedup_is_noise: bool
    memory_ratio: float | None


BEST_COLUMNS = [
    Column("Model", 13, lambda b: b.model, "left"),
    Column("Layer", 21, lambda b: b.layer, "left"),
    Column("Where", 6, lambda b: b.where, "left"),
    Column("Best", 22, lambda b: b.best, "left"),
    Column("Speed-up", 8, lambda b: units.ratio(b.speedup, b.speedup_is_noise)),
    Column("Memory ratio", 12, lambda b: units.ratio(b.memory_ratio)),
]


def best(cells: Sequence[Cell]) -> list[Best]:
    """For each model, layer, direction and place the best cell against the einsum baseline."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        if cell.status == OK and cell.implementation != BASELINE:
            groups.setdefault((cell.model, cell.layer, cell.where, cell.direction), []).append(cell)
    found = []
    for (model, layer, where, direction), group in groups.items():
        cell = min(group, key=lambda c: c.time if c.time is not None else c.memory_bytes)
        name = f"{cell.name} ({direction})" if direction != "fwd" else cell.name
        found.append(
            Best(
                model,
                layer,
                where,
                name,
                cell.speedup,
                cell.speedup_is_noise,
                cell.memory_ratio,
            )
        )
    return found
