"""Time and memory against a size, one line per implementation."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from axattn._typing import present
from axattn.plotting import _axes, _results, _style, _units
from axattn.plotting._library import import_pyplot
from axattn.plotting._results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_X = {
    "seq_len": "sequence length",
    "length": "sequence length",
    "hidden": "hidden size",
    "model_dim": "model size",
    "heads": "query heads",
    "kv_heads": "key/value heads",
}
_OK = "ok"
_PANEL_WIDTH = 3.0  # inches


@dataclasses.dataclass(frozen=True)
class _Quantity:
    """A number of a row: its label, and how an axis shows it."""

    label: str
    text: Callable[[float], str]
    base: int = 10


def _make_bytes_quantity(label: str) -> _Quantity:
    return _Quantity(label, _units.format_bytes, 2)


QUANTITIES = {
    "time": _Quantity("time", _units.format_seconds),
    "roofline": _Quantity("roofline\n(not measured)", _units.format_seconds),
    "estimate": _Quantity("estimate\n(not measured)", _units.format_seconds),
    "compile_seconds": _Quantity("time to compile", _units.format_seconds),
    "memory_bytes": _make_bytes_quantity("memory"),
    "temp_bytes": _make_bytes_quantity("temporaries"),
    "argument_bytes": _make_bytes_quantity("arguments"),
    "bytes_accessed": _make_bytes_quantity("bytes accessed"),
    "flops": _Quantity("FLOPs", _units.format_amount),
    "compiled_flops": _Quantity("FLOPs, compiled", _units.format_amount),
}
# Quantities that the compiler may have counted too low.
_BOUNDED = ("roofline", "bytes_accessed", "flops", "compiled_flops")


@dataclasses.dataclass(frozen=True)
class Panel:
    """One column of pictures: the rows of one case, against one of their fields."""

    title: str
    x: str
    rows: Sequence[Row]

    @property
    def sizes(self) -> list[float]:
        return sorted({row[self.x] for row in self.rows})


def plot_curves(
    results: str | os.PathLike | Mapping[str, Any] | Sequence[Row],
    *,
    x: str = "seq_len",
    quantities: str | Sequence[str] | None = None,
    title: str | None = None,
    **only: Any,
) -> Figure:
    """Draw what benchmarks found: time above memory, a line per implementation.

    There is a column for each case (a place, a direction, a dtype, a model...); cases with a
    single ``x`` are left out where others have several. Times are the benchmark's medians, with
    their standard deviation where the rows have it. White markers on a line are lower bounds.
    Refusals are hollow, without a line: at what was asked for, where memory ran out, with a dotted
    line at what there is; under the axes, where the reason is another one.

    Args:
      results: the path of a JSON file that ``mqa_bench.py``, ``layer_bench.py`` or
        ``scale_bench.py`` of ``benchmarks/`` wrote, what is in such a file, or rows: dicts with
        ``"implementation"`` (or ``"strategy"``), ``x``, some of ``quantities``, in seconds and
        bytes, and what tells cases apart (``"where"``, ``"direction"``, ``"dtype"``, ``"batch"``,
        ``"heads"``, ``"kv_heads"``...; all of them optional). ``"status"`` other than ``"ok"`` is
        a refusal. ``"where"`` is ``"here"`` or the name of a chip that it was compiled for.
      x: a numeric field of the rows: ``"seq_len"``, ``"hidden"``, ``"kv_heads"``, ``"chips"``...
      quantities: a field of the rows, or several, drawn above each other: ``"time"``,
        ``"roofline"``, ``"estimate"``, ``"compile_seconds"`` (seconds), ``"memory_bytes"``,
        ``"temp_bytes"``, ``"argument_bytes"``, ``"bytes_accessed"`` (bytes), ``"flops"``,
        ``"compiled_flops"``. By
        default times, or where nothing was run the least times by the roofline, if rows have
        either, above ``"memory_bytes"``.
      title: above everything; what all columns have in common follows.
      only: fields and the value that rows have there, or a list of values. Rows of a file with
        several tables have the table's name as ``table``.

    Returns:
      The figure.

    Raises:
      TypeError: ``results`` is none of these.
      ValueError: an unknown quantity; an ``x`` without numbers; a field that no row has, or a
        value that leaves no row.
      OSError: the file cannot be read.
      ImportError: matplotlib is not installed.

    Example:
      >>> from axattn import plotting
      >>> rows = [
      ...     {"implementation": name, "seq_len": n, "time": n * factor, "memory_bytes": 1024 * n}
      ...     for name, factor in (("xla", 2e-6), ("xla_chunked", 1e-6))
      ...     for n in (256, 512, 1024)
      ... ]
      >>> figure = plotting.plot_curves(rows)
      >>> [ax.get_ylabel() for ax in figure.axes]
      ['time', 'memory']
    """
    quantities = [quantities] if isinstance(quantities, str) else quantities
    rows, environment = _results.read_rows(results)
    if not rows:
        raise ValueError("results takes rows of implementations, got none")
    groups = _results.group_panels(_results.filter_rows(rows, only), x)
    # With an environment the caption has the places.
    own, common = _results.make_titles(list(groups), ["where"] if environment else [])
    panels = [Panel(text, x, group) for text, group in zip(own, groups.values(), strict=True)]
    return draw_panels(panels, quantities, [title, common], environment)


def draw_panels(
    panels: Sequence[Panel],
    quantities: Sequence[str] | None,
    title: Sequence[str | None],
    environment: Mapping[str, Any] | None,
    *,
    across: int = 3,
) -> Figure:
    """Draw the figure of `plot_curves` from panels, ``across`` of them in a row."""
    for quantity in quantities or ():
        if quantity not in QUANTITIES:
            raise ValueError(f"quantities takes {', '.join(QUANTITIES)}; got {quantity!r}")
    rows = [row for panel in panels for row in panel.rows]
    kinds = quantities or _choose_quantities(rows)
    across = min(2 if len(panels) == 4 and across == 3 else across, len(panels))
    bands = math.ceil(len(panels) / across)
    looks = _style.choose_styles(map(_get_line_name, rows))
    names = _make_names(rows, kinds)
    width = max(5.0, _PANEL_WIDTH * across)
    heading = _make_heading(title, _results.make_caption(rows, environment), width)
    figure, axes = import_pyplot().subplots(
        bands * len(kinds),
        across,
        figsize=(width, 0.3 + 0.2 * len(heading) + 2.4 * bands * len(kinds)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for position, panel in enumerate(panels):
        column = axes[position // across * len(kinds) :, position % across]
        for kind, axis in zip(kinds, column, strict=False):
            axis.set_visible(True)
            picture = _Picture(axis, panel, _choose_field(kind, panel, quantities is None), handles)
            picture.draw(looks, names, at_foot=kind == kinds[-1], width=width / across - 1.0)
        column[0].set_title("\n".join(_results.wrap_text(panel.title, 28)), fontsize=10)
        column[len(kinds) - 1].set_xlabel(_X.get(panel.x, panel.x.replace("_", " ")))
    order = {name: i for i, name in enumerate(names.values())}
    _axes.add_figure_legend(
        figure, dict(sorted(handles.items(), key=lambda item: order.get(item[0], len(order))))
    )
    figure.suptitle("\n".join(heading), fontsize=10, color=_style.TEXT)
    return figure


def _choose_quantities(rows: Sequence[Row]) -> list[str]:
    """Choose what is drawn by default."""
    timed = any(_has_value(row, "time") or _has_value(row, "roofline") for row in rows)
    return ["time", "memory_bytes"] if timed else ["memory_bytes"]


def _has_value(row: Row, field: str) -> bool:
    return _results.is_drawable(row.get(field))


def _choose_field(kind: str, panel: Panel, may_differ: bool) -> str:
    """Choose the field of a quantity: a panel that was not run shows its roofline as time."""
    if kind == "time" and may_differ and not any(_has_value(row, "time") for row in panel.rows):
        return "roofline"
    return kind


def _get_line_name(row: Row) -> str:
    """Return the name of a row's line; rows without one are left out already."""
    return present(_results.name_line(row))


def _make_names(rows: Sequence[Row], kinds: Sequence[str]) -> dict[str, str]:
    """Return each line's name for the legend, which tells of lines that are all refused."""
    words = {"out_of_memory": "out of memory", "unsupported": "refused"}
    names: dict[str, str] = {}
    for line in dict.fromkeys(map(_get_line_name, rows)):
        own = [row for row in rows if _get_line_name(row) == line]
        there = [row for row in own if row.get("status", _OK) == _OK]
        names[line] = line if there else f"{line}: {words.get(own[0]['status'], 'failed')}"
    return names


def _make_heading(title: Sequence[str | None], caption: str, width: float) -> list[str]:
    lines = [text for text in (*title, caption) if text]
    return [part for text in lines for part in _results.wrap_text(text, int(width * 13))]


@dataclasses.dataclass
class _Picture:
    """One quantity of one panel, being drawn; ``handles`` are the legend's, by name."""

    axis: Axes
    panel: Panel
    field: str
    handles: dict[str, Any]

    def draw(
        self,
        looks: Mapping[str, _style.Style],
        names: Mapping[str, str],
        at_foot: bool,
        width: float,
    ) -> None:
        quantity = QUANTITIES[self.field]
        _axes.add_grid(self.axis)
        _axes.set_size_ticks(self.axis, self.panel.sizes, width)
        self.axis.set_ylabel(self._make_label(quantity))
        drawn, refused = False, []
        for name, rows in self._group_rows().items():
            there = [
                row for row in rows if row.get("status", _OK) == _OK and _has_value(row, self.field)
            ]
            drawn |= bool(there)
            if there:
                self._draw_line(there, looks[name], names[name])
            for row in rows:
                if row.get("status", _OK) == _OK:
                    continue
                if self.field == "memory_bytes" and row.get("requested_bytes"):
                    drawn = True
                    self._draw_request(row, looks[name], names[name])
                elif at_foot:
                    refused.append((name, row))
        if drawn:
            _axes.set_log_scale(self.axis, quantity.base, quantity.text)
        else:
            self.axis.set_yticks([])
            self.axis.grid(False)
            self.axis.text(
                0.5, 0.5, "not measured" if self.field == "time" else "not known",
                transform=self.axis.transAxes, ha="center", color=_style.TEXT, fontsize=9,
            )  # fmt: skip
        self._draw_refusals(refused, looks, names)

    def _make_label(self, quantity: _Quantity) -> str:
        if self.field != "memory_bytes":
            return quantity.label
        kinds = {str(row["memory_kind"]) for row in self.panel.rows if row.get("memory_kind")}
        if len(kinds) != 1:
            return quantity.label
        (kind,) = kinds
        return {"host": "host memory"}.get(kind, kind)

    def _group_rows(self) -> dict[str, list[Row]]:
        lines: dict[str, list[Row]] = {}
        for row in sorted(self.panel.rows, key=lambda row: row[self.panel.x]):
            lines.setdefault(_get_line_name(row), []).append(row)
        return lines

    def _draw_line(self, rows: Sequence[Row], look: _style.Style, name: str) -> None:
        x, y = [row[self.panel.x] for row in rows], [row[self.field] for row in rows]
        deviation = [row.get("time_stddev") or row.get("time_std") or 0 for row in rows]
        options: dict[str, Any] = dict(
            color=look.color, marker=look.marker, linestyle=look.dash, markersize=5
        )
        drawn: Any
        if self.field == "time" and any(deviation):
            drawn = self.axis.errorbar(x, y, yerr=deviation, capsize=2, label=name, **options)
        else:
            (drawn,) = self.axis.plot(x, y, label=name, **options)
        self.handles.setdefault(name, drawn)
        bounds = [
            (a, b)
            for a, b, row in zip(x, y, rows, strict=True)
            if self.field in _BOUNDED and row.get("cost_is_lower_bound")
        ]
        if bounds:
            white = dict(options, linestyle="none", markerfacecolor="white")
            self.axis.plot(*zip(*bounds, strict=True), **white)
            self.handles.setdefault("white: lower bound", _axes.make_marker("white", "-"))

    def _draw_request(self, row: Row, look: _style.Style, name: str) -> None:
        drawn = self._draw_hollow(row[self.panel.x], row["requested_bytes"], look, markersize=7)
        if name != _get_line_name(row):
            self.handles.setdefault(name, drawn)
        if row.get("available_bytes"):
            rule = self.axis.axhline(
                row["available_bytes"], color="#999999", lw=0.8, ls=(0, (1, 2))
            )
            self.handles.setdefault("memory there is", rule)

    def _draw_refusals(
        self, refused: Sequence[tuple[str, Row]], looks: Mapping[str, _style.Style],
        names: Mapping[str, str],
    ) -> None:  # fmt: skip
        """Draw a row of markers per implementation, between the frame and the names of sizes."""
        lines = list(dict.fromkeys(name for name, _ in refused))
        if not lines:
            return
        frame = self.axis.get_xaxis_transform()
        for name, row in refused:
            drawn = self._draw_hollow(
                row[self.panel.x],
                0,
                looks[name],
                transform=_axes.shift_down(self.axis, frame, 8 + 9 * lines.index(name)),
                clip_on=False,
                markersize=5,
            )
            if names[name] != name:
                self.handles.setdefault(names[name], drawn)
        self.axis.tick_params(axis="x", pad=9 * len(lines) + 4)

    def _draw_hollow(self, x: float, y: float, look: _style.Style, **options: Any) -> Any:
        (drawn,) = self.axis.plot(
            x, y, color=look.color, marker=look.marker, markerfacecolor="none", linestyle="none",
            **options,
        )  # fmt: skip
        self.handles.setdefault("hollow: refused", _axes.make_marker("none", "none"))
        return drawn
