"""Block sizes of the kernels: what they are, and the table that says which to take.

`block_sizes.json` has a row per kernel, head sizes and kind of call, and says where each came from:
measured on a device (`benchmarks/tune_hopper.py` writes those), or compiled only. Decode kernels
need no table: they have as many blocks in flight as shared memory holds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

from axattn._call import AttentionCall
from axattn.kernels._hopper.primitives import ROWS
from axattn.kernels._masks import list_dense_masks

# Consumer warpgroups of the MLA kernel: the first one has the scores, both have half of the values.
MLA_WARPGROUPS = 2


@dataclasses.dataclass(frozen=True)
class ForwardBlockSizes:
    """Keys per block, blocks in flight, and warpgroups of 64 query rows (two alternate)."""

    block_kv: int
    stages: int
    warpgroups: int = 2

    def __post_init__(self):
        _check_block_sizes(self, block=("block_kv", 16))


@dataclasses.dataclass(frozen=True)
class QueryGradBlockSizes:
    """Keys per block, blocks of keys and of values in flight, warpgroups of 64 query rows."""

    block_kv: int
    key_stages: int
    value_stages: int
    warpgroups: int = 2

    def __post_init__(self):
        _check_block_sizes(self, block=("block_kv", 16))


@dataclasses.dataclass(frozen=True)
class KeyGradBlockSizes:
    """Query rows per block, blocks in flight, warpgroups of 64 keys.

    ``split``: two warpgroups share 64 keys, one has their gradient and one that of the values.
    """

    block_q: int
    stages: int
    warpgroups: int = 2
    split: bool = False

    def __post_init__(self):
        _check_block_sizes(self, block=("block_q", 32))  # TMA copies 128 bytes of the LSE at a time
        if self.split and self.warpgroups != 2:
            raise ValueError(f"split takes 2 warpgroups, got {self.warpgroups}")

    @property
    def key_tiles(self) -> int:
        """Tiles of 64 keys in a program."""
        return 1 if self.split else self.warpgroups


@dataclasses.dataclass(frozen=True)
class BackwardBlockSizes:
    """Block sizes of both gradient kernels."""

    query: QueryGradBlockSizes
    key: KeyGradBlockSizes


@dataclasses.dataclass(frozen=True)
class DecodeBlockSizes:
    """Keys per block, blocks in flight, and warpgroups that take turns."""

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
class MLABlockSizes:
    """Keys per block, and blocks in flight."""

    block_kv: int
    stages: int

    @property
    def warpgroups(self) -> int:
        return MLA_WARPGROUPS


BLOCK_SIZES = {
    "forward": ForwardBlockSizes,
    "query_grad": QueryGradBlockSizes,
    "key_grad": KeyGradBlockSizes,
}

# Kinds of calls, from the one that needs least shared memory and registers to the one with most.
KINDS = (
    "full",  # no mask
    "masked",  # causal, windows, lengths, segments; sinks too
    "capped",  # a soft cap besides
    "general",  # dropout, ALiBi or a bias that is a vector, with all of the above
    "biased",  # a bias or a mask over [T, S], with all of the above
)


def classify_call(call: AttentionCall) -> str:
    """Return one of `KINDS`."""
    if list_dense_masks(call) or (call.bias is not None and 1 not in call.bias.shape[2:]):
        return "biased"
    if call.dropout_key is not None or call.alibi_slopes is not None or call.bias is not None:
        return "general"
    if call.logits_soft_cap is not None:
        return "capped"
    return "masked" if call.mask.parts or call.kv_positions is not None else "full"


@functools.cache
def load_table() -> dict[str, Any]:
    """Load ``block_sizes.json``: ``rows``, and under ``provenance`` where they come from."""
    text = resources.files("axattn.kernels._hopper").joinpath("block_sizes.json").read_text()
    return json.loads(text)


def find_row(kernel: str, call: AttentionCall) -> Any:
    """Return the block sizes in the table for the smallest head sizes that hold the call's."""
    wanted = classify_call(call)
    fitting = [
        row
        for row in load_table()["rows"]
        if row["kernel"] == kernel
        and row["kind"] == wanted
        and row["head_dim"] >= call.head_dim
        and row["value_head_dim"] >= call.value_head_dim
    ]
    row = min(fitting, key=lambda row: (row["head_dim"], row["value_head_dim"]))
    return BLOCK_SIZES[kernel](**row["block_sizes"])


def _check_block_sizes(sizes: Any, *, block: tuple[str, int]) -> None:
    name, unit = block
    value = getattr(sizes, name)
    if not unit <= value <= 256 or value % unit:
        raise ValueError(f"{name} takes a multiple of {unit} from {unit} to 256, got {value}")
    for field in dataclasses.fields(sizes):
        value = getattr(sizes, field.name)
        if field.name.endswith("stages") and value < 1:
            raise ValueError(f"{field.name} takes an int >= 1, got {value}")
    if not 1 <= sizes.warpgroups <= 3:
        raise ValueError(f"warpgroups takes 1, 2 or 3 (of {ROWS} rows), got {sizes.warpgroups}")
