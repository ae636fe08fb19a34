"""What a function costs on a chip that is not here.

::

    report = axattn.aot.analyze(fn, *args, target="v5p")
    print(report)                     # a table: HBM, FLOPs, bytes accessed
    report.hbm_bytes, report.refusal  # the same as data; out of memory is data too
    report.hlo_text()                 # the optimized program

The real compilers do the work: libtpu for TPUs and XLA's CUDA compiler for NVIDIA GPUs, both from
the extra ``aot`` (in a checkout, ``pip install -e '.[aot]'``), neither needing a device or a
driver. They say what a program needs and whether it fits; they say nothing of how fast it runs.

``TARGETS`` has the chips by name, each a `Target`: v4, v5e, v5p, v6e and tpu7x, a100, h100, h200
and b200, and cpu, which needs no extra and whose bytes are host memory.
"""

from __future__ import annotations

from axattn.aot._collectives import Collective, program_collectives
from axattn.aot._compiler import analyze, tracing_for
from axattn.aot._meshes import mesh
from axattn.aot._report import Refusal, Report, parse_refusal
from axattn.aot._targets import TARGETS, Target, target
from axattn.aot._toolchain import MissingCompilerError, check_installed, device

__all__ = [
    "TARGETS",
    "Collective",
    "MissingCompilerError",
    "Refusal",
    "Report",
    "Target",
    "analyze",
    "check_installed",
    "device",
    "mesh",
    "parse_refusal",
    "program_collectives",
    "target",
    "tracing_for",
]
