"""Block sizes of the Hopper kernels: tries candidates and writes ``block_sizes.json``, their table.

Without a GPU (the compilers of the extra ``aot``): what compiles, and what spills.

    python benchmarks/tune_hopper.py --mode=compile
    python benchmarks/tune_hopper.py --mode=compile --write

On a Hopper GPU: what is fastest. Ten minutes are not enough for the whole grid, so it comes in
parts, in this order; each part replaces its own rows of the table and leaves the others alone.

    python benchmarks/tune_hopper.py --mode=measure --write --budget_minutes=9 \\
        --kinds=masked,full --head_dims=128,64,256
    python benchmarks/tune_hopper.py --mode=measure --write --budget_minutes=9 \\
        --kinds=masked,full --head_dims=96,192/128,192
    python benchmarks/tune_hopper.py --mode=measure --write --budget_minutes=9 \\
        --kinds=capped,general,biased --head_dims=128,64,256

A measured candidate is first checked against the chunked XLA path in float32. A compiled one is
chosen by what ptxas says (one that spills only where all do; then products that wait for each
other), then by the cost model of
`harness.tile_candidates.preference`; a table that was compiled says so in every row.
"""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from rich.console import Console

from benchmarks.harness import (
    command,
    environment,
    jobs,
    processes,
    tables,
    tile_candidates,
    tile_compile,
    tile_measure,
    tile_report,
    tile_table,
)
from benchmarks.harness.tile_candidates import HEAD_SIZES, KERNELS, KINDS, Place

_MODE = flags.DEFINE_enum("mode", "compile", ["compile", "measure"], "without a GPU, or on one")
_TARGET = flags.DEFINE_string("target", "h200", "what to compile for")
_KERNELS = flags.DEFINE_list("kernels", [*KERNELS], f"of {', '.join(KERNELS)}")
_KINDS = flags.DEFINE_list("kinds", [*KINDS], f"of {', '.join(KINDS)}")
_HEAD_DIMS = flags.DEFINE_list("head_dims", [], "sizes of H, or H/h, e.g. 128,192/128")
_WRITE = flags.DEFINE_bool("write", False, "write the table")
_PATH = flags.DEFINE_string("path", str(tile_table.PATH), "the table")
_BUDGET = flags.DEFINE_float("budget_minutes", 60.0, "begin nothing after this", lower_bound=0)
_MOST = flags.DEFINE_integer(
    "most",
    10,
    "candidates to try for a row; to compile, more where all of these spill",
    lower_bound=1,
)
_SECONDS = flags.DEFINE_float("seconds", 0.3, "to measure a candidate for", lower_bound=0)
_SILENCE = flags.DEFINE_float("silence", 120, "seconds after which a candidate hangs", 1)
_SHAPE = flags.DEFINE_list("shape", ["4", "4096", "16", "4"], "B, T, N, K of what is measured")


_PLAIN = {"soft_wrap": True, "highlight": False, "markup": False}


def places() -> list[Place]:
    """The rows that were asked for, in the order of the flags."""
    kernels, kinds = command.names(_KERNELS, KERNELS), command.names(_KINDS, KINDS)
    names = {"/".join(map(str, dict.fromkeys(sizes))): sizes for sizes in HEAD_SIZES}
    sizes = [names[name] for name in command.names(_HEAD_DIMS, names, empty=True) or names]
    # The kernels of one kind and size are neighbors: they share what they are checked against.
    return [Place(k, kind, *size) for kind in kinds for size in sizes for k in kernels]


def compile_all(asked: Sequence[Place], stop: float, console: Console) -> Iterator[dict]:
    """Compiles all candidates; the rows of those that are best."""
    tile_compile.prepare(_TARGET.value)
    stream = tables.Stream(console, tile_report.COMPILED)
    stream.header()
    for place in asked:
        if time.monotonic() > stop:
            console.print(f"{place}: not compiled, the time is up", **_PLAIN)
            continue
        tried = []
        for one in tile_compile.tried(place, _MOST.value, _TARGET.value):
            tried.append(one)
            stream.row(one, "red" if one.refusal else None)
        found = tile_compile.best(tried)
        if found is None:
            console.print(f"{place}: nothing compiles", style="red", **_PLAIN)
            continue
        console.print(f"{place}: {found.tiles}", style="bold", **_PLAIN)
        yield tile_report.compiled_row(found)


def measure_all(asked: Sequence[Place], stop: float, console: Console) -> Iterator[dict]:
    """Times candidates; the rows of the fastest ones."""
    shape = tile_measure.Shape(*command.numbers(_SHAPE, count=4))
    stream = tables.Stream(console, tile_report.measured(shape))
    stream.header()
    worker = processes.Worker()
    try:
        for place in asked:
            if time.monotonic() > stop:
                console.print(f"{place}: not measured, the time is up", **_PLAIN)
                continue
            candidates = tile_candidates.candidates(place)[: _MOST.value]
            job = tile_measure.Measure(place, shape, tuple(candidates), _SECONDS.value)
            tried = tile_measure.tried(worker, job, _SILENCE.value)
            for one in tried:
                stream.row(one, "red" if one.seconds is None else None)
            timed = [one for one in tried if one.seconds is not None]
            if not timed:
                console.print(f"{place}: nothing ran", style="red", **_PLAIN)
                continue
            found = min(timed, key=lambda one: one.seconds)
            console.print(f"{place}: {found.tiles}", style="bold", **_PLAIN)
            yield tile_report.measured_row(found, shape)
    finally:
        worker.close()


def main(argv: Sequence[str]) -> int:
    path, console = pathlib.Path(_PATH.value), Console()
    try:
        asked, table = places(), tile_table.read(path)
        command.numbers(_SHAPE, count=4)
        if _MODE.value == "compile":
            jobs.check_targets([_TARGET.value])
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    if jax.__version_info__ < (0, 11):
        sys.exit(f"the kernels need jax >= 0.11 (Python >= 3.12), got {jax.__version__}")
    line = environment.command_line(sys.argv)
    stop = time.monotonic() + 60 * _BUDGET.value
    make = {"compile": compile_all, "measure": measure_all}[_MODE.value]
    provenance = tile_report.provenance(_MODE.value, _TARGET.value, line)
    date, rows = provenance.pop("date"), 0
    for row in make(asked, stop, console):
        rows += 1
        if _WRITE.value:
            # Row by row: a run that is cut off keeps what it has found. Read again each time:
            # another part of the grid may have been written meanwhile.
            table = tile_table.merged(tile_table.read(path), [row], date, provenance)
            tile_table.write(table, path)
    if not _WRITE.value:
        return 0
    console.print(f"{path}: {rows} of {len(table['rows'])} rows replaced", **_PLAIN)
    return 0 if rows else 1


if __name__ == "__main__":
    command.run(main)
