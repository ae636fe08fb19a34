"""What ptxas says of a Mosaic GPU kernel: registers, spills, and products that wait for each other.

Mosaic prints ptxas's report when ``MOSAIC_GPU_DUMP_PTXAS=1``: from C++, past ``sys.stdout``, so it
is caught at the file descriptors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterator

VARIABLE = "MOSAIC_GPU_DUMP_PTXAS"

_ENTRY = "Compiling entry function '"
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# C7508..C7514: what a kernel loses, e.g. "wgmma.mma_async instructions are serialized due to ...".
_WARNING = re.compile(r"Potential Performance Loss: .*|warning *: .*|setmaxnreg ignored.*")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """ptxas's report on one kernel; bytes are per thread.

    ``registers`` are those at the launch, the same for all warpgroups: a kernel that moves
    registers from one warpgroup to another (``setmaxnreg``) shows what is too much in its spills.
    """

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    warnings: tuple[str, ...] = ()

    @property
    def serialized(self) -> bool:
        """Whether the tensor core's products wait for each other."""
        return any("wgmma" in warning and "serialized" in warning for warning in self.warnings)

    @property
    def clean(self) -> bool:
        return not (self.spill_stores or self.spill_loads or self.warnings)


def parse(text: str) -> list[Kernel]:
    """The kernels of a report, in its order."""
    # What stands before the first kernel's lines are warnings that came early.
    head, *parts = text.split(_ENTRY)
    kernels = []
    for part in parts:
        spills = _SPILLS.search(part)
        registers = _REGISTERS.search(part)
        if spills is None or registers is None:
            continue
        warnings = dict.fromkeys(match.group().strip() for match in _WARNING.finditer(head + part))
        kernels.append(
            Kernel(
                part.partition("'")[0],
                int(registers.group(1)),
                int(spills.group(2)),
                int(spills.group(3)),
                tuple(warnings),
            )
        )
        head = ""
    return kernels


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Collects what this process's C++ code prints; the list has one text after the block."""
    texts: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(fd) for fd in (1, 2)]
        try:
            for fd in (1, 2):
                os.dup2(file.fileno(), fd)
            yield texts
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, old in zip((1, 2), saved, strict=True):
                os.dup2(old, fd)
                os.close(old)
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
