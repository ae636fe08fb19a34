"""Attention kernels of several libraries on one device: time, FLOP/s, and whether they are right.

    python benchmarks/kernel_bench.py --preset=smoke

On a GPU, in this order, each within ten minutes (what takes the time is compiling; the chunked XLA
path compiles longest, so it has a command of its own):

    python benchmarks/kernel_bench.py --budget_minutes=8 --implementations=mosaic_gpu,cudnn \\
        --cases=causal/gqa32/8/16k,packed,window,gemma,gpt,h192,full/gqa \\
        --json=benchmarks/results/kernels-h200.json --markdown=benchmarks/results/kernels-h200.md
    python benchmarks/kernel_bench.py --budget_minutes=8 --implementations=mosaic_gpu,cudnn \\
        --cases=mqa,/4k,/8k,/32k --json=benchmarks/results/kernels-h200-more.json \\
        --markdown=benchmarks/results/kernels-h200-more.md
    python benchmarks/kernel_bench.py --budget_minutes=8 --cases=causal/gqa32/8/4k,packed \\
        --json=benchmarks/results/kernels-h200-peers.json \\
        --markdown=benchmarks/results/kernels-h200-peers.md

Every cell is checked on the very call that is timed, then all implementations of a case are timed
in turn, each behind a sweep through more memory than L2 holds and on inputs that change from call
to call. Time is that of the GPU's kernels (CUPTI); FLOP/s count the pairs that the mask leaves, and
2.5 times the forward pass for the backward pass. A cell without a number says why. What is faster
than the hardware can be, wrong, or fails in this library makes the exit status 1.

One process does all the work. If it dies or hangs, that costs the cell it was at, and another
process goes on.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.harness import (
    environment,
    jobs,
    kernel_job,
    kernel_rows,
    output,
    processes,
    sections,
    units,
)
from benchmarks.harness.kernel_cases import DIRECTIONS, PRESETS, Case
from benchmarks.harness.kernel_programs import IMPLEMENTATIONS

_PRESET = flags.DEFINE_enum("preset", None, sorted(PRESETS), "issue on a GPU, else smoke")
_CASES = flags.DEFINE_list("cases", [], "parts of the cases' names, e.g. causal,packed")
_DIRECTIONS = flags.DEFINE_list("directions", [*DIRECTIONS], f"of {', '.join(DIRECTIONS)}")
_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations", None, f"of {', '.join(IMPLEMENTATIONS)}; all but xla, which smoke has too"
)
_SECONDS = flags.DEFINE_float("seconds", 0.3, "to time a cell for", lower_bound=0)
_BUDGET = flags.DEFINE_float("budget_minutes", 60.0, "begin no cell after this", lower_bound=0)
_SILENCE = flags.DEFINE_float("silence", 120.0, "seconds after which a cell hangs", lower_bound=1)
_MARKDOWN = flags.DEFINE_string("markdown", None, "file to write: .md")
_JSON = flags.DEFINE_string("json", None, "file to write: .json")


def cases(platform: str) -> list[Case]:
    """Those of the preset that are asked for."""
    preset = _PRESET.value or ("issue" if platform == "cuda" else "smoke")
    found = PRESETS[preset]()
    wanted = [c for c in found if not _CASES.value or any(part in c.name for part in _CASES.value)]
    if not wanted:
        raise ValueError(f"--cases: nothing among {', '.join(case.name for case in found)}")
    return wanted


def checked_flags() -> list[pathlib.Path]:
    """The files to write; ValueError for what cannot be."""
    for flag, known in ((_DIRECTIONS, DIRECTIONS), (_IMPLEMENTATIONS, IMPLEMENTATIONS)):
        for name in flag.value or ():
            if name not in known:
                raise ValueError(f"--{flag.name}: {name!r} takes some of {', '.join(known)}")
    files = []
    for flag, suffix in ((_MARKDOWN, ".md"), (_JSON, ".json")):
        if flag.value is not None:
            files.append(output.check_path(flag.value))
            if files[-1].suffix != suffix:
                raise ValueError(f"--{flag.name}: {flag.value!r} does not end in {suffix}")
    return files


def implementations(platform: str) -> tuple[str, ...]:
    if _IMPLEMENTATIONS.value is not None:
        return tuple(dict.fromkeys(_IMPLEMENTATIONS.value))
    return tuple(name for name in IMPLEMENTATIONS if name != "xla" or platform != "cuda")


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    started = time.time()
    try:
        files = checked_flags()
        # In a process of its own: asking starts JAX, which takes a GPU's memory.
        where = processes.call(jobs.Describe())
        asked = cases(where.platform)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    where = dataclasses.replace(where, command=environment.command_line(sys.argv))
    out = sections.Sections(where)
    on_gpu, worker = where.platform == "cuda", processes.Worker()
    try:
        (matmul,) = worker.run(kernel_job.Matmul(8192 if on_gpu else 512), _SILENCE.value)
        ceiling = kernel_rows.Ceiling(matmul, kernel_rows.peak_of(where.device))
        peak = f" of {units.amount(ceiling.peak, 'FLOP/s')}" if ceiling.peak else ""
        title = (
            f"{units.amount(matmul, 'FLOP/s')}{peak} in a bfloat16 matrix product on random data"
        )
        out.begin("kernels", title, kernel_rows.COLUMNS)
        for case in asked:
            job = kernel_job.Measure(
                case,
                tuple(_DIRECTIONS.value),
                implementations(where.platform),
                _SECONDS.value,
                started + 60 * _BUDGET.value,
            )
            for cell in kernel_job.cells(worker, job, _SILENCE.value):
                cell = kernel_rows.rated(cell, case, ceiling)
                out.row(cell, cell.failure)
        code = 0
    except KeyboardInterrupt:
        out.print("\ninterrupted")
        code = 130
    finally:
        worker.close()
    against = (
        "plain attention in the same precision, or the chunked path where its logits are large"
    )
    out.note(
        f"Errors are relative to the largest element of their row, against float32; allowed: twice "
        f"that of {against}. One batch row and one key/value head are checked."
    )
    out.close()
    for path in files:
        out.write(path)
    return code or (1 if out.failures else 0)


if __name__ == "__main__":
    app.run(main)
