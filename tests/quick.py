"""Tests of what is printed, not of programs: XLA optimizes little, for compiling is most of the time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def to_compile() -> Iterator[None]:
    """What is compiled inside is as right and slower; nobody else is given it."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()
