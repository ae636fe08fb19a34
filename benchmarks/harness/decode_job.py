"""What ``decode_bench.py`` runs in its worker: a case with all implementations, in turn."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.harness import cell_job, decode_inputs, decode_programs, rounds
from benchmarks.harness.decode_cases import Case
from benchmarks.harness.decode_check import Reference
from benchmarks.harness.decode_rows import Cell
from benchmarks.harness.kernel_check import Checked

# The kernels that this library would be chosen for; all others are what it has to beat.
KERNELS = "mosaic_gpu"


@dataclasses.dataclass(frozen=True)
class Measure(cell_job.Measure):
    """Measures a `decode_cases.Case`; there is one direction, "fwd"."""

    case: Case

    def bench(self) -> _Bench:
        return _Bench(self)

    def cell(self, direction: str, implementation: str, **values: Any) -> Cell:
        return Cell.of(self.case, direction, implementation, **values)


class _Bench(cell_job.Bench):
    """Inputs, their layouts and the reference of one case, shared by its cells."""

    def __init__(self, job: Measure):
        super().__init__(job)
        self.reference: Reference | None = None
        self.sets: list[decode_inputs.Inputs] = []
        self.laid_out: dict[Callable, list[Any]] = {}

    def steps(self, cell: Cell) -> list[cell_job.Step]:
        program = decode_programs.program(self.case, cell.implementation)
        # Traced first: a refusal costs no time and no memory.
        structs = jax.eval_shape(program.convert, decode_inputs.structs(self.case))
        jax.eval_shape(program.attend, structs)
        if not self.sets:
            sets = range(decode_inputs.count(self.case))
            self.sets = [decode_inputs.make(self.case, seed) for seed in sets]
        attend = jax.jit(program.attend)
        return [functools.partial(_outputs, attend, given) for given in self.layouts(program)]

    def layouts(self, program: decode_programs.Program) -> list[Any]:
        """The sets of inputs as the program takes them: made once for all that share a layout."""
        if program.convert not in self.laid_out:
            self.laid_out[program.convert] = [program.convert(given) for given in self.sets]
        return self.laid_out[program.convert]

    def check(self, cell: Cell, results: tuple[jax.Array, ...]) -> tuple[Checked, str]:
        if self.reference is None:
            self.reference = Reference(self.case, self.sets[0])
        return self.reference.check(cell.implementation, results[0]), self.reference.against

    def compared(self, samples, name: str) -> dict[str, Any]:
        others = {n: times for n, times in samples.items() if n != KERNELS}
        if not others:
            return {}
        best = min(others, key=lambda n: statistics.median(others[n]))
        ratio, noisy = rounds.ratio(others[best], samples[name])
        return {"best": best, "ratio": ratio, "ratio_is_noise": noisy}


def _outputs(attend: Callable[[Any], jax.Array], given: Any) -> tuple[jax.Array, ...]:
    return (attend(given),)
