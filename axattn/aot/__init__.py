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

from axattn.aot.collectives import Collective
from axattn.aot.compiler import analyze, tracing_for
from axattn.aot.meshes import mesh
from axattn.aot.report import Refusal, Report, parse_refusal
from axattn.aot.targets import TARGETS, Target, target
from axattn.aot.toolchain import MissingCompilerError, check_installed, device

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
    "target",
    "tracing_for",
]
