"""Which of the compilers for absent devices are installed."""

from __future__ import annotations

import pytest

from axattn import aot


def need(name: str) -> str:
    """The target's name; the test is skipped where its compiler is not installed."""
    try:
        aot.check_installed(aot.target(name))
    except aot.MissingCompilerError as error:
        pytest.skip(str(error))
    return name
