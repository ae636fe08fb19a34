"""The sweeps of ``layer_bench.py`` as a PNG: memory, and time or its roofline, by size."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from benchmarks.harness import plotting, units
from benchmarks.harness.environment import Environment
from benchmarks.harness.layer_rows import HERE, Cell
from benchmarks.harness.rows import OK

_AXES = {"length sweep": ("seq_len", "sequence length"), "hidden sweep": ("hidden", "hidden size")}


def plot(path: pathlib.Path, cells: Sequence[Cell], environment: Environment) -> bool:
    """Writes the PNG: a column for each sweep and place; False where there is none to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.model in _AXES:
            groups.setdefault((cell.model, cell.where), []).append(cell)
    if not groups:
        return False
    figure, axes = plt.subplots(
        2, len(groups), figsize=(max(5.0, 3.9 * len(groups)), 6.2), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, ((sweep, where), group) in enumerate(groups.items()):
        field, label = _AXES[sweep]
        upper, lower = axes[0][column], axes[1][column]
        place = "measured here" if where == HERE else f"{where}, roofline, not measured"
        upper.set_title(f"{group[0].layer}\n{place}", fontsize=10)
        _draw(upper, group, field, "time" if where == HERE else "roofline", units.seconds, 10)
        _draw(lower, group, field, "memory_bytes", units.size, 2)
        upper.set_ylabel("time" if where == HERE else "least time by arithmetic")
        lower.set_ylabel("host memory" if group[0].memory_kind == "host" else "HBM")
        lower.set_xlabel(label)
    plotting.legend(figure, axes)
    versions = environment.versions
    caption = f"jax {versions.get('jax')}, {environment.date[:10]}"
    if any(cell.cost_is_lower_bound for group in groups.values() for cell in group):
        caption += "; roofline: white markers are lower bounds"
    figure.suptitle(caption, fontsize=9, color="#444444")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _draw(axis, group: Sequence[Cell], field: str, quantity: str, text, base: int) -> None:
    lines: dict[str, list[Cell]] = {}
    for cell in group:
        if cell.status == OK and getattr(cell, quantity):
            lines.setdefault(cell.implementation, []).append(cell)
    for name, line in lines.items():
        color, marker, dash = plotting.style(name)
        line = sorted(line, key=lambda cell: getattr(cell, field))
        bound = quantity == "roofline" and any(cell.cost_is_lower_bound for cell in line)
        axis.plot(
            [getattr(cell, field) for cell in line],
            [getattr(cell, quantity) for cell in line],
            color=color, marker=marker, linestyle=dash, markersize=5, label=name,
            markerfacecolor="white" if bound else color,
        )  # fmt: skip
    subs = (1, 2, 5) if base == 10 else (1,)
    plotting.readable(axis, base, subs, text)
    plotting.decorate(axis, sorted({getattr(cell, field) for cell in group}))
