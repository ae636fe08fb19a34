"""What ``kernel_bench.py`` runs in its worker: a case with all implementations, in turn."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks.harness import environment, inputs, kernel_programs, processes, rounds
from benchmarks.harness import kernel_rows as rows
from benchmarks.harness.kernel_cases import Case
from benchmarks.harness.kernel_check import Reference
from benchmarks.harness.kernel_rows import Cell
from benchmarks.harness.processes import probe

# Sets of inputs that take turns take this much in all, but there are two at least.
_SETS_BYTES = 2 << 30
_MOST_SETS = 4


@dataclasses.dataclass(frozen=True)
class Doing:
    """What comes next: the implementations whose cells are lost if this process is."""

    direction: str
    implementations: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Measure:
    """Measures a case; the cells in ``skip``, (direction, implementation), are done with.

    Attributes:
      seconds: to time one cell for.
      stop: `time.time` after which no cell is begun.
    """

    case: Case
    directions: tuple[str, ...]
    implementations: tuple[str, ...]
    seconds: float
    stop: float
    skip: frozenset[tuple[str, str]] = frozenset()

    def __call__(self) -> Iterator[Doing | Cell]:
        environment.choose_backend()
        bench = _Bench(self)
        for direction in self.directions:
            names = [n for n in self.implementations if (direction, n) not in self.skip]
            if names:
                yield from bench.direction(direction, names)


def cells(worker: processes.Worker, job: Measure, silence: float) -> Iterator[Cell]:
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
            yield Cell.of(job.case, direction, name, status=rows.FAILED, reason=why)
        job = dataclasses.replace(job, skip=frozenset(done | lost))


class _Bench:
    """Inputs, programs and the reference of one case, shared by its cells."""

    def __init__(self, job: Measure):
        self.job, self.case = job, job.case
        self.platform = jax.default_backend()
        self.programs: dict[str, kernel_programs.Programs] = {}
        self.reference: Reference | None = None
        self.sets: list[tuple[jax.Array, ...]] = []

    def direction(self, direction: str, names: list[str]) -> Iterator[Doing | Cell]:
        timers: dict[str, rounds.Timer] = {}
        cells: dict[str, Cell] = {}
        for name in names:
            cell = Cell.of(self.case, direction, name)
            if time.time() > self.job.stop:
                yield dataclasses.replace(cell, status=rows.NOT_MEASURED, reason="time is up")
                continue
            yield Doing(direction, (name,))
            try:
                checked, timer = self.prepare(cell)
                if timer is None:
                    yield checked
                else:
                    cells[name], timers[name] = checked, timer
            except Exception as error:  # one cell's failure is a reason, not the end
                yield dataclasses.replace(cell, **reason(error))
                probe()
        if not timers:
            return
        yield Doing(direction, tuple(timers))
        yield from self.timed(cells, timers)

    def prepare(self, cell: Cell) -> tuple[Cell, rounds.Timer | None]:
        """Compiles and checks; the timer is None for a cell that is wrong."""
        attend = kernel_programs.attention(self.case, cell.implementation)
        # Traced first: a refusal costs no time and no memory.
        jax.eval_shape(attend, *self.case.structs()[:3], self.case.extras())
        if not self.sets:
            self.sets = list(_inputs(self.case))
        programs = self.programs.setdefault(cell.implementation, kernel_programs.Programs(attend))
        extras = self.case.extras()
        steps = [programs.step(cell.direction, arrays, extras) for arrays in self.sets]
        results = jax.block_until_ready(steps[0]())
        if self.reference is None:
            self.reference = Reference(self.case, self.sets[0])
        checked = self.reference.check(cell.direction, results)
        cell = dataclasses.replace(
            cell, **dataclasses.asdict(checked), against=self.reference.against
        )
        if not checked.ok:
            wrong = f"{checked.result} is off by {checked.error:.2g} of its row"
            return dataclasses.replace(cell, status=rows.WRONG, reason=wrong), None
        turns = itertools.cycle(steps)
        timer, note = rounds.timer(lambda: jax.block_until_ready(next(turns)()), self.platform)
        clock = "device" if self.platform == "gpu" and note is None else "wall"
        return dataclasses.replace(cell, clock=clock, note=note), timer

    def timed(self, cells: dict[str, Cell], timers: dict[str, rounds.Timer]) -> Iterator[Cell]:
        """Rounds over what is ready; ratios are those of neighbors."""
        samples: dict[str, list[float]] = {name: [] for name in timers}
        for name, seconds in rounds.samples(timers, seconds=self.job.seconds):
            samples[name].append(seconds)
        cudnn = samples.get("cudnn", [])
        for name, times in samples.items():
            yield dataclasses.replace(
                cells[name],
                seconds=statistics.median(times),
                rounds=len(times),
                ratio=rounds.ratio(cudnn, times),
            )


def reason(error: Exception) -> dict[str, str]:
    """Status and reason of a cell that raised."""
    text = " ".join(str(error).split()) or repr(error)
    if isinstance(error, NotImplementedError):
        return {"status": rows.UNSUPPORTED, "reason": text}
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return {"status": rows.OUT_OF_MEMORY, "reason": text}
    return {"status": rows.FAILED, "reason": f"{type(error).__name__}: {text}"}


def _inputs(case: Case) -> Iterator[tuple[jax.Array, ...]]:
    """Sets of random inputs that differ."""
    sets = max(2, min(_MOST_SETS, _SETS_BYTES // case.input_bytes()))
    for seed in range(sets):
        yield inputs.normal_on_device(case.structs(), seed)


@dataclasses.dataclass(frozen=True)
class Matmul:
    """FLOP/s of a square bfloat16 product on random data: the ceiling of this device, today."""

    size: int

    def __call__(self) -> Iterator[float]:
        environment.choose_backend()
        struct = jax.ShapeDtypeStruct((self.size, self.size), jnp.bfloat16)
        pairs = itertools.cycle([inputs.normal_on_device((struct,) * 2, seed) for seed in range(2)])
        multiply = jax.jit(jnp.matmul)
        timer, _ = rounds.timer(
            lambda: jax.block_until_ready(multiply(*next(pairs))), jax.default_backend()
        )
        times = [seconds for _, seconds in rounds.samples({"": timer}, seconds=0.5)]
        yield 2.0 * self.size**3 / statistics.median(times)
