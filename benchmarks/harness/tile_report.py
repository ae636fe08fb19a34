"""What ``tune_hopper.py`` prints of candidates, and what it writes of the ones it takes."""

from __future__ import annotations

import dataclasses
import subprocess
from typing import Any

from benchmarks.harness import jobs, processes, tables, tile_compile, tile_table, units
from benchmarks.harness.ptxas import Kernel
from benchmarks.harness.tile_compile import Compiled
from benchmarks.harness.tile_measure import Measured, Shape


def short(tiles: Any) -> str:
    """``64 x2 x1, 2 wg, split``: the block, the stages, the warpgroups."""
    values = dataclasses.asdict(tiles)
    block = next(value for name, value in values.items() if name.startswith("block"))
    stages = " ".join(f"x{value}" for name, value in values.items() if name.endswith("stages"))
    return f"{block} {stages}, {tiles.warpgroups} wg" + (", split" if values.get("split") else "")


def spills(kernel: Kernel | None) -> str:
    """Bytes stored / loaded per thread, starred where products are serialized."""
    if kernel is None:
        return units.NOTHING
    return f"{kernel.spill_stores}/{kernel.spill_loads}" + "*" * kernel.serialized


COMPILED = (
    tables.Column("Row", 26, lambda c: str(c.place), "left"),
    tables.Column("Tiles", 20, lambda c: short(c.tiles), "left"),
    tables.Column("Shared", 10, lambda c: units.size(c.shared_bytes)),
    tables.Column("Registers", 9, lambda c: str(c.usual.registers) if c.usual else units.NOTHING),
    tables.Column("Spills", 9, lambda c: spills(c.usual)),
    tables.Column("Heaviest", 11, lambda c: spills(c.heaviest)),
    tables.Column("", 0, lambda c: (c.refusal or "")[:120], "left"),
)


def measured(shape: Shape) -> tuple[tables.Column, ...]:
    """Columns for `Measured`."""
    return (
        tables.Column("Row", 26, lambda m: str(m.place), "left"),
        tables.Column("Tiles", 20, lambda m: short(m.tiles), "left"),
        tables.Column("Time", 8, lambda m: units.seconds(m.seconds)),
        tables.Column("FLOP/s", 8, lambda m: _flops(m.tflops(shape))),
        tables.Column("Error", 8, lambda m: units.NOTHING if m.error is None else f"{m.error:.2g}"),
        tables.Column("", 0, lambda m: (m.reason or m.note or "")[:160], "left"),
    )


def _flops(tflops: float | None) -> str:
    return units.amount(tflops and 1e12 * tflops)


def compiled_row(one: Compiled) -> dict[str, Any]:
    """The table's row for a candidate that was compiled; bytes per thread, if any."""
    spills = {
        "spilled_bytes": tile_compile.spilled(one.usual),
        "spilled_at_most": tile_compile.spilled(one.heaviest),
    }
    spills = {name: value for name, value in spills.items() if value}
    return tile_table.row(one.place, one.tiles, how="compiled", **spills)


def measured_row(one: Measured, shape: Shape) -> dict[str, Any]:
    """The table's row for the fastest candidate."""
    more = {"note": one.note} if one.note else {}
    return tile_table.row(
        one.place,
        one.tiles,
        how="measured",
        microseconds=round(1e6 * one.seconds, 1),
        tflops=round(one.tflops(shape), 1),
        **more,
    )


def provenance(mode: str, target: str, command: str) -> dict[str, Any]:
    """Of a run: date, device, versions, driver, command."""
    # In a process of its own: asking starts JAX, which takes a GPU's memory.
    where = processes.call(jobs.Describe())
    found = {"date": where.date, "how": {"compile": "compiled", "measure": "measured"}[mode]}
    if mode == "compile":
        found["target"] = target
    else:
        found |= {"device": where.device, "driver": _driver(), "load": where.load}
    return found | {"versions": where.versions, "commit": where.commit, "command": command}


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
