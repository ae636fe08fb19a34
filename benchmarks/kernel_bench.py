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

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.harness import command, kernel_job, kernel_rows, kernel_script, units
from benchmarks.harness.kernel_cases import DIRECTIONS, PRESETS
from benchmarks.harness.kernel_programs import IMPLEMENTATIONS

FLAGS = kernel_script.Flags(PRESETS, IMPLEMENTATIONS, not_on_gpu=("xla",), example="causal,packed")
flags.adopt_module_key_flags(kernel_script)
_DIRECTIONS = flags.DEFINE_list("directions", [*DIRECTIONS], f"of {', '.join(DIRECTIONS)}")


class Table(kernel_script.Table):
    """Cells beside what a matrix product reaches."""

    notes = (
        "Errors are relative to the largest element of their row, against float32; allowed: twice "
        "that of plain attention in the same precision, or the chunked path where its logits are "
        "large. One batch row and one key/value head are checked.",
    )

    def check(self):
        command.names(_DIRECTIONS, DIRECTIONS)

    def begin(self, out, worker, silence):
        where = out.environment
        (matmul,) = worker.run(
            kernel_job.Matmul(8192 if where.platform == "cuda" else 512), silence
        )
        self.ceiling = kernel_rows.Ceiling(matmul, kernel_rows.peak_of(where.device))
        peak = f" of {units.amount(self.ceiling.peak, 'FLOP/s')}" if self.ceiling.peak else ""
        title = (
            f"{units.amount(matmul, 'FLOP/s')}{peak} in a bfloat16 matrix product on random data"
        )
        out.begin("kernels", title, kernel_rows.COLUMNS)

    def job(self, case, implementations, seconds, stop):
        return kernel_job.Measure(case, tuple(_DIRECTIONS.value), implementations, seconds, stop)

    def rated(self, cell, case):
        return kernel_rows.rated(cell, case, self.ceiling)


def main(argv: Sequence[str]) -> int:
    return kernel_script.run(argv, FLAGS, Table())


if __name__ == "__main__":
    command.run(main)
