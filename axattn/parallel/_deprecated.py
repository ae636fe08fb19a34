"""Deprecated names of `axattn.parallel`."""

from __future__ import annotations

import warnings
from typing import Any

from axattn.parallel._striped_cache import StripedCache

_CURRENT = {"DealtCache": StripedCache}


def get_deprecated_name(name: str) -> Any:
    """Return what a deprecated name of ``axattn.parallel`` now stands for, with a warning."""
    if name not in _CURRENT:
        raise AttributeError(f"module 'axattn.parallel' has no attribute {name!r}")
    current = _CURRENT[name]
    message = f"axattn.parallel.{name} is deprecated: use axattn.parallel.{current.__name__}"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return current
