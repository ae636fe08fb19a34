"""The tables of ``scale_bench.py``."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.harness import processes, rows, scale_rows, units
from benchmarks.harness.scale_cases import Case
from benchmarks.harness.scale_jobs import Compile
from benchmarks.harness.scale_rows import Cell
from benchmarks.harness.sections import Sections

UPPER_BOUNDS = (
    "FLOPs are by arithmetic, half of all pairs. Compiled and Accessed are upper bounds: kernels "
    "that learn positions at run time count all pairs, and skip what is masked. Rooflines by these "
    "bytes are upper bounds, too (<)."
)


def table(
    out: Sections, title: str, where: str, wanted: Iterable[Case], timeout: float | None
) -> list[Cell]:
    """A table of cases that differ in chips and strategy, or in chips and dtype of the cache."""
    from axattn import aot

    wanted = list(wanted)
    chip = aot.target(where)
    columns = scale_rows.columns(wanted[0].table, chip.platform)
    memory = f" ({units.size(chip.hbm_bytes)} of HBM)" if chip.hbm_bytes else ""
    title = f"{title}; per chip, compiled for {where}{memory}, nothing was run"
    out.begin(wanted[0].table, title, columns)
    found = []
    for case in wanted:
        cell = finish(Compile(case, where), timeout)
        out.row(cell, cell.reason if cell.status == rows.FAILED else None)
        found.append(cell)
    if wanted[0].table == "layer":
        out.note(UPPER_BOUNDS)
    for note in dict.fromkeys(cell.notes for cell in found if cell.notes):
        out.note(note)
    return found


def finish(job: Compile, timeout: float | None) -> Cell:
    """The job's cell, whatever becomes of its process."""
    try:
        return processes.call(job, timeout)
    except RuntimeError as error:  # also a process that died or hung
        last = str(error).strip().splitlines()[-1]
        return scale_rows.of_case(job.case, job.where, status=rows.FAILED, reason=last)
