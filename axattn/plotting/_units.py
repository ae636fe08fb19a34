"""Numbers as text, the same in all tables and pictures."""

from __future__ import annotations

NOTHING = "-"


def format_seconds(value: float | None) -> str:
    """Format a time with three digits, in s, ms or us."""
    if value is None:
        return NOTHING
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        # 999.6 ms would print as 1.00e+03 ms.
        if value >= 0.9995 * size or unit == "us":
            return f"{format_digits(value / size)} {unit}"
    raise AssertionError


def format_bytes(value: float | None) -> str:
    """Format bytes in binary units, as memory is sold."""
    if value is None:
        return NOTHING
    for unit, one in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= one:
            return f"{value / one:.2f} {unit}" if value < 100 * one else f"{value / one:.0f} {unit}"
    return f"{value:.0f} B"


def format_amount(value: float | None, unit: str = "") -> str:
    """Format a number in decimal units, as rates are quoted."""
    if value is None:
        return NOTHING
    for prefix, one in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= one:
            return f"{format_digits(value / one)} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def format_digits(value: float) -> str:
    """Format a number with three significant digits, never with an exponent."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"
