"""Tables for people: rows printed as they come, columns that fit what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from benchmarks.harness import units
from benchmarks.harness.rows import OK, Row


@dataclasses.dataclass(frozen=True)
class Column:
    """A header, a width at least, and what stands in the cell for an item, e.g. a `Row`."""

    header: str
    width: int
    cell: Callable[[Any], str]
    justify: str = "right"


def _case_columns() -> list[Column]:
    return [
        Column("Benchmark", 28, lambda r: r.name, "left"),
        Column("Implementation", 14, implementation, "left"),
        Column("Batch", 5, lambda r: str(r.batch)),
        Column("dtype", 8, lambda r: r.dtype, "left"),
        Column("Direction", 9, lambda r: r.direction, "left"),
    ]


def implementation(row: Row) -> str:
    """The name, starred where it is axattn's own choice."""
    return row.implementation + (" *" if row.is_default and row.implementation != "default" else "")


def iterations(row: Row) -> str:
    """Repetitions x iterations."""
    return units.NOTHING if row.iterations is None else f"{row.repetitions}x{row.iterations}"


def flops(row: Any) -> str:
    return (">" if row.cost_is_lower_bound and row.flops else "") + units.amount(row.flops)


def bytes_accessed(row: Any) -> str:
    bound = ">" if row.cost_is_lower_bound and row.bytes_accessed else ""
    return bound + units.amount(row.bytes_accessed, "B")


def columns_here(platform: str) -> list[Column]:
    """Columns for rows that ran here. On a CPU no column is called HBM."""
    memory = [Column("Host memory", 11, lambda r: units.size(r.memory_bytes))]
    if platform != "cpu":
        memory = [
            Column("HBM", 9, lambda r: units.size(r.memory_bytes)),
            Column("HBM peak", 9, lambda r: units.size(r.allocator_peak_bytes)),
        ]
    return [
        *_case_columns(),
        Column("Time", 8, lambda r: units.seconds(r.time)),
        Column("+-", 4, lambda r: units.percent(r.time_stddev, r.time)),
        Column("CPU", 8, lambda r: units.seconds(r.cpu_time)),
        Column("Iterations", 10, iterations),
        *memory,
        Column("Temp", 9, lambda r: units.size(r.temp_bytes)),
        Column("Compile", 8, lambda r: units.seconds(r.compile_seconds)),
        Column("Speed-up", 8, lambda r: units.ratio(r.speedup, r.speedup_is_noise)),
    ]


def columns_target(memory: str = "HBM") -> list[Column]:
    """Columns for rows that were compiled for a target and not run."""
    return [
        *_case_columns(),
        Column(memory, 11, lambda r: units.size(r.memory_bytes)),
        Column("Temp", 9, lambda r: units.size(r.temp_bytes)),
        Column(f"{memory} ratio", max(9, len(memory) + 6), lambda r: units.ratio(r.memory_ratio)),
        Column("FLOPs", 9, flops),
        Column("Accessed", 9, bytes_accessed),
        Column("Compile", 8, lambda r: units.seconds(r.compile_seconds)),
    ]


class Stream:
    """A table that is printed row by row."""

    def __init__(self, console: Console, columns: Sequence[Column]):
        self.console, self.columns = console, columns
        self.widths = [max(c.width, len(c.header)) for c in columns]

    def header(self) -> None:
        self._print([c.header for c in self.columns], "bold")
        rule = "-" * (sum(self.widths) + 2 * (len(self.widths) - 1))
        self.console.print(Text(rule), soft_wrap=True)

    def row(self, item: Any, style: str | None = None) -> None:
        self._print([c.cell(item) for c in self.columns], style)

    def _print(self, cells: Sequence[str], style: str | None) -> None:
        # As wide as it has to be, whatever the terminal: numbers that are cut off help nobody.
        padded = [
            cell.ljust(width) if column.justify == "left" else cell.rjust(width)
            for cell, column, width in zip(cells, self.columns, self.widths, strict=True)
        ]
        self.console.print(Text("  ".join(padded).rstrip(), style or ""), soft_wrap=True)
        self.console.file.flush()


def reason(row: Row, limit: int = 240) -> str:
    """Why a row has no figures: its status and the first line of its reason."""
    status = row.status.replace("_", " ")
    text = next(iter((row.reason or "").strip().splitlines()), "no reason given")
    text = text if text.startswith(status) else f"{status}: {text}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """The same table for a README; why a row has no figures stands behind the implementation."""
    rule = [":--" if c.justify == "left" else "--:" for c in columns]
    lines = [[c.header for c in columns], rule]
    for row in rows:
        cells = [c.cell(row) for c in columns]
        if row.status != OK:
            cells[1] += f" ({reason(row)})"
        lines.append(cells)
    return markdown_lines(lines)


def markdown_lines(lines: Sequence[Sequence[str]]) -> str:
    """Cells, those of the rule under the header included, as a markdown table."""
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def plain(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells that are text already as a markdown table, the first column to the left."""
    rule = [":--", *["--:"] * (len(headers) - 1)]
    return markdown_lines([headers, rule, *lines])
