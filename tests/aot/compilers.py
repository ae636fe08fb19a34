"""Which of the compilers for absent devices are installed, and what of them every run of CI asks."""

from __future__ import annotations

import itertools

import pytest

from axattn import aot
from tests.tiers import exhaustive


def need(name: str) -> str:
    """The target's name; the test is skipped where its compiler is not installed."""
    try:
        aot.check_installed(aot.target(name))
    except aot.MissingCompilerError as error:
        pytest.skip(str(error))
    return name


def analyze(fn, *args, target: str, **options):
    return aot.analyze(fn, *args, target=need(target), **options)


def releases_have_all(names, chosen, *factors):
    """Parametrizes over a product, of which the chosen rows are for every run."""
    rows = list(itertools.product(*factors) if len(factors) > 1 else factors[0])
    assert set(chosen) <= set(rows)
    rest = exhaustive(*(row for row in rows if row not in chosen))
    return pytest.mark.parametrize(names, [*chosen, *rest])
