from __future__ import annotations

from benchmarks.harness import units


def test_ratios():
    assert units.ratio(3.456) == "3.46x"
    assert units.percent(0.03, 1.0) == "3%"
    assert units.ratio(None) == units.percent(None, 1.0) == units.percent(1.0, 0) == "-"


def test_quotient():
    assert units.quotient(6.0, 4.0) == 1.5
    assert units.quotient(None, 4.0) is units.quotient(6.0, None) is None
    assert units.quotient(6.0, 0) is None
