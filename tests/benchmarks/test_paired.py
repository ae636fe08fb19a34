from __future__ import annotations

import time

from benchmarks.harness import paired


def test_interleaved():
    order = []

    def step(name):
        order.append(name)
        time.sleep(0.003)

    result = paired.compare(
        {"a": lambda: step("a"), "b": lambda: step("b")}, seconds=0, min_rounds=4, min_sample=0
    )
    # Twice each before; then in turn, each after a call of its own that is not timed.
    assert "".join(order) == "aabb" + "aabbbbaa" * 2
    assert result.rounds == 4
    assert result.median("a") >= 0.003


def test_ratio_is_of_neighbours():
    # Twice as slow in every round, while the machine gets slower by the round.
    result = paired.Paired({"a": (2.0, 20.0, 200.0), "b": (1.0, 10.0, 100.0)})
    assert result.ratio("a", "b") == 2.0
    assert result.median("b") == 10.0


def test_short_calls_are_repeated():
    calls = []
    paired.compare({"a": lambda: calls.append(0)}, seconds=0, min_rounds=1, min_sample=1e-3)
    assert len(calls) > 20
