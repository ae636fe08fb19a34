"""Timing with google-benchmark: one function, once per process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

# A repetition of a function slower than this is one iteration, and three of them will do.
_SLOW_SECONDS = 0.5
_SLOW_REPETITIONS = 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times are seconds per iteration, over ``repetitions`` of ``iterations`` each.

    Attributes:
      median: of the repetitions.
      stddev: of the repetitions; 0 for a single one.
      cpu: median processor time of all threads of the process.
      iterations: calls per repetition.
      repetitions: how many.
      clock: ``"wall"``, or ``"device"`` where `measure` was given device times.
    """

    median: float
    stddev: float
    cpu: float
    iterations: int
    repetitions: int
    clock: str


def measure(
    name: str,
    step: Callable[[], Any],
    *,
    min_time: float,
    repetitions: int,
    device_seconds: Callable[[], float] | None = None,
    estimate: float = 0.0,
) -> Timing:
    """Runs ``step`` under google-benchmark. A second call in one process is an error.

    google-benchmark's RunSpecifiedBenchmarks works once per process: the second call reads a
    reporter that the first has freed (google/benchmark #2240, closed: "API expects only a single
    call"), and crashes. Rows are to be seen as they finish, each with its own allocator peak, so
    every row has its own process (processes.py), and google-benchmark one benchmark in it.

    Args:
      name: shown by nobody, but in google-benchmark's messages.
      step: blocks until the device is done.
      min_time: seconds that each repetition takes at least.
      repetitions: of which the median and the spread are taken.
      device_seconds: runs the step itself and returns the seconds that count in place of the
        wall clock's.
      estimate: seconds that a step may take; slow ones are repeated three times at most.

    Raises:
      RuntimeError: google-benchmark would not run; or whatever ``step`` raises.
    """
    global _used
    if _used:
        raise RuntimeError("google-benchmark runs once per process")
    _used = True
    import google_benchmark

    raised: list[BaseException] = []

    def body(state):
        # An exception must not travel through google-benchmark's C++.
        try:
            while state:
                if device_seconds is None:
                    step()
                else:
                    state.set_iteration_time(device_seconds())
        except BaseException as error:
            raised.append(error)
            state.skip_with_error(repr(error))

    if estimate > _SLOW_SECONDS:
        repetitions = min(repetitions, _SLOW_REPETITIONS)
    option = google_benchmark.option
    clock = option.use_real_time() if device_seconds is None else option.use_manual_time()
    benchmark = clock(option.measure_process_cpu_time()(option.repetitions(repetitions)(body)))
    google_benchmark.register(benchmark, name=name)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "out.json")
        arguments = [
            sys.argv[0] or "benchmark",
            f"--benchmark_out={path}",
            "--benchmark_out_format=json",
            f"--benchmark_min_time={min_time}s",
        ]
        with _silence():
            google_benchmark.initialize(arguments)
            google_benchmark.run_benchmarks()
        if raised:
            raise raised[0]
        with open(path, encoding="utf-8") as file:
            return parse(json.load(file), "wall" if device_seconds is None else "device")


_used = False


def parse(report: dict[str, Any], clock: str) -> Timing:
    """google-benchmark's JSON, of one benchmark, as a `Timing`."""
    runs = [run for run in report["benchmarks"] if run["run_type"] == "iteration"]
    failed = [run["error_message"] for run in runs if run.get("error_occurred")]
    if failed or not runs:
        raise RuntimeError(f"google-benchmark: {failed[0] if failed else 'nothing ran'}")
    unit = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
    times = [run["real_time"] * unit[run["time_unit"]] for run in runs]
    cpu = [run["cpu_time"] * unit[run["time_unit"]] for run in runs]
    return Timing(
        median=statistics.median(times),
        stddev=statistics.stdev(times) if len(times) > 1 else 0.0,
        cpu=statistics.median(cpu),
        iterations=runs[0]["iterations"],
        repetitions=len(runs),
        clock=clock,
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Sends what C++ writes to stdout and stderr nowhere; the tables are ours."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nowhere)
