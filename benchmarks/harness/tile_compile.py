"""Candidates for the Hopper kernels, compiled for a chip that is not here.

A compiler says what does not fit and what spills, nothing of speed: see
`tile_candidates.preference` for the order in which clean candidates are preferred.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from axattn import aot
from benchmarks.harness import ptxas, tile_calls, tile_candidates
from benchmarks.harness.tile_candidates import Place, shared_bytes

_LENGTH = 4096

# Mosaic keeps what it compiled and says nothing the second time: no two programs are alike.
_BATCHES = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One candidate.

    Attributes:
      shared_bytes: shared memory, by arithmetic.
      usual: ptxas on the kind's usual call; None where there is a ``refusal``.
      heaviest: the same for a call with all that the kind may have; None where it was not asked.
      refusal: why it does not compile.
    """

    place: Place
    tiles: Any
    shared_bytes: int
    usual: ptxas.Kernel | None = None
    heaviest: ptxas.Kernel | None = None
    refusal: str | None = None

    @property
    def cost(self) -> tuple[int, bool, int, bool]:
        """What speaks against it; the least is taken. All 0: nothing spills or is serialized.

        The usual call decides, then the one that has everything at once. A byte that spills is as
        good a reason as many: tiles that spill are taken only where all do.
        """
        return (*_cost(self.usual), *_cost(self.heaviest or self.usual))

    @property
    def lands(self) -> bool:
        """Whether it compiles, and nothing spills or is serialized in the usual call."""
        return self.refusal is None and _cost(self.usual) == (0, False)


def spilled(kernel: ptxas.Kernel | None) -> int | None:
    """Bytes per thread, stored and loaded."""
    return kernel and kernel.spill_stores + kernel.spill_loads


def _cost(kernel: ptxas.Kernel) -> tuple[int, bool]:
    return spilled(kernel), kernel.serialized


def prepare(target: str) -> None:
    """Before JAX compiles anything: finds the compiler, and asks Mosaic for ptxas's reports."""
    aot.check_installed(aot.target(target))
    os.environ[ptxas.VARIABLE] = "1"
    aot.device(aot.target(target))


@contextlib.contextmanager
def reporting(target: str) -> Iterator[None]:
    """`prepare`, for a while: Mosaic's reports go to stdout where nobody catches them."""
    before = os.environ.get(ptxas.VARIABLE)
    prepare(target)
    try:
        yield
    finally:
        if before is None:
            del os.environ[ptxas.VARIABLE]


def compile_tiles(place: Place, tiles: Any, target: str) -> Compiled:
    """Compiles one candidate; what goes wrong is its refusal."""
    found = Compiled(place, tiles, shared_bytes(place, tiles))
    usual, refusal = compile_call(place, tiles, tile_calls.TYPICAL[place.kind], target)
    if usual is None:
        return dataclasses.replace(found, refusal=refusal)
    features = tile_calls.HEAVIEST[place.kind]
    if features == tile_calls.TYPICAL[place.kind]:
        return dataclasses.replace(found, usual=usual)
    # What does not compile with all that the kind may have cannot stand for the kind.
    heaviest, refusal = compile_call(place, tiles, features, target)
    if heaviest is None:
        return dataclasses.replace(found, refusal=f"with {' '.join(features)}: {refusal}")
    return dataclasses.replace(found, usual=usual, heaviest=heaviest)


def compile_call(
    place: Place, tiles: Any, features: tuple[str, ...], target: str
) -> tuple[ptxas.Kernel | None, str | None]:
    """What ptxas says of the kernel in such a call, or None and why it does not compile."""
    shape = tile_calls.Shape(next(_BATCHES), _LENGTH, 2, 1)
    structs = tile_calls.inputs(place, shape, features)
    with ptxas.captured() as texts:
        try:
            run = tile_calls.runner(place, tiles, features)
            report = aot.analyze(run, target=target, **structs)
            # HBM is not what is asked for: a bias over many rows may be larger than it.
            refusal = None if report.compiled is not None else str(report.refusal)
        except Exception as error:  # whatever a compiler raises is one candidate's problem
            refusal = f"{type(error).__name__}: {error}"
    if refusal is not None:
        return None, " ".join(refusal.split())
    kernels = [kernel for kernel in ptxas.parse(texts[0]) if kernel.name.startswith("axattn_")]
    if len(kernels) != 1:
        return None, f"{len(kernels)} kernels in ptxas's report"
    return kernels[0], None


def tried(place: Place, most: int, target: str) -> Iterator[Compiled]:
    """Compiles candidates, those expected to be best first.

    ``most`` of them, and more until one of them `lands`.
    """
    landed = False
    for number, tiles in enumerate(tile_candidates.deepest(tile_candidates.candidates(place))):
        if number >= most and landed:
            return
        one = compile_tiles(place, tiles, target)
        landed |= one.lands
        yield one


def best(compiled: Sequence[Compiled]) -> Compiled | None:
    """The least cost; the first one (they come in the order of preference) where costs are equal.

    None where none compiles.
    """
    usable = [one for one in compiled if one.refusal is None]
    return min(usable, key=lambda one: one.cost, default=None)
