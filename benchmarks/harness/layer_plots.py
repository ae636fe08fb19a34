"""The sweeps of ``layer_bench.py`` as a PNG: memory, and time or its roofline, by size."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from axattn.plotting._curves import Panel, draw_panels
from benchmarks.harness import plotting
from benchmarks.harness.environment import Environment
from benchmarks.harness.layer_rows import HERE, Cell

_FIELDS = {"length sweep": "seq_len", "hidden sweep": "hidden"}


def plot(path: pathlib.Path, cells: Sequence[Cell], environment: Environment) -> bool:
    """Writes the PNG: a column for each sweep and place; False where there is none to draw."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.model in _FIELDS:
            groups.setdefault((cell.model, cell.where), []).append(cell)
    if not groups:
        return False
    panels = [
        Panel(
            f"{group[0].layer}, {'measured here' if where == HERE else where}",
            _FIELDS[sweep],
            [dataclasses.asdict(cell) for cell in group],
        )
        for (sweep, where), group in groups.items()
    ]
    described = environment.to_dict()
    across = min(4, len(panels))
    plotting.save(path, lambda: draw_panels(panels, None, [], described, across=across))
    return True
