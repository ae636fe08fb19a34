"""Write new tokens into the arrays of a cache, in place if they are donated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn._stored import KeyValueArrays


class SlotMapping(NamedTuple):
    """The slots of new tokens: token t of batch row b, t < counts[b], has position start + t.

    Position p is slot ``p % C`` of a row of the arrays, C its number of slots. The positions of a
    batch row form runs, each within one row of the arrays; ``rows`` has that row for each run.
    """

    start: jax.Array  # int32 [B]
    counts: jax.Array  # int32 [B]
    rows: jax.Array  # int32 [B, runs]; anything for a run without tokens


def count_runs(tokens: int, page_size: int) -> int:
    """Return how many runs that many consecutive positions can touch."""
    return 1 if tokens == 1 else (tokens - 2) // page_size + 2


def write_tokens(
    arrays: KeyValueArrays, tokens: KeyValueArrays, mapping: SlotMapping
) -> KeyValueArrays:
    """Return the arrays with the tokens in their slots.

    ``tokens`` has the same entries as ``arrays``: keys ``[B, T, K, H]``, scales ``[B, T, K]``.
    """
    # A loop of slices is in place everywhere, but launches a kernel for each on GPUs. There a
    # scatter is one kernel; on TPUs a scatter into int8 copies the whole cache.
    # (Not into int4: threads of a scatter would share a byte.)
    on_gpu = _update_slices if arrays.keys.dtype == jnp.int4 else _scatter_tokens
    return lax.platform_dependent(
        arrays,
        tokens,
        mapping,
        cuda=on_gpu,
        rocm=on_gpu,
        tpu=functools.partial(_update_slices, get_unit=_get_tpu_unit),
        default=_update_slices,
    )


def _get_tpu_unit(array: jax.Array) -> int:
    """Return how many slots of ``array`` a TPU has to write together to stay in place.

    Vectors wider than 128 lanes are stored in whole tiles. For a slice that begins inside a tile,
    XLA copies the array into another layout and back.
    """
    tile = 64 if array.dtype == jnp.int4 else 32 if array.dtype.itemsize == 1 else 1
    wide = array.ndim == 4 and array.shape[3] > 128
    return tile if wide and array.shape[2] % tile == 0 else 1


def _scatter_tokens(
    arrays: KeyValueArrays, tokens: KeyValueArrays, mapping: SlotMapping
) -> KeyValueArrays:
    num_rows, _, page_size = arrays.keys.shape[:3]
    order = jnp.arange(tokens.keys.shape[1], dtype=jnp.int32)[None]
    positions = mapping.start[:, None] + order
    run = positions // page_size - (mapping.start // page_size)[:, None]
    rows = jnp.take_along_axis(
        mapping.rows, jnp.clip(run, 0, mapping.rows.shape[1] - 1), axis=1, mode="clip"
    )
    rows = jnp.where(order < mapping.counts[:, None], rows, num_rows)  # out of bounds: dropped
    slots = positions % page_size

    def write_array(array, new):
        return array.at[rows, :, slots].set(new, mode="drop", unique_indices=True)

    return jax.tree.map(write_array, arrays, tokens)


def _update_slices(
    arrays: KeyValueArrays,
    tokens: KeyValueArrays,
    mapping: SlotMapping,
    get_unit: Callable[[jax.Array], int] = lambda array: 1,
) -> KeyValueArrays:
    num_rows, _, page_size = arrays.keys.shape[:3]
    batch, length = tokens.keys.shape[:2]
    runs = mapping.rows.shape[1]
    tokens = jax.tree.map(lambda new: new.swapaxes(1, 2), tokens)  # [B, K, T, ...]

    def write_run(i, arrays):
        b, r = i // runs, i % runs
        start, count = mapping.start[b], mapping.counts[b]
        row = jnp.clip(mapping.rows[b, r], 0, num_rows - 1)
        origin = (start // page_size + r) * page_size  # the position of slot 0 of this run

        def write_array(array, new):
            # Read a window of whole units, replace the slots of the new tokens, and write it.
            unit, (_, heads, _, *rest) = get_unit(array), array.shape
            units = page_size // unit
            width = min(count_runs(length, unit), units)
            first = jnp.clip((start - origin) // unit, 0, units - width)
            order = origin + first * unit - start + jnp.arange(width * unit, dtype=jnp.int32)
            fresh = ((order >= 0) & (order < count)).reshape(1, 1, -1, *(1 for _ in rest))
            new = jnp.take(lax.dynamic_slice_in_dim(new, b, 1, 0), order, axis=2, mode="clip")

            inner = (unit, *rest) if unit > 1 else tuple(rest)
            tiled = array.reshape(num_rows, heads, units, *inner)
            at = tuple(jnp.asarray(n, jnp.int32) for n in (row, 0, first, *(0 for _ in inner)))
            window = lax.dynamic_slice(tiled, at, (1, heads, width, *inner))
            window = jnp.where(fresh, new, window.reshape(new.shape)).reshape(window.shape)
            return lax.dynamic_update_slice(tiled, window, at).reshape(array.shape)

        return jax.tree.map(write_array, arrays, tokens)

    return lax.fori_loop(0, batch * runs, write_run, arrays)
