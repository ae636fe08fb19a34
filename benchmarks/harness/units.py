"""Numbers for people, the same in all tables: those of `axattn.plotting`, and ratios."""

from __future__ import annotations

from axattn.plotting._units import NOTHING, format_digits
from axattn.plotting._units import format_amount as amount
from axattn.plotting._units import format_bytes as size
from axattn.plotting._units import format_seconds as seconds
from benchmarks.harness import noise

__all__ = ["NOTHING", "amount", "percent", "quotient", "ratio", "seconds", "size"]


def quotient(a: float | None, b: float | None) -> float | None:
    """``a / b``, or None where one of them is not known."""
    return a / b if a and b else None


def ratio(value: float | None, noisy: bool = False) -> str:
    """``3.42x``, marked where it is ``noisy``: see `benchmarks.harness.noise`."""
    return NOTHING if value is None else f"{format_digits(value)}x" + f" {noise.MARK}" * noisy


def percent(part: float | None, whole: float | None) -> str:
    """``4%``."""
    return NOTHING if part is None or not whole else f"{100 * part / whole:.0f}%"
