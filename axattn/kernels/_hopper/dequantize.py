"""From a block as a cache stores it to an operand of the tensor core.

Codes become bfloat16 on the way through registers, without their scales, which scores and weights
are multiplied with. Unused slots may hold NaN, which a weight of zero would not stop: in partial
blocks their values become zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from axattn._stored import UNUSED_POSITION
from axattn._typing import present
from axattn.kernels._hopper.primitives import (
    CODE_TILE,
    REGISTER_TILE,
    broadcast_over_codes,
    broadcast_vector,
    load_codes,
    load_in_layout,
    load_swizzled,
    make_index_vector,
)

# Columns that pass through registers at a time.
_COLUMNS = 64


def convert_codes(codes: Any, operand: Any, columns: range, used: jax.Array | None = None) -> None:
    """Write columns of codes as bfloat16 to other shared memory; the caller commits.

    Rows that are not ``used`` become zeros, where codes can be NaN (integers cannot).
    """
    for part in _split_columns(columns):
        tile = load_codes(codes.at[:, part])
        if used is not None:
            tile = jnp.where(
                broadcast_over_codes(used, tile.shape), tile, jnp.zeros((), tile.dtype)
            )
        operand.at[:, part][...] = tile


def zero_unused_rows(operand: Any, used: jax.Array, columns: range) -> None:
    """Zero rows in place that are not ``used``, a bool vector over them; the caller commits."""
    for part in _split_columns(columns):
        tile = load_swizzled(operand.at[:, part])
        keep = broadcast_vector(used, tile.shape, 0)
        operand.at[:, part][...] = jnp.where(keep, tile, jnp.zeros((), tile.dtype))


def share_columns(size: int, warpgroups: int) -> list[range]:
    """Return columns for each warpgroup, in whole swizzled groups; the first one has fewest."""
    group = next(n for n in (_COLUMNS, 32, 16) if size % n == 0)
    borders = [size // group * i // warpgroups * group for i in range(warpgroups + 1)]
    return [range(*pair) for pair in itertools.pairwise(borders)]


def find_used_slots(
    gmem: Mapping[str, Any], batch: jax.Array, slot: jax.Array, block: int, *, codes: bool
) -> jax.Array:
    """Return which slots of a block hold a token: a vector over the rows of values or of codes."""
    layout, used = (CODE_TILE if codes else REGISTER_TILE).reduce(1), None
    if "kv_lengths" in gmem:
        used = slot + make_index_vector(block, layout) < gmem["kv_lengths"][batch]
    if "kv_positions" in gmem:
        ref = gmem["kv_positions"]
        row = batch if ref.shape[0] > 1 else jnp.int32(0)
        has_token = load_in_layout(ref.at[row, pl.ds(slot, block)], layout) < UNUSED_POSITION
        used = has_token if used is None else used & has_token
    return present(used)


def _split_columns(columns: range) -> list:
    """Return columns in parts that fit registers, all of them of whole swizzled groups."""
    width = next(n for n in (_COLUMNS, 32, 16) if len(columns) % n == 0)
    return [pl.ds(first, width) for first in range(columns.start, columns.stop, width)]
