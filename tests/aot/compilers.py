"""Which of the compilers for absent devices are installed, and what of them every run of CI asks."""

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


def analyze(fn, *args, target: str, **options):
    return aot.analyze(fn, *args, target=need(target), **options)


def exhaustive_but(chosen, product):
    """Parameters: those of the product that are not chosen wait for a release."""
    product = list(product)
    assert set(chosen) <= set(product)
    for row in product:
        marks = () if row in chosen else pytest.mark.exhaustive
        yield pytest.param(*row, marks=marks)
