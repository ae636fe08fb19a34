"""Which block sizes of the Hopper kernels are worth trying: what fits a multiprocessor.

Two budgets bound them, and both are arithmetic. Shared memory is exact: what the kernels declare,
as Mosaic GPU lays it out. Registers are a floor, the accumulators and tiles that are alive at the
same time; what the rest of a kernel needs is for ptxas to say.

A row of the table has to hold for every call of its kind: tiles of bias and mask are counted at
their largest, a float32 bias together with a mask array.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from axattn.kernels._hopper.block_sizes import (
    KINDS,
    ForwardBlockSizes,
    KeyGradBlockSizes,
    QueryGradBlockSizes,
)
from axattn.kernels._hopper.fitting import count_flash_bytes
from axattn.kernels._hopper.primitives import ROWS, SHARED_BYTES

KERNELS = ("forward", "query_grad", "key_grad")
HEAD_SIZES = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))

# Registers per thread that a computing warpgroup can have, by the number of these. (With one and
# the producer there are more than a thread can address.)
_REGISTERS = {1: 255, 2: 240, 3: 160}
# Addresses, loop counters, vectors over rows: what no kernel was seen to do without.
_OTHER_REGISTERS = 24

# The second product of a step sums over the block, and Mosaic does that by whole swizzle atoms: 64
# elements of 16 bits are the widest, and smaller blocks have narrower ones (`declare_swizzled` in
# `primitives`).
_ATOM = 64
_BLOCKS = (32, 48, 64, 80, 96, 112, 128, 160, 176, 192, 256)


@dataclasses.dataclass(frozen=True)
class Place:
    """A row of the table: which kernel, for which kind of call and head sizes."""

    kernel: str
    kind: str
    head_dim: int
    value_head_dim: int

    @property
    def has_tiles(self) -> bool:
        """Whether such calls bring tiles of a bias and a mask over queries and keys."""
        return self.kind == "biased"

    def __str__(self) -> str:
        sizes = str(self.head_dim)
        if self.value_head_dim != self.head_dim:
            sizes += f"/{self.value_head_dim}"
        return f"{self.kernel} {self.kind} {sizes}"


def places(kernels=KERNELS, kinds=KINDS, head_sizes=HEAD_SIZES) -> Iterator[Place]:
    """All rows, the kernels' in turn."""
    for kernel, kind, sizes in itertools.product(kernels, kinds, head_sizes):
        yield Place(kernel, kind, *sizes)


def candidates(place: Place) -> list[Any]:
    """Tiles that fit shared memory and may fit the registers, those expected to be best first."""
    fitting = [
        tiles
        for tiles in _GRIDS[place.kernel](place)
        if shared_bytes(place, tiles) <= SHARED_BYTES
        and register_floor(place, tiles) + _OTHER_REGISTERS <= _REGISTERS[tiles.warpgroups]
    ]
    return sorted(fitting, key=preference, reverse=True)


def deepest(tiles: list[Any]) -> list[Any]:
    """One of those that differ in stages alone: the code is the same, but for addresses."""
    found: dict[Any, Any] = {}
    for one in tiles:
        key = tuple(v for k, v in dataclasses.asdict(one).items() if not k.endswith("stages"))
        found.setdefault(key, one)
    return list(found.values())


def preference(tiles: Any) -> tuple[int, ...]:
    """The cost model for tiles that were compiled and not timed; larger is better.

    First, whether the next keys (or queries) are loaded while these are worked on, and whether
    shared memory is read by whole swizzle atoms. Then the elements of a block's tile of scores: the
    larger, the less is read from L2 (by rows) and waited for (by columns) per element. Then the
    warpgroups, and the stages, that hide the latency of these reads.
    """
    values = dataclasses.asdict(tiles)
    columns = values.get("block_kv") or values["block_q"]
    rows = ROWS * (1 if values.get("split") else tiles.warpgroups)
    stages = [value for name, value in values.items() if name.endswith("stages")]
    whole = int(columns % _ATOM == 0)
    return int(stages[0] > 1), whole, rows * columns, tiles.warpgroups, sum(stages), *stages


def _forward(place: Place) -> Iterator[ForwardBlockSizes]:
    for block, stages, groups in itertools.product(_BLOCKS, (1, 2, 3, 4), (1, 2, 3)):
        yield ForwardBlockSizes(block, stages, groups)


def _query_grad(place: Place) -> Iterator[QueryGradBlockSizes]:
    # A key is read twice, before and after the weights; a value is free when they begin.
    for block, (key, value), groups in itertools.product(
        _BLOCKS, ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3)), (1, 2, 3)
    ):
        yield QueryGradBlockSizes(block, key, value, groups)


def _key_grad(place: Place) -> Iterator[KeyGradBlockSizes]:
    # Mosaic copies the LSE and delta of a block in units of 128 bytes: 32 rows.
    blocks = [block for block in _BLOCKS if block % 32 == 0]
    for block, stages in itertools.product(blocks, (1, 2, 3)):
        for groups, split in ((1, False), (2, False), (3, False), (2, True)):
            yield KeyGradBlockSizes(block, stages, groups, split)


_GRIDS = {"forward": _forward, "query_grad": _query_grad, "key_grad": _key_grad}


def register_floor(place: Place, tiles: Any) -> int:
    """Registers per thread of the tiles that one warpgroup has at the same time."""
    # A float32 register tile [64, n] takes n / 2 registers of each of 128 threads.
    head, value_head = place.head_dim, place.value_head_dim
    if place.kernel == "forward":
        # The output, the scores, and half of them again as weights in 16 bits.
        return (value_head + tiles.block_kv) // 2 + tiles.block_kv // 4
    if place.kernel == "query_grad":
        return head // 2 + tiles.block_kv
    if tiles.split:
        return max(head // 2 + tiles.block_q, value_head // 2 + tiles.block_q // 2)
    return (head + value_head) // 2 + tiles.block_q


def shared_bytes(place: Place, tiles: Any) -> int:
    """Shared memory of one block of work, as the compiler counts it."""
    sizes = place.head_dim, place.value_head_dim
    return count_flash_bytes(place.kernel, tiles, *sizes, score_tiles=place.has_tiles)
