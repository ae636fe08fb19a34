"""The tables of ``layer_bench.py``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.harness import layer_build, layer_rows, processes, rows, units
from benchmarks.harness import layer_cases as cases
from benchmarks.harness.layer_cases import BASELINE, Case, Model
from benchmarks.harness.layer_jobs import Compile, Job, Run
from benchmarks.harness.layer_rows import HERE, Cell
from benchmarks.harness.sections import Sections


class Bench:
    """Cells of one invocation, printed as they come.

    Attributes:
      cells: those that are finished.
    """

    def __init__(self, out: Sections, *, warmup: int, runs: int, timeout: float | None):
        self.out, self.warmup, self.runs, self.timeout = out, warmup, runs, timeout
        self.cells: list[Cell] = []

    def table(
        self,
        name: str,
        title: str,
        where: str,
        wanted: Iterable[Case],
        *,
        first: str = "layer",
        against_first: bool = False,
    ) -> list[Cell]:
        """A table of cases in one place.

        Each cell is compared with the baseline of its question; with ``against_first``, with the
        table's first.
        """
        self.out.begin(name, f"{title}; {self.place(where)}", self.columns(where, first))
        found: list[Cell] = []
        bases: dict[object, Cell] = {}
        for case in wanted:
            cell = self.finish(self.job(case, where))
            key = None if against_first else case.question
            if case.implementation == BASELINE or against_first:
                bases.setdefault(key, cell)
            cell = layer_rows.compared(cell, bases.get(key))
            failed = cell.status == rows.FAILED
            self.out.row(cell, f"{case.layer} {cell.name}: {cell.reason}" if failed else None)
            found.append(cell)
        self.cells += found
        self.explain(found)
        self.out.note_noise("speedup_is_noise")
        return found

    def explain(self, cells: Sequence[Cell]) -> None:
        """What is to be known of figures, under their table."""
        whose: dict[str, list[str]] = {}
        for cell in cells:
            if cell.status == rows.OK and cell.notes:
                names = whose.setdefault(cell.notes, [])
                names += [cell.implementation] if cell.implementation not in names else []
        for note, names in whose.items():
            self.out.note(f"{', '.join(names)}: {note}")

    def job(self, case: Case, where: str) -> Job:
        return Run(case, self.warmup, self.runs) if where == HERE else Compile(case, where)

    def finish(self, job: Job) -> Cell:
        """The job's cell, whatever becomes of its process."""
        try:
            return processes.call(job, self.timeout)
        except RuntimeError as error:  # also a process that died or hung
            last = str(error).strip().splitlines()[-1]
            return layer_rows.of_case(job.case, job.where, status=rows.FAILED, reason=last)

    def place(self, where: str) -> str:
        if where == HERE:
            return f"run on this machine, median of {self.runs} runs after {self.warmup}"
        return (
            f"compiled for {where}, nothing was run; the roofline is arithmetic at its bfloat16 "
            "rates, no time"
        )

    def columns(self, where: str, first: str) -> list:
        return layer_rows.columns(where, self.platform(where), first)

    def platform(self, where: str) -> str:
        from axattn import aot

        return self.out.environment.platform if where == HERE else aot.target(where).platform


def model_table(
    bench: Bench,
    model: Model,
    layers: Sequence[str],
    implementations: Sequence[str],
    dtype: str,
    directions: Sequence[str],
    where: str,
) -> list[Cell]:
    """All layers of a model with all implementations."""
    found = []
    for direction in directions:
        wanted = [
            case
            for layer in layers
            for case in cases.cases(model, layer, implementations, dtype, direction)
        ]
        flops = units.amount(layer_build.flops(wanted[0]))
        title = f"{model.name}: {model.size}, {dtype}, {direction}; {wanted[0].layer} {flops}FLOP"
        found += bench.table("models", title, where, wanted)
    return found


def optimisation_tables(
    bench: Bench, model: Model, dtype: str, implementation: str, where: str
) -> None:
    """What one decision is worth, the others being as they are."""
    titles = {
        "heads": "key/value heads one after the other, and at once",
        "projections": "products of queries, keys and values apart, and as one",
        "kv heads": "8, 4, 2, 1 key/value heads",
    }
    found = cases.optimisations(model, dtype, "fwd", implementation)
    for name, wanted in found.items():
        bench.table(
            "optimisations",
            f"{model.name}, GroupedQueryAttention, {dtype}, fwd: {titles[name]}",
            where,
            wanted,
            first="kv_heads",
            against_first=True,
        )


def sweep_table(
    bench: Bench,
    name: str,
    models: Sequence[Model],
    layer: str,
    implementations: Sequence[str],
    dtype: str,
    where: str,
) -> None:
    """One layer over sequence lengths or hidden sizes."""
    wanted = [
        case
        for model in models
        for case in cases.cases(model, layer, implementations, dtype, "fwd")
    ]
    first = {"length": "seq_len", "hidden": "hidden"}[name]
    shared = f"hidden {models[0].hidden}" if name == "length" else f"T = {models[0].seq_len}"
    title = f"{layer} by {first.replace('_', ' ')}, {shared}, heads of 128, K = N / 8, {dtype}, fwd"
    bench.table(f"{name} sweep", title, where, wanted, first=first)


def best_table(bench: Bench, of_models: Sequence[Cell]) -> None:
    """The best implementation of every layer against the einsum baseline."""
    found = layer_rows.best(of_models)
    if not found:
        return
    title = f"Best against {BASELINE}: by time where it ran, else by memory"
    bench.out.begin("best", title, layer_rows.BEST_COLUMNS)
    for row in found:
        bench.out.row(row)
    bench.out.note_noise("speedup_is_noise")
