"""Block sizes of the kernels: what they are, and the table that says which to take.

`block_sizes.json` has a row per kernel, head sizes and kind of call, and says where each came from:
measured on a device (`benchmarks/tune_hopper.py` writes those), or compiled only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

from axattn._call import AttentionCall
from axattn.kernels._hopper.kv_loader import Source
from axattn.kernels._hopper.memory import SHARED_BYTES, cache_bytes, shared_bytes
from axattn.kernels._hopper.rows import ROWS
from axattn.kernels._masks import has_dense_mask


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Keys per block, blocks in flight, and warpgroups of 64 query rows (two take turns)."""

    block_kv: int
    stages: int
    warpgroups: int = 2

    def __post_init__(self):
        _check(self, block=("block_kv", 16))


@dataclasses.dataclass(frozen=True)
class QueryGradTiles:
    """Keys per block, blocks of keys and of values in flight, warpgroups of 64 query rows."""

    block_kv: int
    key_stages: int
    value_stages: int
    warpgroups: int = 2

    def __post_init__(self):
        _check(self, block=("block_kv", 16))


@dataclasses.dataclass(frozen=True)
class KeyGradTiles:
    """Query rows per block, blocks in flight, warpgroups of 64 keys.

    ``split``: two warpgroups share 64 keys, one has their gradient and one that of the values.
    """

    block_q: int
    stages: int
    warpgroups: int = 2
    split: bool = False

    def __post_init__(self):
        _check(self, block=("block_q", 32))  # TMA copies 128 bytes of the LSE at a time
        if self.split and self.warpgroups != 2:
            raise ValueError(f"split takes 2 warpgroups, got {self.warpgroups}")


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    query: QueryGradTiles
    key: KeyGradTiles


TILES = {"forward": ForwardTiles, "query_grad": QueryGradTiles, "key_grad": KeyGradTiles}

# What a call is to the kernels, from the one that needs least of shared memory and registers.
KINDS = (
    "full",  # no mask
    "masked",  # causal, windows, lengths, segments; sinks too
    "capped",  # a soft cap besides
    "general",  # dropout, ALiBi or a bias that is a vector, with all of the above
    "biased",  # a bias or a mask over [T, S], with all of the above
)


def kind(call: AttentionCall) -> str:
    if has_dense_mask(call) or (call.bias is not None and 1 not in call.bias.shape[2:]):
        return "biased"
    if call.dropout_key is not None or call.alibi_slopes is not None or call.bias is not None:
        return "general"
    if call.logits_soft_cap is not None:
        return "capped"
    return "masked" if call.mask.parts or call.kv_positions is not None else "full"


def forward_tiles(call: AttentionCall) -> ForwardTiles:
    tiles = _choose("forward", call)
    return tiles if call.stored is None else _fit_cache(tiles, call)


def backward_tiles(call: AttentionCall) -> BackwardTiles:
    return BackwardTiles(_choose("query_grad", call), _choose("key_grad", call))


def _choose(kernel: str, call: AttentionCall) -> Any:
    """The row of the smallest head sizes that hold the call's."""
    wanted = kind(call)
    fitting = [
        row
        for row in table()["rows"]
        if row["kernel"] == kernel
        and row["kind"] == wanted
        and row["head_dim"] >= call.head_dim
        and row["value_head_dim"] >= call.value_head_dim
    ]
    row = min(fitting, key=lambda row: (row["head_dim"], row["value_head_dim"]))
    tiles = TILES[kernel](**row["tiles"])
    return fit(kernel, tiles, call.head_dim, call.value_head_dim, score_tiles=wanted == "biased")


def fit(kernel: str, tiles: Any, head_dim: int, value_head_dim: int, *, score_tiles: bool) -> Any:
    """The tiles, or smaller ones where they do not fit shared memory.

    Those of the table fit their own head sizes. Where H and h are not those, the forward kernel has
    a buffer more.
    """
    sizes = (head_dim, value_head_dim)
    while shared_bytes(kernel, tiles, *sizes, score_tiles=score_tiles) > SHARED_BYTES:
        values = dataclasses.asdict(tiles)
        stages = {k: v for k, v in values.items() if k.endswith("stages") and v > 1}
        if stages:
            name = max(stages, key=stages.__getitem__)
            tiles = dataclasses.replace(tiles, **{name: stages[name] - 1})
        else:
            (name,) = (name for name in values if name.startswith("block"))
            tiles = dataclasses.replace(tiles, **{name: values[name] // 2})
    return tiles


def _fit_cache(tiles: ForwardTiles, call: AttentionCall) -> ForwardTiles:
    """The tiles for a cache, whose blocks are cleaned and converted 64 rows at a time."""
    source, sizes = Source.of(call), (call.head_dim, call.value_head_dim)
    score_tiles = kind(call) == "biased"
    # Converting 128 keys at a time takes more registers than there are.
    blocks = [
        n for n in (tiles.block_kv, ROWS) if n % ROWS == 0 and not (source.scaled and n > ROWS)
    ]
    choices = [
        dataclasses.replace(tiles, block_kv=block, stages=stages)
        for block in dict.fromkeys(blocks)
        for stages in range(max(tiles.stages, 2), 0, -1)
    ]
    fitting = (
        tiles
        for tiles in choices
        if cache_bytes(tiles, source, *sizes, score_tiles=score_tiles) <= SHARED_BYTES
    )
    return next(fitting, choices[-1])


@functools.cache
def table() -> dict[str, Any]:
    """``block_sizes.json``: ``rows``, and under ``provenance`` where they come from."""
    text = resources.files("axattn.kernels._hopper").joinpath("block_sizes.json").read_text()
    return json.loads(text)


def _check(tiles: Any, *, block: tuple[str, int]) -> None:
    name, unit = block
    value = getattr(tiles, name)
    if not unit <= value <= 256 or value % unit:
        raise ValueError(f"{name} takes a multiple of {unit} from {unit} to 256, got {value}")
    for field in dataclasses.fields(tiles):
        value = getattr(tiles, field.name)
        if field.name.endswith("stages") and value < 1:
            raise ValueError(f"{field.name} takes an int >= 1, got {value}")
    if not 1 <= tiles.warpgroups <= 3:
        raise ValueError(f"warpgroups takes 1, 2 or 3 (of {ROWS} rows), got {tiles.warpgroups}")
