"""What benchmarks draw, as PNGs; the drawing is `axattn.plotting`'s."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from axattn.plotting import plot_curves
from axattn.plotting._library import import_pyplot
from axattn.plotting._style import COLORS, GREY, RULES, TEXT
from benchmarks.harness.environment import Environment
from benchmarks.harness.rows import Row

__all__ = ["COLORS", "GREY", "RULES", "TEXT", "check_path", "plot", "save"]


def check_path(path: str) -> pathlib.Path:
    """The path of a picture that can be drawn; the errors come before hours are spent.

    Raises:
      ValueError: it cannot be written.
      ImportError: matplotlib is not installed.
    """
    checked = pathlib.Path(path).expanduser()
    if checked.suffix != ".png":
        raise ValueError(f"--plot: {path!r} takes the ending .png")
    if not checked.parent.is_dir():
        raise ValueError(f"--plot: {path!r}: the folder does not exist")
    try:
        import_pyplot()
    except ImportError as error:
        raise ImportError(f"--plot: {error}") from error
    return checked


def plot(path: pathlib.Path, results: Sequence[Row], environment: Environment) -> None:
    """Writes the PNG: time, if there is any, and memory by sequence length."""
    rows = [row.to_dict() for row in results]
    save(path, lambda: plot_curves({"environment": environment.to_dict(), "rows": rows}))


def save(path: pathlib.Path, draw: Callable[[], Any]) -> None:
    """Writes the figure that ``draw`` returns, without a window."""
    plt = import_pyplot()
    plt.switch_backend("Agg")
    figure = draw()
    figure.savefig(path, dpi=150)
    plt.close(figure)
