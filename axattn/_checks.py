"""Checks of what more than one module is given."""

from __future__ import annotations

import operator
from typing import Any


def check_count(name: str, value: Any) -> int:
    """Return a positive integer as an int.

    Raises:
      TypeError: ``value`` is no integer.
      ValueError: it is less than 1, or a bool.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, bool) or count < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return count
