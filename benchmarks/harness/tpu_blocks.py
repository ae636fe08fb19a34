"""The blocks that the TPU forward kernel may take: what they are estimated to cost, and what the
compiler says of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from axattn import aot
from axattn.kernels._tpu.flash import block_sizes
from axattn.kernels._tpu.flash.forward import forward
from axattn.kernels._tpu.flash.grid import TpuBlockSizes
from benchmarks.harness import units
from benchmarks.harness.calls import asked, make_call
from benchmarks.harness.kernel_blocks import tpu_chip


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Block sizes that are tried.

    Attributes:
      vmem_bytes: what the kernel then needs, estimated from above.
      seconds: of the call on one chip by the model that chooses; a guess, not a measurement.
      fits: whether they may be chosen.
      taken: whether they are chosen.
    """

    block_q: int
    block_kv: int
    vmem_bytes: int
    seconds: float
    fits: bool
    taken: bool

    def __str__(self) -> str:
        text = f"{units.seconds(self.seconds)}, {units.size(self.vmem_bytes)}"
        return f"**{text}**" if self.taken else text if self.fits else f"({text})"


def candidates(where: str, *shapes: Any, **options: Any) -> list[Candidate]:
    """All blocks that are tried for a call on a TPU."""
    chip = tpu_chip(where)

    def weigh(call) -> list[Candidate]:
        best = block_sizes.choose_forward_block_sizes(call, chip)
        found = []
        for blocks in block_sizes.list_candidates(call):
            time = block_sizes.estimate_time(call, chip, block_sizes.FORWARD, *blocks)
            seconds = time.total / chip.cores
            vmem = block_sizes.estimate_vmem_bytes(call, block_sizes.FORWARD, *blocks)
            fits = block_sizes.fits(call, chip, block_sizes.FORWARD, *blocks)
            taken = blocks == (best.block_q, best.block_kv)
            found.append(Candidate(*blocks, vmem, seconds, fits, taken))
        return found

    return asked(weigh, *shapes, **options)


def grid(found: list[Candidate], least_q: int) -> tuple[list[str], list[list[str]]]:
    """Headers and lines of a table: queries of a block down, keys to the right.

    The one that is taken is bold, what is too large is in parentheses.
    """
    widths = sorted({one.block_kv for one in found})
    heights = sorted({one.block_q for one in found if one.block_q >= least_q})
    cells = {(one.block_q, one.block_kv): str(one) for one in found}
    lines = [[str(q), *(cells.get((q, kv), "") for kv in widths)] for q in heights]
    return ["queries \\ keys", *map(str, widths)], lines


def compiled(
    where: str, block_q: int, block_kv: int, vmem_limit: int, *shapes: Any, **options: Any
) -> aot.Report:
    """The forward kernel with these blocks, compiled; its VMEM is at most ``vmem_limit`` bytes.

    What it needs beyond that is a refusal, with the bytes that were asked for.
    """
    own = TpuBlockSizes(block_q, block_kv, vmem_limit)

    def attend(*arrays):
        return forward(make_call(*arrays, **options), own, interpret=False)[0]

    return aot.analyze(attend, *shapes, target=where)
