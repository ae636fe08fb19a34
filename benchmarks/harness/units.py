"""Numbers for people, the same in all tables: those of `axattn.plotting`, and ratios."""

from __future__ import annotations

from axattn.plotting.units import NOTHING, amount, seconds, size, three

__all__ = ["NOTHING", "amount", "percent", "quotient", "ratio", "seconds", "size"]


def quotient(a: float | None, b: float | None) -> float | None:
    """``a / b``, or None where one of them is not known."""
    return a / b if a and b else None


def ratio(value: float | None) -> str:
    """``3.42x``."""
    return NOTHING if value is None else f"{three(value)}x"


def percent(part: float | None, whole: float | None) -> str:
    """``4%``."""
    return NOTHING if part is None or not whole else f"{100 * part / whole:.0f}%"
