"""Decode attention over long caches on one device: time, bytes per second, and whether it is right.

    python benchmarks/decode_bench.py --preset=smoke

On a GPU, in this order, each within ten minutes (what takes the time is compiling):

    python benchmarks/decode_bench.py --budget_minutes=8 --cases=b32/4k,mla \\
        --implementations=mosaic_gpu,jax_nn_xla,jax_nn_cudnn,pallas_triton \\
        --json=benchmarks/results/decode-h200.json --markdown=benchmarks/results/decode-h200.md
    python benchmarks/decode_bench.py --budget_minutes=8 \\
        --cases=/b1/,mqa,ragged,/t4/,/t16/,tree,h64,cap50,ring,t512 \\
        --implementations=mosaic_gpu,jax_nn_xla,jax_nn_cudnn,pallas_triton \\
        --json=benchmarks/results/decode-h200-more.json \\
        --markdown=benchmarks/results/decode-h200-more.md
    python benchmarks/decode_bench.py --budget_minutes=8 --cases=b32/4k/dense,ragged,mla128 \\
        --implementations=mosaic_gpu,xla_chunked,xla \\
        --json=benchmarks/results/decode-h200-xla.json \\
        --markdown=benchmarks/results/decode-h200-xla.md

Without a GPU, what its compiler says (nothing is run; needs the extra ``aot``):

    python benchmarks/decode_bench.py --target=h200 --cases=b32/4k,mla

Every cell is checked on the very call that is timed, then all implementations of a case are timed
in turn, each behind a sweep through more memory than L2 holds and on caches that change from call
to call; pages are shuffled over a pool that is larger than what is used. Time is that of all of the
call's kernels on the GPU (CUPTI). The rate counts what the lengths (and a window) say must be read,
once: keys, values, scales, the query; and the output. The floor is those bytes over the data
sheet's bandwidth or, where that is longer, the FLOPs over its peak. "best/this" is the time of the
fastest implementation other than mosaic_gpu over this one's. A cell without a number says why. What
is faster than the hardware can be, wrong, or fails in this library makes the exit status 1.

One process does all the work. If it dies or hangs, that costs the cell it was at, and another
process goes on.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axattn import aot
from benchmarks.harness import (
    bandwidth,
    command,
    decode_compile,
    decode_job,
    decode_rows,
    kernel_rows,
    kernel_script,
    units,
)
from benchmarks.harness.decode_cases import PRESETS
from benchmarks.harness.decode_programs import IMPLEMENTATIONS

FLAGS = kernel_script.Flags(PRESETS, IMPLEMENTATIONS, example="b32/4k,mla,/b1/")
flags.adopt_module_key_flags(kernel_script)
_TARGET = flags.DEFINE_string("target", None, "compile for this chip, e.g. h200, and run nothing")


class Measured(kernel_script.Table):
    """Cells beside what a copy reaches."""

    notes = (
        "Errors are relative to the largest element of their row, against float32 over the same "
        "cache; allowed: twice that of plain attention in the same precision, and eight times for "
        "pallas_triton, which rounds partial sums to bfloat16. Empty rows must be zeros in this "
        "library; others are not asked for them.",
    )

    def begin(self, out, worker, silence):
        where = out.environment
        size = 1 << 30 if where.platform == "cuda" else 1 << 24
        (copied,) = worker.run(bandwidth.Copy(size), silence)
        self.ceiling = decode_rows.Ceiling.of(kernel_rows.target_of(where.device), copied)
        peak = self.ceiling.bandwidth
        of = f" of {units.amount(peak, 'B/s')}" if peak else ""
        title = f"{units.amount(copied, 'B/s')}{of} in a copy, read and written"
        out.begin("decode", title, decode_rows.COLUMNS)

    def job(self, case, implementations, seconds, stop):
        return decode_job.Measure(case, ("fwd",), implementations, seconds, stop)

    def rated(self, cell, case):
        return decode_rows.rated(cell, case, self.ceiling)


class Compiled(kernel_script.Table):
    """Rows of a compiler."""

    notes = (
        "HBM: arguments, output and temporaries. The floor is arithmetic from the data sheet; no "
        "time was measured.",
    )

    def __init__(self, target: str):
        self.target = target

    def check(self):
        try:
            found = aot.target(self.target)
            aot.check_installed(found)
        except (ValueError, ImportError) as error:
            raise ValueError(f"--target: {error}") from None
        self.platform = found.platform

    def begin(self, out, worker, silence):
        out.begin("compiled", f"Compiled for {self.target}, not measured", decode_compile.COLUMNS)

    def job(self, case, implementations, seconds, stop):
        return decode_compile.Compile(
            case, ("fwd",), implementations, seconds, stop, target=self.target
        )


def main(argv: Sequence[str]) -> int:
    table = Measured() if _TARGET.value is None else Compiled(_TARGET.value)
    return kernel_script.run(argv, FLAGS, table)


if __name__ == "__main__":
    command.run(main)
