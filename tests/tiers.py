"""Rows of tables that belong to another tier than their test (WORKSPACE.md)."""

from __future__ import annotations

import pytest


def _marked(mark, rows):
    return [pytest.param(*(r if isinstance(r, tuple) else (r,)), marks=mark) for r in rows]


def ci(*rows):
    """Rows, each a tuple or one value, that everyday tests leave out."""
    return _marked(pytest.mark.ci, rows)


def exhaustive(*rows):
    """Rows that are for releases only."""
    return _marked(pytest.mark.exhaustive, rows)
