from __future__ import annotations

import itertools
import time

import pytest

from benchmarks.harness import device_time, paired, rounds


def test_interleaved_and_every_other_round_backwards():
    timers = {"a": lambda: 1.0, "b": lambda: 2.0}
    found = list(rounds.samples(timers, seconds=0, least=4))
    assert "".join(name for name, _ in found) == "ab" + "ba" + "ab" + "ba"
    assert {seconds for name, seconds in found if name == "b"} == {2.0}


def test_at_most_so_many_rounds():
    assert len(list(rounds.samples({"a": lambda: 0.0}, seconds=1e9, most=5))) == 5


def test_ratio_is_of_neighbors():
    assert rounds.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == (2.0, False)
    assert rounds.ratio([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == (1.0, True)
    assert rounds.ratio([], [1.0]) == (None, False)


def test_the_devices_clock_comes_first(monkeypatch):
    asked = []

    def cold(step, platform, *, kernels):
        asked.append((platform, kernels))
        return (lambda: 3e-6), None

    monkeypatch.setattr(device_time, "cold_timer", cold)
    timer, note = rounds.timer(lambda: None, "gpu", kernels="axattn_")
    assert timer() == 3e-6 and note is None
    assert asked == [("gpu", "axattn_")]


def test_else_the_walls_with_a_note(monkeypatch):
    monkeypatch.setattr(device_time, "cold_timer", lambda *_, **__: (None, "wall time: why"))
    steps = []
    timer, note = rounds.timer(lambda: steps.append(0), "gpu")
    assert timer() >= 0 and steps == [0]
    assert note == "wall time: why"


# ---- steps in pairs, timed here ------------------------------------------------------------------


def test_pairs_are_interleaved():
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


def test_ratio_of_pairs_is_of_neighbours():
    # Twice as slow in every round, while the machine gets slower by the round.
    result = paired.Paired({"a": (2.0, 20.0, 200.0), "b": (1.0, 10.0, 100.0)})
    assert result.ratio("a", "b") == 2.0
    assert result.median("b") == 10.0


class Clock:
    """In place of the module `time`: it stands still but for what is slept or computed."""

    def __init__(self, monkeypatch):
        self.wall = self.computed = 0.0
        monkeypatch.setattr(paired, "time", self)

    def perf_counter(self):
        return self.wall

    def process_time(self):
        return self.computed

    def sleep(self, seconds):
        self.wall += seconds


def test_the_least_of_several_samples_counts(monkeypatch):
    clock, waits = Clock(monkeypatch), itertools.cycle([3e-3, 4e-3, 1e-3, 2e-3])
    result = paired.compare(
        {"a": lambda: clock.sleep(next(waits))},
        seconds=0, min_rounds=2, min_sample=0, least_of=3,
    )  # fmt: skip
    # Two calls before; of the four in a round the first one does not count.
    assert result.seconds["a"] == pytest.approx((2e-3, 2e-3))


def test_what_runs_elsewhere_takes_its_turn():
    asked = []

    def elsewhere(calls, samples):
        asked.append((calls, samples))
        return 1e-3

    result = paired.compare(
        {"a": lambda: None}, elsewhere={"b": elsewhere}, seconds=0, least_of=3, min_sample=5e-3
    )
    assert asked == [(1, 1)] + [(5, 3)] * 3
    assert result.seconds["b"] == (1e-3,) * 3 and len(result.seconds["a"]) == 3


def test_idle_is_when_no_thread_computes(monkeypatch):
    clock, work, slept = Clock(monkeypatch), [2e-3, 1e-3, 1e-5], []

    def sleep(seconds):
        slept.append(seconds)
        clock.computed += work[len(slept) - 1]

    monkeypatch.setattr(clock, "sleep", sleep)
    paired.wait_until_idle(2e-3)
    assert slept == [2e-3] * 3


def test_slow_calls_average_by_themselves(monkeypatch):
    clock, calls = Clock(monkeypatch), []

    def step():
        calls.append(0)
        clock.sleep(paired.LONG_SAMPLE)

    paired.compare({"a": step}, seconds=0, min_rounds=1, least_of=3)
    assert len(calls) == 2 + 1 + 1


def test_rounds_end_when_all_is_clear():
    steps = {"a": lambda: None, "b": lambda: None}
    result = paired.compare(steps, min_rounds=9, min_sample=0, is_settled=lambda m: m.rounds == 2)
    assert [len(times) for times in result.seconds.values()] == [2, 2]


def test_short_calls_are_repeated():
    calls = []
    paired.compare({"a": lambda: calls.append(0)}, seconds=0, min_rounds=1, min_sample=1e-3)
    assert len(calls) > 20
