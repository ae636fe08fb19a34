"""One row of results, flat, as it is printed, written and read."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from benchmarks.harness import noise, units
from benchmarks.harness.cases import BASELINE, Case, Config

OK, OUT_OF_MEMORY, UNSUPPORTED, FAILED = "ok", "out_of_memory", "unsupported", "failed"


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of one case in one place; None is unknown. Seconds and bytes.

    Attributes:
      name, model_dim ... direction: the case.
      where: ``"here"`` (it ran on this machine) or the target that it was compiled for.
      device: what JAX calls the device.
      status: ``"ok"``, ``"out_of_memory"``, ``"unsupported"`` or ``"failed"``.
      reason: why not, where the status is not ok.
      is_default: whether axattn takes this implementation when not told which.
      time, time_stddev, cpu_time: per iteration; see `benchmarks.harness.timing.Timing`.
      clock: ``"wall"`` or ``"device"``.
      memory_kind: ``"HBM"``, or ``"host"``: the memory of a CPU is not HBM.
      memory_bytes: what the compiler plans: arguments + outputs + temporaries - aliased.
      temp_bytes: the temporaries of these.
      allocator_peak_bytes: the device allocator's high-water mark after one run.
      requested_bytes, available_bytes: of a refusal for want of memory.
      compile_seconds: of the compiler alone, tracing and lowering excluded.
      flops, bytes_accessed: the compiler's estimates for one run.
      cost_is_lower_bound: whether these leave something out.
      speedup: time of the baseline / time; ``speedup_is_noise`` where the times spread by more
        than they differ.
      memory_ratio: memory / memory of the baseline.
      notes: what a reader should know, separated by semicolons.
    """

    name: str
    model_dim: int
    heads: int
    kv_heads: int
    seq_len: int
    implementation: str
    batch: int
    dtype: str
    direction: str
    where: str
    device: str | None = None
    status: str = OK
    reason: str | None = None
    is_default: bool = False
    time: float | None = None
    time_stddev: float | None = None
    cpu_time: float | None = None
    iterations: int | None = None
    repetitions: int | None = None
    clock: str | None = None
    memory_kind: str | None = None
    memory_bytes: int | None = None
    temp_bytes: int | None = None
    allocator_peak_bytes: int | None = None
    requested_bytes: int | None = None
    available_bytes: int | None = None
    compile_seconds: float | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    cost_is_lower_bound: bool = False
    speedup: float | None = None
    speedup_is_noise: bool = False
    memory_ratio: float | None = None
    notes: str | None = None

    @property
    def config(self) -> Config:
        return Config(self.model_dim, self.heads, self.kv_heads, self.seq_len)

    @property
    def question(self) -> tuple:
        """What rows must have in common for a ratio between them to mean something."""
        return (self.config, self.batch, self.dtype, self.direction, self.where)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def of_case(case: Case, where: str, **values: Any) -> Row:
    """A row for ``case`` with the given values."""
    return Row(
        name=case.name,
        **dataclasses.asdict(case.config),
        implementation=case.implementation,
        batch=case.batch,
        dtype=case.dtype,
        direction=case.direction,
        where=where,
        **values,
    )


def from_dict(values: dict[str, Any]) -> Row:
    """The inverse of `Row.to_dict`, also where all values are strings, as in CSV ("" is None)."""
    hints = typing.get_type_hints(Row)
    return Row(**{name: _parse(value, hints[name]) for name, value in values.items()})


def _parse(value: Any, hint: Any) -> Any:
    if not isinstance(value, str):
        return value
    if isinstance(hint, types.UnionType):
        if value == "":
            return None
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    return value == "True" if hint is bool else hint(value)


def with_ratios(row: Row, rows: list[Row]) -> Row:
    """``row`` with its ratios to the baseline among ``rows``, if it is there."""
    for base in rows:
        if base.implementation == BASELINE and base.question == row.question:
            return dataclasses.replace(
                row,
                speedup=units.quotient(base.time, row.time),
                speedup_is_noise=base is not row
                and noise.of_times(row.time, row.time_stddev, base.time, base.time_stddev),
                memory_ratio=units.quotient(row.memory_bytes, base.memory_bytes),
            )
    return row
