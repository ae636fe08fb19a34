"""Rooflines: what a chip's arithmetic and its memory allow a program."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from axattn._typing import present
from axattn.aot._report import Report
from axattn.aot._targets import TARGETS, Target
from axattn.aot._targets import target as find_target
from axattn.plotting import _axes, _style, _units
from axattn.plotting._library import import_pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class RooflinePoint:
    """A program on a roofline.

    Attributes:
      label: what the legend calls it.
      flops: floating-point operations of one run.
      bytes_accessed: bytes of HBM that one run reads and writes.
      seconds: what one run took, if it was measured on the chip of the roofline.
      is_lower_bound: whether ``flops`` or ``bytes_accessed`` leave something out.

    Raises:
      ValueError: a number that is not positive and finite.

    Example:
      >>> from axattn.plotting import RooflinePoint
      >>> RooflinePoint("a product", flops=2e12, bytes_accessed=1e10).intensity
      200.0
    """

    label: str
    flops: float
    bytes_accessed: float
    seconds: float | None = None
    is_lower_bound: bool = False

    def __post_init__(self) -> None:
        for name in ("flops", "bytes_accessed", "seconds"):
            value = getattr(self, name)
            if name == "seconds" and value is None:
                continue
            if value is None or not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} of {self.label!r} takes a number > 0, got {value}")

    @classmethod
    def from_report(cls, label: str, report: Report, seconds: float | None = None) -> RooflinePoint:
        """Make the point of a program that `axattn.aot.analyze` compiled.

        Args:
          label: what the legend calls it.
          report: FLOPs and bytes of one device. The bytes of a TPU program include copies within
            the chip, so that its intensity looks lower than it is.
          seconds: what one run took, if it was measured.

        Returns:
          The point.

        Raises:
          ValueError: the compiler refused the program, or does not say what it does.

        Example:
          >>> from axattn import aot, plotting
          >>> report = aot.Report("v5p", "TPU v5", "f", flops=1e12, bytes_accessed=1e9)
          >>> plotting.RooflinePoint.from_report("xla", report).intensity
          1000.0
        """
        if report.refusal is not None:
            raise ValueError(f"report of {label!r} takes a compiled program, got {report.refusal}")
        # None is refused by the point itself.
        counts: dict[str, Any] = dict(flops=report.flops, bytes_accessed=report.bytes_accessed)
        return cls(label, **counts, seconds=seconds, is_lower_bound=report.cost_is_lower_bound)

    @classmethod
    def of(cls, label: str, report: Report, seconds: float | None = None) -> RooflinePoint:
        """Call `from_report`. Deprecated: this is its former name.

        Args:
          label: what the legend calls it.
          report: FLOPs and bytes of one device.
          seconds: what one run took, if it was measured.

        Raises:
          ValueError: as `from_report`.
        """
        warnings.warn(
            "RooflinePoint.of is deprecated: call RooflinePoint.from_report",
            DeprecationWarning,
            stacklevel=2,
        )
        return cls.from_report(label, report, seconds)

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes_accessed


def plot_roofline(
    points: Iterable[RooflinePoint],
    *,
    target: str | Target,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw programs under the roof of a chip: FLOP/s against FLOPs per byte.

    The roof is the lesser of the chip's arithmetic and of what its memory can feed (Williams,
    Waterman and Patterson 2009, https://doi.org/10.1145/1498765.1498785), from the vendors' peaks
    in ``axattn.aot.TARGETS``. A program that was measured is filled and stands at its own rate; the
    legend gives its share of the roof. One that was not measured is hollow and stands on the roof:
    no run can be faster, and how much slower it is is not known.

    Args:
      points: the programs.
      target: the chip, a name in ``axattn.aot.TARGETS`` or an `axattn.aot.Target`.
      title: by default the chip.
      ax: where to draw; by default in a new figure.

    Returns:
      The axes, in FLOP/B and FLOP/s.

    Raises:
      TypeError: one of the points is something else.
      ValueError: the target is not known, or has no peaks (the CPU).
      ImportError: matplotlib is not installed.

    Example:
      >>> from axattn.plotting import RooflinePoint, plot_roofline
      >>> points = [RooflinePoint("prefill", 4e12, 8e9), RooflinePoint("decode", 1e9, 5e8)]
      >>> ax = plot_roofline(points, target="v5p")
      >>> [text.get_text() for text in ax.get_legend().get_texts()][1:]
      ['prefill', 'decode', 'hollow: not measured']
    """
    points = list(points)
    for point in points:
        if not isinstance(point, RooflinePoint):
            raise TypeError(f"points takes RooflinePoint, got {type(point).__name__}")
    chip = find_target(target)
    if not (chip.peak_bf16_flops and chip.hbm_bandwidth):
        known = ", ".join(name for name, t in TARGETS.items() if t.peak_bf16_flops)
        raise ValueError(f"target takes a chip with published peaks ({known}), got {chip.name!r}")

    if ax is None:
        height = 4.0 + 0.12 * len(points)
        _, ax = import_pyplot().subplots(figsize=(9.0, height), layout="constrained")
    ridge = chip.peak_bf16_flops / chip.hbm_bandwidth
    roof = [
        min([ridge / 10, *(p.intensity / 2 for p in points)]),
        ridge,
        max([ridge * 4, *(p.intensity * 2 for p in points)]),
    ]
    peaks = (
        f"{_units.format_amount(chip.peak_bf16_flops, 'FLOP/s')} (bfloat16), "
        f"{_units.format_amount(chip.hbm_bandwidth, 'B/s')} (HBM)"
    )
    handles: dict[str, Any] = {}
    (handles[peaks],) = ax.plot(
        roof, [_compute_roof(chip, x) for x in roof], color=_style.TEXT, linewidth=1.5
    )
    ax.axvline(ridge, color="#999999", linewidth=0.8, linestyle=(0, (1, 2)))
    looks = _style.choose_styles([point.label for point in points])
    for point in points:
        look, measured = looks[point.label], point.seconds is not None
        most = _compute_roof(chip, point.intensity)
        rate = most if point.seconds is None else point.flops / point.seconds
        label = f"{point.label}{': lower bounds' if point.is_lower_bound else ''}"
        if measured:
            label = f"{label}: {100 * rate / most:.3g} % of the roof"
        (handles[label],) = ax.plot(
            point.intensity,
            rate,
            color=look.color,
            marker=look.marker,
            markersize=8,
            markeredgewidth=1.6,
            markerfacecolor=look.color if measured else "none",
            linestyle="none",
            label=point.label,
        )
    if any(point.seconds is None for point in points):
        handles["hollow: not measured"] = _axes.make_marker("none", "none")
    _axes.add_grid(ax)
    ax.margins(x=0)
    _axes.set_log_scale(ax, 10, "{:g}".format, side="x")
    _axes.set_log_scale(ax, 10, lambda value: _units.format_amount(value, "FLOP/s"))
    ax.annotate(
        f"{_units.format_digits(ridge)} FLOP/B",
        (ridge, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=_style.TEXT,
    )
    ax.set_xlabel("arithmetic intensity (FLOP/B)")
    ax.set_ylabel("rate")
    ax.set_title(f"roofline of {chip.name}" if title is None else title, fontsize=11)
    _axes.add_axes_legend(ax, handles)
    return ax


def _compute_roof(chip: Target, intensity: float) -> float:
    """Return the largest FLOP/s at an intensity in FLOP/B."""
    return min(present(chip.peak_bf16_flops), present(chip.hbm_bandwidth) * intensity)
