"""What scripts of cells run in their worker: a case with all implementations, in turn.

A cell is one implementation on one case in one direction: a number, or the reason why there is
none. `kernel_job` and `decode_job` say what the cells are.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from benchmarks.harness import environment, processes, rounds
from benchmarks.harness import kernel_rows as rows
from benchmarks.harness.kernel_check import Checked

Step = Callable[[], tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Doing:
    """What comes next: the implementations whose cells are lost if this process is."""

    direction: str
    implementations: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Measure(abc.ABC):
    """Measures a case; the cells in ``skip``, (direction, implementation), are done with.

    Attributes:
      seconds: to time one cell for.
      stop: `time.time` after which no cell is begun.
    """

    case: Any
    directions: tuple[str, ...]
    implementations: tuple[str, ...]
    seconds: float
    stop: float
    skip: frozenset[tuple[str, str]] = frozenset()

    def __call__(self) -> Iterator[Any]:
        environment.choose_backend()
        bench = self.bench()
        for direction in self.directions:
            names = self.names(direction)
            if names:
                yield from bench.direction(direction, names)

    def names(self, direction: str) -> list[str]:
        """The implementations that are left to do."""
        return [n for n in self.implementations if (direction, n) not in self.skip]

    @abc.abstractmethod
    def bench(self) -> Bench: ...

    @abc.abstractmethod
    def cell(self, direction: str, implementation: str, **values: Any) -> Any:
        """A cell of this case, a dataclass with the fields that `Bench` sets."""


def cells(worker: processes.Worker, job: Measure, silence: float) -> Iterator[Any]:
    """All cells of a case, whatever becomes of the worker's process (see `processes.Worker.run`).

    One that dies costs the cells it was at; the others are begun again in another process.
    """
    asked = set(itertools.product(job.directions, job.implementations))
    while asked - job.skip:
        doing, done = None, set(job.skip)
        try:
            for message in worker.run(job, silence):
                if isinstance(message, Doing):
                    doing = message
                else:
                    done.add((message.direction, message.implementation))
                    yield message
            return
        except RuntimeError as error:  # also a process that died or hung
            why = str(error).strip().splitlines()[-1]
        lost = set()
        if doing is not None:
            lost = {(doing.direction, name) for name in doing.implementations} - done
        if not lost and done == job.skip:
            # Nothing to blame and nothing done: there is no way on.
            lost = asked - done
        for direction, name in sorted(lost):
            yield job.cell(direction, name, status=rows.FAILED, reason=why)
        job = dataclasses.replace(job, skip=frozenset(done | lost))


class Bench(abc.ABC):
    """The cells of one case: each prepared by itself, then all timed in turn."""

    def __init__(self, job: Measure):
        self.job, self.case = job, job.case
        self.platform = jax.default_backend()

    @abc.abstractmethod
    def steps(self, cell: Any) -> Sequence[Step]:
        """The call to time, on each set of inputs; NotImplementedError where it is refused."""

    @abc.abstractmethod
    def check(self, cell: Any, results: tuple[jax.Array, ...]) -> tuple[Checked, str]:
        """How right the first step's results are, and against what."""

    @abc.abstractmethod
    def compared(self, samples: Mapping[str, list[float]], name: str) -> dict[str, Any]:
        """What the cell ``name`` says of the others' times, seconds per round by name."""

    def direction(self, direction: str, names: Sequence[str]) -> Iterator[Any]:
        timers: dict[str, rounds.Timer] = {}
        prepared: dict[str, Any] = {}
        for name in names:
            cell = self.job.cell(direction, name)
            if time.time() > self.job.stop:
                yield dataclasses.replace(cell, **time_is_up())
                continue
            yield Doing(direction, (name,))
            try:
                checked, timer = self.prepare(cell)
                if timer is None:
                    yield checked
                else:
                    prepared[name], timers[name] = checked, timer
            except Exception as error:  # one cell's failure is a reason, not the end
                yield dataclasses.replace(cell, **reason(error))
                processes.probe()
        if not timers:
            return
        yield Doing(direction, tuple(timers))
        yield from self.timed(prepared, timers)

    def prepare(self, cell: Any) -> tuple[Any, rounds.Timer | None]:
        """Compiles and checks; the timer is None for a cell that is wrong."""
        steps = self.steps(cell)
        checked, against = self.check(cell, jax.block_until_ready(steps[0]()))
        cell = dataclasses.replace(cell, **dataclasses.asdict(checked), against=against)
        if not checked.ok:
            wrong = f"{checked.result} is off by {checked.error:.2g} of its row"
            return dataclasses.replace(cell, status=rows.WRONG, reason=wrong), None
        turns = itertools.cycle(steps)
        timer, note = rounds.timer(lambda: jax.block_until_ready(next(turns)()), self.platform)
        clock = "device" if self.platform == "gpu" and note is None else "wall"
        return dataclasses.replace(cell, clock=clock, note=note), timer

    def timed(self, prepared: dict[str, Any], timers: dict[str, rounds.Timer]) -> Iterator[Any]:
        """Rounds over what is ready; ratios are those of neighbors."""
        samples: dict[str, list[float]] = {name: [] for name in timers}
        for name, seconds in rounds.samples(timers, seconds=self.job.seconds):
            samples[name].append(seconds)
        for name, times in samples.items():
            yield dataclasses.replace(
                prepared[name],
                seconds=statistics.median(times),
                rounds=len(times),
                **self.compared(samples, name),
            )


def time_is_up() -> dict[str, str]:
    """Status and reason of a cell that was not begun."""
    return {"status": rows.NOT_MEASURED, "reason": "time is up"}


def reason(error: Exception) -> dict[str, str]:
    """Status and reason of a cell that raised."""
    text = " ".join(str(error).split()) or repr(error)
    if isinstance(error, NotImplementedError):
        return {"status": rows.UNSUPPORTED, "reason": text}
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return {"status": rows.OUT_OF_MEMORY, "reason": text}
    return {"status": rows.FAILED, "reason": f"{type(error).__name__}: {text}"}
