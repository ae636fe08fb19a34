"""The figures published for the change that this library grew from, beside ours.

The change (apple/axlearn pull request 837, TPU v5p) went from K/V repeated for each query head to
shared K/V. Its batch size, dtype and direction were not published, so the two are comparable in
kind, not in number; ours are stated. Its memory figures are as they were printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.harness import units
from benchmarks.harness.cases import AXLEARN, BASELINE
from benchmarks.harness.rows import OK, Row

SOURCE = "https://github.com/apple/axlearn/pull/837"
TARGET = "v5p"


@dataclasses.dataclass(frozen=True)
class Published:
    """Repeated -> shared: milliseconds, and HBM as printed."""

    config: str
    milliseconds: tuple[float, float]
    hbm: tuple[str, str]


FIGURES = (
    Published("2048/16/2/1024", (1.42, 1.16), ("291.16M", "262.35M")),
    Published("4096/16/2/1024", (3.60, 3.46), ("322.95M", "266.88M")),
    Published("4096/16/2/4096", (47.3, 24.8), ("4.25G", "4.04G")),
    Published("4096/16/2/8192", (869, 860), ("48.00G", "48.00G")),
)
assert tuple(figure.config for figure in FIGURES) == AXLEARN

HEADERS = ("Configuration", "Published time", "Published HBM", "Our conditions", "HBM", "Time")


def beside_ours(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Lines under `HEADERS`: a published figure, then ours for each question asked about it."""
    lines = []
    for figure in FIGURES:
        first = (
            figure.config,
            "{:g} -> {:g} ms".format(*figure.milliseconds),
            "{} -> {}".format(*figure.hbm),
        )
        ours = [r for r in rows if str(r.config) == figure.config and r.direction != "decode"]
        questions = list(dict.fromkeys(row.question for row in ours))
        for question in questions:
            group = [row for row in ours if row.question == question]
            one = group[0]
            place = f"compiled for {one.where}" if one.where != "here" else f"run on {one.device}"
            what = f"{place}, batch {one.batch}, {one.dtype}, {one.direction}"
            memory = {row.implementation: _memory(row) for row in group}
            seconds = {row.implementation: units.seconds(row.time) for row in group if row.time}
            lines.append((*first, what, _arrow(memory), _arrow(seconds) if seconds else "not run"))
            first = ("", "", "")
        if not questions:
            lines.append((*first, "not measured", units.NOTHING, units.NOTHING))
    return lines


def _memory(row: Row) -> str:
    if row.status == OK:
        return units.size(row.memory_bytes) + (" (host)" if row.memory_kind == "host" else "")
    if row.requested_bytes:
        return f"{units.size(row.requested_bytes)} (refused)"
    return row.status.replace("_", " ")


def _arrow(values: dict[str, str]) -> str:
    """The baseline, then all others by name."""
    others = [f"{name} {value}" for name, value in values.items() if name != BASELINE]
    baseline = [f"{BASELINE} {values[BASELINE]}"] if BASELINE in values else []
    return " -> ".join([*baseline, ", ".join(others)] if others else baseline)
