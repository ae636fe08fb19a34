from __future__ import annotations

import dataclasses
import time

import pytest

from benchmarks.harness import processes, timing


@dataclasses.dataclass(frozen=True)
class Sleep:
    """google-benchmark runs once per process, so each of these has one to itself."""

    seconds: float = 0.0
    device: float | None = None
    fail: bool = False
    twice: bool = False
    estimate: float = 0.0

    def step(self):
        if self.fail:
            raise MemoryError("no more")
        time.sleep(self.seconds)

    def __call__(self):
        def measure():
            return timing.measure(
                "sleep",
                self.step,
                min_time=0.02,
                repetitions=4,
                device_seconds=None if self.device is None else lambda: self.device,
                estimate=self.estimate,
            )

        if self.twice:
            measure()
        try:
            return measure()
        except MemoryError as error:
            return repr(error)


@pytest.mark.ci
def test_times_of_steps():
    timed = processes.call(Sleep(0.004))
    assert 0.004 <= timed.median
    assert timed.cpu < timed.median  # it sleeps
    assert timed.repetitions == 4 and timed.iterations >= 1
    assert timed.clock == "wall"
    timed = processes.call(Sleep(device=0.25))
    assert timed.median == pytest.approx(0.25) and timed.stddev == pytest.approx(0)
    assert timed.clock == "device"
    # Slow steps are repeated less.
    assert processes.call(Sleep(0.03, estimate=2.0)).repetitions == 3


@pytest.mark.ci
def test_errors_of_steps():
    assert processes.call(Sleep(fail=True)) == "MemoryError('no more')"
    with pytest.raises(RuntimeError, match="runs once per process"):
        processes.call(Sleep(twice=True))


def run(seconds, unit="ms", **more):
    return {
        "run_type": "iteration",
        "real_time": seconds,
        "cpu_time": 2 * seconds,
        "time_unit": unit,
        "iterations": 5,
        **more,
    }


def test_parse():
    aggregate = {"run_type": "aggregate", "real_time": 99, "cpu_time": 99, "time_unit": "ms"}
    timed = timing.parse({"benchmarks": [run(1), run(5), run(3), aggregate]}, "wall")
    assert timed.median == pytest.approx(3e-3) and timed.cpu == pytest.approx(6e-3)
    assert timed.stddev == pytest.approx(2e-3)
    assert (timed.iterations, timed.repetitions) == (5, 3)
    assert timing.parse({"benchmarks": [run(1, "us")]}, "wall").stddev == 0


def test_parse_refuses_what_went_wrong():
    failed = run(1, error_occurred=True, error_message="broken")
    with pytest.raises(RuntimeError, match="broken"):
        timing.parse({"benchmarks": [failed]}, "wall")
    with pytest.raises(RuntimeError, match="nothing ran"):
        timing.parse({"benchmarks": []}, "wall")
