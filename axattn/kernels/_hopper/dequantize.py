"""From a block as a cache stores it to an operand of the tensor core.

Codes become bfloat16 on the way through registers, in one step, without their scales (those belong
to scores and weights). Slots without a token may hold NaN, which a weight of zero would not stop:
in partial blocks their values become zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from axattn._stored import NEVER
from axattn._typing import present
from axattn.kernels._hopper import primitives

# Columns that pass through registers at a time.
_COLUMNS = 64


def converted(codes: Any, operand: Any, columns: range, used: jax.Array | None = None) -> None:
    """Columns of codes in shared memory as bfloat16 in other shared memory; commits nothing.

    Rows that are not ``used`` become zeros: where codes can be NaN, which integers cannot.
    """
    for part in _slices(columns):
        tile = primitives.load_codes(codes.at[:, part])
        if used is not None:
            tile = jnp.where(
                primitives.spread_over_codes(used, tile.shape), tile, jnp.zeros((), tile.dtype)
            )
        operand.at[:, part][...] = tile


def cleaned(operand: Any, used: jax.Array, columns: range) -> None:
    """Zeros in rows that are not ``used``, a bool vector over them, in place; commits nothing."""
    for part in _slices(columns):
        tile = primitives.load_operand(operand.at[:, part])
        keep = primitives.spread(used, tile.shape, 0)
        operand.at[:, part][...] = jnp.where(keep, tile, jnp.zeros((), tile.dtype))


def shares(size: int, warpgroups: int) -> list[range]:
    """Columns for each of several warpgroups, in whole swizzled groups; the first has fewest."""
    group = next(n for n in (_COLUMNS, 32, 16) if size % n == 0)
    cuts = [size // group * i // warpgroups * group for i in range(warpgroups + 1)]
    return [range(*pair) for pair in itertools.pairwise(cuts)]


def used_slots(
    gmem: Mapping[str, Any], batch: jax.Array, slot: jax.Array, block: int, *, codes: bool
) -> jax.Array:
    """Which slots of a block hold a token: a vector over the rows of its values, or their codes."""
    layout, used = (primitives.CODE_TILE if codes else primitives.REGISTER_TILE).reduce(1), None
    if "kv_lengths" in gmem:
        used = slot + primitives.index_vector(block, layout) < gmem["kv_lengths"][batch]
    if "kv_positions" in gmem:
        ref = gmem["kv_positions"]
        row = batch if ref.shape[0] > 1 else jnp.int32(0)
        held = primitives.load_as(ref.at[row, pl.ds(slot, block)], layout) < NEVER
        used = held if used is None else used & held
    return present(used)


def _slices(columns: range) -> list:
    """Columns in parts that fit registers, all of them of whole swizzled groups."""
    width = next(n for n in (_COLUMNS, 32, 16) if len(columns) % n == 0)
    return [pl.ds(first, width) for first in range(columns.start, columns.stop, width)]
