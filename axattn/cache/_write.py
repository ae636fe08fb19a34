"""Putting new tokens into the arrays of a cache, in place where they are donated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn._stored import KeyValueArrays


class Places(NamedTuple):
    """Where tokens go: token t of batch row b, for t < counts[b], to position start + t.

    Position p is slot ``p % C`` of a row of the arrays. Positions of one batch row lie in runs that
    end where C slots end; ``rows`` names the row of the arrays for each run.
    """

    start: jax.Array  # int32 [B]
    counts: jax.Array  # int32 [B]
    rows: jax.Array  # int32 [B, runs]; of a run without tokens, anything


def runs_of(tokens: int, page_size: int) -> int:
    """How many runs so many consecutive positions can touch."""
    return 1 if tokens == 1 else (tokens - 2) // page_size + 2


def write(arrays: KeyValueArrays, tokens: KeyValueArrays, places: Places) -> KeyValueArrays:
    """The arrays with the tokens in their places.

    ``tokens`` has the same entries as ``arrays``, with ``[B, T]`` where those have rows and slots:
    keys ``[B, T, K, H]``, scales ``[B, T, K]``.
    """
    # A loop of slices is in place everywhere. On GPUs it would be a kernel launch for each, and
    # there a scatter is one kernel; on TPUs a scatter into int8 copies the whole cache.
    on_gpu = _slices if arrays.keys.dtype == jnp.int4 else _scatter  # not two threads to a byte
    return lax.platform_dependent(
        arrays,
        tokens,
        places,
        cuda=on_gpu,
        rocm=on_gpu,
        tpu=functools.partial(_slices, unit_of=_tpu_unit),
        default=_slices,
    )


def _tpu_unit(array: jax.Array) -> int:
    """How many slots of ``array`` a TPU can only write together, in place.

    Rows wider than its 128 lanes are laid out in whole tiles of bytes, and a slice that begins
    inside a tile has the array copied into another layout and back.
    """
    tile = 64 if array.dtype == jnp.int4 else 32 if array.dtype.itemsize == 1 else 1
    wide = array.ndim == 4 and array.shape[3] > 128
    return tile if wide and array.shape[2] % tile == 0 else 1


def _scatter(arrays: KeyValueArrays, tokens: KeyValueArrays, places: Places) -> KeyValueArrays:
    num_rows, _, page_size = arrays.keys.shape[:3]
    order = jnp.arange(tokens.keys.shape[1], dtype=jnp.int32)[None]
    positions = places.start[:, None] + order
    run = positions // page_size - (places.start // page_size)[:, None]
    rows = jnp.take_along_axis(
        places.rows, jnp.clip(run, 0, places.rows.shape[1] - 1), axis=1, mode="clip"
    )
    rows = jnp.where(order < places.counts[:, None], rows, num_rows)  # out of bounds: dropped
    slots = positions % page_size

    def put(array, new):
        return array.at[rows, :, slots].set(new, mode="drop", unique_indices=True)

    return jax.tree.map(put, arrays, tokens)


def _slices(
    arrays: KeyValueArrays,
    tokens: KeyValueArrays,
    places: Places,
    unit_of: Callable[[jax.Array], int] = lambda array: 1,
) -> KeyValueArrays:
    num_rows, _, page_size = arrays.keys.shape[:3]
    batch, length = tokens.keys.shape[:2]
    runs = places.rows.shape[1]
    tokens = jax.tree.map(lambda new: new.swapaxes(1, 2), tokens)  # [B, K, T, ...]

    def put_run(i, arrays):
        b, r = i // runs, i % runs
        start, count = places.start[b], places.counts[b]
        row = jnp.clip(places.rows[b, r], 0, num_rows - 1)
        origin = (start // page_size + r) * page_size  # the position of slot 0 of this run

        def put(array, new):
            # A window of whole units is read, given the tokens that belong there, and written.
            unit, (_, heads, _, *rest) = unit_of(array), array.shape
            units = page_size // unit
            width = min(runs_of(length, unit), units)
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

        return jax.tree.map(put, arrays, tokens)

    return lax.fori_loop(0, batch * runs, put_run, arrays)
