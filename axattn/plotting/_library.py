"""Matplotlib, which is imported when a picture is drawn."""

from __future__ import annotations

from typing import Any


def import_pyplot() -> Any:
    """Import ``matplotlib.pyplot``.

    Raises:
      ImportError: matplotlib is not installed; the message says what to install.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"pictures need matplotlib ({error}): pip install matplotlib, "
            "or, in a checkout of axattn, pip install -e '.[plot]'"
        ) from error
    return plt
