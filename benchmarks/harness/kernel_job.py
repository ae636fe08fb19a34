"""What ``kernel_bench.py`` runs in its worker: a case with all implementations, in turn."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import cell_job, environment, inputs, kernel_programs, rounds
from benchmarks.harness.cell_job import Doing, cells
from benchmarks.harness.kernel_cases import Case
from benchmarks.harness.kernel_check import Checked, Reference
from benchmarks.harness.kernel_rows import Cell

__all__ = ["Doing", "Matmul", "Measure", "cells"]

# Sets of inputs that take turns take this much in all, but there are two at least.
_SETS_BYTES = 2 << 30
_MOST_SETS = 4


@dataclasses.dataclass(frozen=True)
class Measure(cell_job.Measure):
    """Measures a `kernel_cases.Case`."""

    case: Case

    def bench(self) -> _Bench:
        return _Bench(self)

    def cell(self, direction: str, implementation: str, **values: Any) -> Cell:
        return Cell.of(self.case, direction, implementation, **values)


class _Bench(cell_job.Bench):
    """Inputs, programs and the reference of one case, shared by its cells."""

    def __init__(self, job: Measure):
        super().__init__(job)
        self.programs: dict[str, kernel_programs.Programs] = {}
        self.reference: Reference | None = None
        self.sets: list[tuple[jax.Array, ...]] = []

    def steps(self, cell: Cell) -> list[cell_job.Step]:
        attend = kernel_programs.attention(self.case, cell.implementation)
        # Traced first: a refusal costs no time and no memory.
        jax.eval_shape(attend, *self.case.structs()[:3], self.case.extras())
        if not self.sets:
            self.sets = list(_inputs(self.case))
        programs = self.programs.setdefault(cell.implementation, kernel_programs.Programs(attend))
        extras = self.case.extras()
        return [programs.step(cell.direction, arrays, extras) for arrays in self.sets]

    def check(self, cell: Cell, results: tuple[jax.Array, ...]) -> tuple[Checked, str]:
        if self.reference is None:
            self.reference = Reference(self.case, self.sets[0])
        return self.reference.check(cell.direction, results), self.reference.against

    def compared(self, samples, name: str) -> dict[str, Any]:
        ratio, noisy = rounds.ratio(samples.get("cudnn", []), samples[name])
        return {"ratio": ratio, "ratio_is_noise": noisy}


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
