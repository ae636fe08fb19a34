"""Rows as the hardware counts them."""

from __future__ import annotations

from axattn.kernels._problem import round_up

# A warpgroup multiplies 64 rows at a time.
ROWS = 64

# TMA cuts rows into groups of 8 (the swizzled shared-memory atom): lengths in HBM are multiples.
ROW_GROUP = 8


def stored_length(length: int) -> int:
    """A number of slots as the arrays have it in HBM."""
    return round_up(length, ROW_GROUP)
