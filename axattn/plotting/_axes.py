"""Scales, ticks, grids and legends of all pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from axattn.plotting import _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_POINT = 1 / 72  # inches
_LABEL = 9  # points, of the text at ticks and in legends


def parse_color(color: str) -> np.ndarray:
    """Return ``"#RRGGBB"`` as an array ``[3]`` in 0 to 1."""
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def set_slot_ticks(ax: Axes, q_len: int, kv_len: int) -> None:
    """Set ticks of both axes at multiples of a power of two, as many as there is room for."""
    width, height = _get_axes_size(ax)
    letters = len(str(kv_len))
    for axis, length, most in (
        (ax.xaxis, kv_len, width / ((0.65 * letters + 1) * _LABEL * _POINT)),
        (ax.yaxis, q_len, height / (2 * _LABEL * _POINT)),
    ):
        step = 1 << max(0, math.ceil(math.log2(length / max(1, min(8, int(0.9 * most))))))
        axis.set_ticks(range(0, length, step))
    ax.tick_params(labelsize=_LABEL)


def _get_axes_size(ax: Axes) -> tuple[float, float]:
    """Return width and height of the axes in inches, before a layout makes room for labels."""
    box = ax.get_position()
    width, height = _get_figure_size(ax.figure)
    return width * box.width, height * box.height


def _get_figure_size(figure: Figure | SubFigure) -> tuple[float, float]:
    """Return width and height in inches of a figure or a part of one."""
    return figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi


def make_patches(colors: Iterable[str]) -> tuple[Any, ...]:
    """Make a legend's handle: patches of these colours, side by side."""
    from matplotlib.patches import Patch

    return tuple(Patch(facecolor=color, edgecolor="#999999") for color in colors)


def make_marker(face: str, dash: Literal["-", "none"]) -> Any:
    """Make a legend's handle for markers of any implementation with this colour inside."""
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], color=_style.GREY, marker="o", markerfacecolor=face, linestyle=dash, markersize=5
    )


def shift_down(ax: Axes, transform: Any, points: float) -> Any:
    """Shift a transform down by so many points."""
    from matplotlib.transforms import ScaledTranslation

    return transform + ScaledTranslation(0, -points * _POINT, ax.figure.dpi_scale_trans)


def add_axes_legend(ax: Axes, handles: Mapping[str, Any]) -> None:
    """Add a legend under the axes and their labels."""
    from matplotlib.legend_handler import HandlerTuple

    alone = len(ax.figure.axes) == 1
    width, _ = _get_figure_size(ax.figure) if alone else _get_axes_size(ax)
    ax.legend(
        list(handles.values()),
        list(handles),
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=shift_down(ax, ax.transAxes, 36),
        borderaxespad=0,
        frameon=False,
        fontsize=_LABEL,
        ncols=_fit_columns(handles, width),
    )


def _fit_columns(names: Iterable[str], width: float) -> int:
    """Return how many columns of these names fit into so many inches."""
    # A letter is a bit more than half as wide as its font is high; lines and gaps take five.
    widths = [(len(name) * 0.56 + 5) * _LABEL * _POINT for name in names]
    if sum(widths) <= width:
        return len(widths)
    return max(1, min(int(width / max(widths)), len(widths)))


def set_log_scale(ax: Axes, base: int, text: Callable[[float], str], side: str = "y") -> None:
    """Make an axis logarithmic, with a handful of labels such as "20 ms" over any range.

    To be called when everything is drawn.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis = getattr(ax, f"{side}axis")
    getattr(ax, f"set_{side}scale")("log", base=base)
    low, high = getattr(ax, f"get_{side}lim")()
    subs = (1, 2, 5) if base == 10 and high / low < 1000 else (1,)
    axis.set_major_locator(LogLocator(base=base, subs=subs, numticks=6))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: re.sub(r"\.0+(?= |$)", "", text(value)))
    )
    ax.minorticks_off()
    ax.tick_params(labelsize=_LABEL)


def add_grid(ax: Axes) -> None:
    """Add a grid behind everything, and remove the frame."""
    ax.margins(x=0.08, y=0.12)
    ax.grid(True, color=_style.RULES, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def set_size_ticks(ax: Axes, sizes: Sequence[float], width: float) -> None:
    """Make the horizontal axis logarithmic, with ticks at these sizes and labels that fit.

    Args:
      sizes: ascending and positive.
      width: of the axes, in inches.
    """
    ax.set_xscale("log", base=2)
    span = math.log2(sizes[-1] / sizes[0])
    rim = 2 ** (0.08 * span or 0.5)
    ax.set_xlim(sizes[0] / rim, sizes[-1] * rim)  # also where some sizes have no value
    # From the largest down: its label has to be there.
    shown = [sizes[-1]]
    for size in reversed(sizes[:-1]):
        letters = max(len(str(size)), len(str(shown[-1])))
        if math.log2(shown[-1] / size) / span * width > (0.65 * letters + 1) * _LABEL * _POINT:
            shown.append(size)
    ax.set_xticks(sizes, [str(size) if size in shown else "" for size in sizes])
    ax.minorticks_off()
    ax.tick_params(labelsize=_LABEL)


def add_figure_legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Add one legend for all axes below them; the figure grows by its rows."""
    if not handles:
        return
    ncols = _fit_columns(handles, figure.get_figwidth())
    rows = math.ceil(len(handles) / ncols)
    figure.set_figheight(figure.get_figheight() + 0.2 + rows * 1.7 * _LABEL * _POINT)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=ncols,
        frameon=False,
        fontsize=_LABEL,
    )
