"""Block sizes of the decode kernels: as much in flight as shared memory holds."""

from __future__ import annotations

import dataclasses

from axattn._call import AttentionCall
from axattn.kernels._hopper import memory
from axattn.kernels._hopper.kv_loader import Source
from axattn.kernels._masks import has_dense_mask

# Rows that a warpgroup cleans or converts at a time, and a score tile's columns.
BLOCK_KV = 64

# Of the latent kernel: the first has the scores, too; both have half of the values.
WARPGROUPS = 2

# More in flight than this hides no more latency.
_MOST_STAGES = 8


@dataclasses.dataclass(frozen=True)
class DecodeTiles:
    """Keys per block, blocks in flight, and warpgroups that take turns at them."""

    block_kv: int
    stages: int
    warpgroups: int = 2

    def __post_init__(self):
        if self.block_kv % 64 or self.block_kv <= 0:
            raise ValueError(f"block_kv takes a multiple of 64, got {self.block_kv}")
        if self.stages < 1 or self.stages % self.warpgroups:
            raise ValueError(
                f"stages takes a multiple of warpgroups, {self.warpgroups}, got {self.stages}"
            )


@dataclasses.dataclass(frozen=True)
class LatentTiles:
    """Keys per block, and blocks in flight."""

    block_kv: int
    stages: int

    @property
    def warpgroups(self) -> int:
        return WARPGROUPS


def decode_tiles(call: AttentionCall) -> DecodeTiles:
    """The most blocks in flight; one warpgroup where two leave no room."""
    choices = [DecodeTiles(BLOCK_KV, stages, 2) for stages in range(_MOST_STAGES, 0, -2)]
    choices += [DecodeTiles(BLOCK_KV, stages, 1) for stages in (3, 2, 1)]
    return _first_that_fits(call, choices, memory.decode_bytes)


def latent_tiles(call: AttentionCall) -> LatentTiles:
    choices = [LatentTiles(BLOCK_KV, stages) for stages in range(_MOST_STAGES // 2, 0, -1)]
    return _first_that_fits(call, choices, memory.latent_bytes)


def _first_that_fits(call: AttentionCall, choices, bytes_of):
    """The first choice that shared memory holds, or else the last."""
    source = Source.of(call)
    sizes = call.head_dim, call.value_head_dim
    tile_bytes = 0
    if call.bias is not None:
        # In 4 bytes, also where a bias per head and key becomes one over rows and keys.
        tile_bytes += 4
    if has_dense_mask(call):
        tile_bytes += 1
    fitting = (
        tiles
        for tiles in choices
        if bytes_of(tiles, source, *sizes, tile_bytes) <= memory.SHARED_BYTES
    )
    return next(fitting, choices[-1])
