"""Cells of ``kernel_bench.py``: each a number, or the reason why there is none."""

from __future__ import annotations

import dataclasses

from axattn import aot
from benchmarks.harness import tables, units
from benchmarks.harness.kernel_cases import Case

OK, WRONG, IMPOSSIBLE = "ok", "wrong", "impossible"
UNSUPPORTED, FAILED, OUT_OF_MEMORY = "unsupported", "failed", "out of memory"
NOT_MEASURED = "not measured"

# What this library answers for; that a peer cannot do something is its affair.
OURS = ("mosaic_gpu", "xla_chunked", "xla")


class Verdict:
    """What a cell's ``status`` and ``reason`` come to."""

    @property
    def failure(self) -> str | None:
        """What must not go unseen: wrong results, impossible times, failures of our own."""
        own = self.status in (FAILED, OUT_OF_MEMORY) and self.implementation in OURS
        if self.status not in (WRONG, IMPOSSIBLE) and not own:
            return None
        return f"{self.case} {self.direction} {self.implementation}: {self.why}"

    @property
    def why(self) -> str:
        return ": ".join(part for part in (self.status, self.reason) if part)

    @property
    def remark(self) -> str:
        """The last cell of its line."""
        text = self.why if self.status != OK else self.note or ""
        text = " ".join(text.split())
        return text if len(text) <= 200 else text[:197] + "..."

    @property
    def errors(self) -> str:
        """Its error and what is allowed."""
        return units.NOTHING if self.error is None else f"{self.error:.1e}/{self.allowed:.1e}"


@dataclasses.dataclass(frozen=True)
class Cell(Verdict):
    """One implementation on one case in one direction.

    Attributes:
      status, reason: "ok", or why there is no time.
      seconds: median of ``rounds`` rounds; ``clock`` is "device" (CUPTI, cold L2) or "wall".
      tflops: of the FLOPs that the mask leaves, see `kernel_cases`.
      of_matmul: that, as part of what a plain matrix product reached in the same run.
      ratio: cuDNN's time / this one, the median over rounds.
      ratio_is_noise: whether the rounds' ratios spread by more than that differs from 1.
      error, allowed: of the ``result`` that is closest to what is allowed; see `accuracy`.
      against: the plain attention whose error sets what is allowed.
    """

    case: str
    mask: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: str
    direction: str
    implementation: str
    status: str = OK
    reason: str | None = None
    seconds: float | None = None
    rounds: int | None = None
    clock: str | None = None
    tflops: float | None = None
    of_matmul: float | None = None
    ratio: float | None = None
    ratio_is_noise: bool = False
    result: str | None = None
    error: float | None = None
    allowed: float | None = None
    against: str | None = None
    note: str | None = None

    @classmethod
    def of(cls, case: Case, direction: str, implementation: str, **values) -> Cell:
        return cls(
            case.name,
            case.mask,
            case.batch,
            case.length,
            case.heads,
            case.kv_heads,
            case.head_dim,
            case.value_head_dim,
            case.dtype,
            direction,
            implementation,
            **values,
        )


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """FLOP/s of bfloat16 products: what one reached here, and the data sheet's peak, if known."""

    measured: float | None
    peak: float | None


def peak_of(device: str) -> float | None:
    """The data sheet's peak of a device by the name it reports."""
    target = target_of(device)
    return target and target.peak_bf16_flops


def target_of(device: str) -> aot.Target | None:
    """The entry of `axattn.aot.TARGETS` for a device by the name it reports."""
    known = {target.description: target for target in aot.TARGETS.values()}
    return known.get(device) if device else None


def rated(cell: Cell, case: Case, ceiling: Ceiling) -> Cell:
    """The cell with its rates; one that is faster than the hardware is not to be believed."""
    if cell.seconds is None:
        return cell
    flops = case.flops(cell.direction) / cell.seconds
    cell = dataclasses.replace(
        cell,
        tflops=flops / 1e12,
        of_matmul=ceiling.measured and flops / ceiling.measured,
    )
    if ceiling.peak is not None and flops > ceiling.peak:
        rate, peak = (units.amount(value, "FLOP/s") for value in (flops, ceiling.peak))
        reason = f"{rate} are beyond the peak, {peak}"
        return dataclasses.replace(cell, status=IMPOSSIBLE, reason=reason)
    return cell


def _heads(cell: Cell) -> str:
    return f"{cell.heads}/{cell.kv_heads}"


def _size(cell: Cell) -> str:
    same = cell.head_dim == cell.value_head_dim
    return str(cell.head_dim) if same else f"{cell.head_dim}/{cell.value_head_dim}"


COLUMNS = (
    tables.Column("Case", 22, lambda c: c.case, "left"),
    tables.Column("Mask", 12, lambda c: c.mask, "left"),
    tables.Column("B", 2, lambda c: str(c.batch)),
    tables.Column("T", 5, lambda c: str(c.length)),
    tables.Column("N/K", 5, _heads),
    tables.Column("H", 7, _size),
    tables.Column("Direction", 9, lambda c: c.direction, "left"),
    tables.Column("Implementation", 14, lambda c: c.implementation, "left"),
    tables.Column("Time", 8, lambda c: units.seconds(c.seconds)),
    tables.Column("TFLOP/s", 7, lambda c: f"{c.tflops:.4g}" if c.tflops else units.NOTHING),
    tables.Column("Of matmul", 9, lambda c: units.percent(c.of_matmul, 1.0)),
    tables.Column("cudnn/this", 10, lambda c: units.ratio(c.ratio, c.ratio_is_noise)),
    tables.Column("Error/allowed", 15, lambda c: c.errors),
    tables.Column("", 0, lambda c: c.remark, "left"),
)
