"""Time and memory against sequence length, one line per implementation, as a PNG."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Callable, Sequence

from benchmarks.harness import units
from benchmarks.harness.environment import Environment
from benchmarks.harness.rows import OK, Row

# Okabe and Ito's colours, which people with any colour vision tell apart, and other markers and
# dashes for those who print in grey. (Their yellow is too pale for lines on white.)
_STYLES = {
    "repeat_kv": ("#D55E00", "s", "--"),
    "einsum": ("#D55E00", "s", "--"),
    "xla": ("#0072B2", "o", "-"),
    "xla_chunked": ("#009E73", "^", "-"),
    "default": ("#000000", "D", ":"),
    "cudnn": ("#E69F00", "v", "-."),
    "mosaic_gpu": ("#CC79A7", "P", "-"),
    "mosaic_tpu": ("#CC79A7", "X", "-"),
    "mosaic": ("#CC79A7", "P", "-"),
    "jax_nn": ("#56B4E9", "d", "-."),
}
_OTHER = ("#666666", "*", ":")


def style(name: str) -> tuple[str, str, str]:
    """Colour, marker and dashes of an implementation."""
    return _STYLES.get(name, _OTHER)


def check_path(path: str) -> pathlib.Path:
    """The path; ValueError where it cannot be written, before hours are spent."""
    checked = pathlib.Path(path).expanduser()
    if checked.suffix != ".png":
        raise ValueError(f"--plot: {path!r} takes the ending .png")
    if not checked.parent.is_dir():
        raise ValueError(f"--plot: {path!r}: the folder does not exist")
    return checked


def panels(results: Sequence[Row]) -> dict[tuple, list[Row]]:
    """Rows by what they share apart from length and implementation.

    Panels with a single length are left out where others have several.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in results:
        heads = f"{row.model_dim}/{row.heads}/{row.kv_heads}"
        key = (row.where, row.direction, row.dtype, heads, row.batch)
        groups.setdefault(key, []).append(row)
    several = {k: g for k, g in groups.items() if len({row.seq_len for row in g}) > 1}
    return several or groups


def plot(path: pathlib.Path, results: Sequence[Row], environment: Environment) -> None:
    """Writes the PNG: one column for each of `panels`, time (if there is any) above memory.

    Refusals for want of memory are hollow, at what they asked for.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = panels(results)
    timed = any(row.time for group in groups.values() for row in group)
    draw = [_time, _memory] if timed else [_memory]
    across = min(5, len(groups))
    down = math.ceil(len(groups) / across) * len(draw)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(max(5.0, 3.1 * across), 1.0 + 2.8 * down),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for position, (key, group) in enumerate(groups.items()):
        for offset, quantity in enumerate(draw):
            axis = axes[position // across * len(draw) + offset][position % across]
            axis.set_visible(True)
            decorate(axis, sorted({row.seq_len for row in group}))
            axis.set_xlabel("sequence length")
            quantity(axis, group)
            if offset == 0:
                axis.set_title(_title(key), fontsize=10)
    legend(figure, axes)
    figure.suptitle(_caption(groups, environment), fontsize=9, color="#444444")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _title(key: tuple) -> str:
    where, direction, dtype, heads, batch = key
    place = "" if where == "here" else f", {where}"
    return f"{direction}, {dtype}{place}\n{heads}, batch {batch}"


def _caption(groups: dict[tuple, list[Row]], environment: Environment) -> str:
    places = dict.fromkeys(key[0] for key in groups)
    texts = [
        f"run on {environment.device if environment.platform != 'cpu' else environment.cpu}"
        if place == "here"
        else f"compiled for {place}, not run"
        for place in places
    ]
    versions = environment.versions
    return f"{'; '.join(texts)}\njax {versions.get('jax')}, {environment.date[:10]}"


def _by_implementation(group: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in sorted(group, key=lambda row: row.seq_len):
        lines.setdefault(row.implementation, []).append(row)
    return lines


def _time(axis, group: Sequence[Row]) -> None:
    axis.set_ylabel("time")
    readable(axis, 10, (1, 2, 5), units.seconds)
    for name, line in _by_implementation(group).items():
        color, marker, dash = style(name)
        there = [row for row in line if row.time]
        axis.errorbar(
            [row.seq_len for row in there],
            [row.time for row in there],
            yerr=[row.time_stddev or 0 for row in there],
            color=color,
            marker=marker,
            linestyle=dash,
            markersize=5,
            capsize=2,
            label=name,
        )


def _memory(axis, group: Sequence[Row]) -> None:
    kinds = dict.fromkeys(row.memory_kind for row in group if row.memory_kind)
    axis.set_ylabel("host memory" if "host" in kinds else "HBM")
    readable(axis, 2, (1,), units.size)
    for name, line in _by_implementation(group).items():
        color, marker, dash = style(name)
        there = [row for row in line if row.memory_bytes and row.status == OK]
        axis.plot(
            [row.seq_len for row in there],
            [row.memory_bytes for row in there],
            color=color,
            marker=marker,
            linestyle=dash,
            markersize=5,
            label=name,
        )
        for row in line:
            if row.status == OK or not row.requested_bytes:
                continue
            asked = row.requested_bytes
            axis.plot(row.seq_len, asked, color=color, marker=marker, mfc="none", markersize=7)
            axis.annotate(
                "refused", (row.seq_len, asked), textcoords="offset points", xytext=(-6, 6),
                fontsize=7, color=color, ha="right",
            )  # fmt: skip
            if row.available_bytes:
                axis.axhline(row.available_bytes, color="#999999", lw=0.8, ls=(0, (1, 2)))


def readable(axis, base: int, subs: tuple[int, ...], text: Callable[[float], str]) -> None:
    """A logarithmic axis with a handful of labels such as "20 ms", however short its range."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_yscale("log", base=base)
    axis.yaxis.set_major_locator(LogLocator(base=base, subs=subs, numticks=6))
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: re.sub(r"\.0+ ", " ", text(value)))
    )
    axis.minorticks_off()


def decorate(axis, sizes: Sequence[int]) -> None:
    """A grid, and a logarithmic horizontal axis with these sizes."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.margins(x=0.08, y=0.12)
    axis.grid(True, color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def legend(figure, axes) -> None:
    """One legend for all axes, below them."""
    handles: dict[str, object] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=len(handles),
            frameon=False,
        )
