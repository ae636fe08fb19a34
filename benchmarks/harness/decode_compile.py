"""Decode attention compiled for a chip that is not here: memory and the floor, no time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax

from axattn import aot
from benchmarks.harness import cell_job, decode_inputs, decode_programs, tables, units
from benchmarks.harness.decode_cases import Case
from benchmarks.harness.decode_rows import Ceiling, floor_text
from benchmarks.harness.kernel_rows import FAILED, OK, OUT_OF_MEMORY, UNSUPPORTED, Verdict

_STATUS = {"out_of_memory": OUT_OF_MEMORY, "unsupported": UNSUPPORTED}


@dataclasses.dataclass(frozen=True)
class Row(Verdict):
    """One implementation on one case, as a compiler plans it.

    Attributes:
      bytes, flops, floor_seconds, bound: as in `decode_rows.Cell`, of the data sheet.
      hbm_bytes: arguments, output and temporaries; temp_bytes: the temporaries among them.
    """

    case: str
    target: str
    direction: str
    implementation: str
    bytes: int
    flops: float
    floor_seconds: float | None = None
    bound: str | None = None
    status: str = OK
    reason: str | None = None
    hbm_bytes: int | None = None
    temp_bytes: int | None = None
    compile_seconds: float | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Compile(cell_job.Measure):
    """Compiles a case for ``target``; nothing is run, nor allocated."""

    case: Case
    target: str = "h200"

    def __call__(self) -> Iterator[Any]:
        aot.device(aot.target(self.target))  # first: it prepares what JAX starts in
        for direction in self.directions:
            for name in self.names(direction):
                row = self.cell(direction, name)
                if time.time() > self.stop:
                    yield dataclasses.replace(row, **cell_job.time_is_up())
                    continue
                yield cell_job.Doing(direction, (name,))
                try:
                    found = self.compiled(name)
                except Exception as error:  # one row's failure is a reason, not the end
                    found = cell_job.reason(error)
                yield dataclasses.replace(row, **found)

    def bench(self):
        raise NotImplementedError("nothing is run")

    def cell(self, direction: str, implementation: str, **values: Any) -> Row:
        floor, bound = Ceiling.of(aot.target(self.target)).floor(self.case)
        return Row(
            case=self.case.name,
            target=self.target,
            direction=direction,
            implementation=implementation,
            bytes=self.case.bytes(),
            flops=self.case.flops(),
            floor_seconds=floor,
            bound=bound,
            **values,
        )

    def compiled(self, implementation: str) -> dict[str, Any]:
        """What a row says of the compiled program."""
        program = decode_programs.program(self.case, implementation)
        structs = jax.eval_shape(program.convert, decode_inputs.structs(self.case))
        report = aot.analyze(program.attend, structs, target=self.target)
        found = {
            "hbm_bytes": report.total_bytes,
            "temp_bytes": report.temp_bytes,
            "compile_seconds": report.compile_seconds,
        }
        if report.refusal is not None:
            status = _STATUS.get(report.refusal.kind, FAILED)
            return {**found, "status": status, "reason": str(report.refusal)}
        return found


COLUMNS = (
    tables.Column("Case", 46, lambda r: r.case, "left"),
    tables.Column("Implementation", 14, lambda r: r.implementation, "left"),
    tables.Column("Floor", 15, floor_text),
    tables.Column("Bytes", 9, lambda r: units.size(r.bytes)),
    tables.Column("HBM", 9, lambda r: units.size(r.hbm_bytes)),
    tables.Column("HBM temp", 9, lambda r: units.size(r.temp_bytes)),
    tables.Column("Compile", 8, lambda r: units.seconds(r.compile_seconds)),
    tables.Column("", 0, lambda r: r.remark, "left"),
)
