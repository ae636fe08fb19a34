from __future__ import annotations

from benchmarks.harness import device_time, rounds


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
