"""Options of layers and calls, brought into one form."""

from __future__ import annotations

from collections.abc import Sequence


def static(value):
    """A field that may be a sequence of numbers or names, as something hashable."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def requested(**options) -> dict:
    """The options that were asked for: all but those that are None or False."""
    return {
        name: value for name, value in options.items() if value is not None and value is not False
    }
