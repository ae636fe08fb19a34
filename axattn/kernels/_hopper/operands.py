"""From an AttentionCall to the arrays that the kernels read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn._mask_parts import Segments
from axattn._masks import find_kv_lengths, find_q_lengths, zero_unused
from axattn._stored import UNUSED_POSITION
from axattn._typing import present
from axattn.kernels._hopper.kv_loader import KVLoader
from axattn.kernels._hopper.primitives import round_up_length
from axattn.kernels._masks import RowBounds, compute_row_bounds, fold_key_masks, merge_dense_masks
from axattn.kernels._padding import pad_axis
from axattn.kernels._problem import round_up

# TMA needs rows that start at multiples of 16 bytes.
TMA_BYTES = 16


@dataclasses.dataclass(frozen=True)
class HopperOperands:
    """Arrays by name. Vectors over rows or keys are padded, so that whole tiles can be loaded.

    query, key, value     as in the call, T and S rounded up to 8, unused slots zeroed; of a cache,
                          what `KVLoader.select_arrays` returns
    low, high             int32 [B or 1, T']: each row attends to [low, high)
    q_positions           int32 [B or 1, T'] where ALiBi asks
    kv_positions          int32 [B or 1, S'] where they are not 0, 1, 2...
    kv_lengths            int32 [B], of a cache
    q_segments, kv_segments   int32 [B or 1, T'], [B or 1, S']
    bias                  [B or 1, N or 1, T, S]
    key_bias, row_bias    float32 [B or 1, N or 1, S'], [B or 1, N or 1, T']
    row_shift             float32 [B, N, T']: products with the center of stored keys
    allowed               int8 [B or 1, N or 1, T, S]
    sinks                 float32 [N]
    slopes                float32 [B or 1, N]
    dropout               int32 [3]: the key's words and the first row's counter
    """

    arrays: Mapping[str, jax.Array]
    call: AttentionCall  # without key masks (`fold_key_masks`)
    bounds: RowBounds

    def __contains__(self, name: str) -> bool:
        return name in self.arrays


def gather_operands(call: AttentionCall) -> HopperOperands:
    """Return what the kernels over a grid of query or key tiles read."""
    call = fold_key_masks(call)
    limits = compute_row_bounds(call)
    arrays = {"query": pad_rows(call, call.query, round_up_length(call.q_len))}
    if call.stored is None:
        arrays["key"] = _pad_keys(call, present(call.key))
        arrays["value"] = _pad_keys(call, present(call.value))
    else:
        arrays["query"] = arrays["query"].astype(call.product_dtype)
        arrays.update(KVLoader.from_call(call).select_arrays(call))
    return HopperOperands(arrays | make_score_arrays(call, limits), call, limits)


def make_score_arrays(call: AttentionCall, limits: RowBounds) -> dict[str, jax.Array]:
    """Return all but queries, keys and values; of a call without key masks (`fold_key_masks`)."""
    rows, keys = get_vector_length(call.q_len), get_vector_length(call.kv_len)
    low, high = limits
    arrays = {"high": pad_axis(high, rows, -UNUSED_POSITION)}
    if low is not None:
        arrays["low"] = pad_axis(low, rows, 0)
    if call.kv_positions is not None:
        arrays["kv_positions"] = pad_axis(call.kv_positions, keys, UNUSED_POSITION)
    if call.alibi_slopes is not None:
        arrays["slopes"] = call.alibi_slopes.astype(jnp.float32)
        arrays["q_positions"] = pad_axis(call.spans()[0].positions, rows, 0)
    for part in call.mask.parts:
        if isinstance(part, Segments):
            arrays["q_segments"] = pad_axis(part.q_ids, rows, 0)
            arrays["kv_segments"] = pad_axis(part.kv_ids, keys, 0)
    allowed = merge_dense_masks(call)
    if allowed is not None:
        shape = (*allowed.shape[:2], call.q_len, call.kv_len)
        arrays["allowed"] = align_rows(jnp.broadcast_to(allowed, shape).astype(jnp.int8))
    if call.bias is not None:
        arrays.update(_make_bias_arrays(call, rows, keys))
    if call.sinks is not None:
        arrays["sinks"] = call.sinks.astype(jnp.float32)
    if call.stored is not None and call.stored.key_center is not None:
        shift = present(call.stored.multiply_center(call.query, jnp.float32))
        shift = shift.reshape(call.batch, call.num_heads, call.q_len)
        arrays["row_shift"] = pad_axis(shift, rows, axis=-1)
    if call.dropout_key is not None:
        first = jnp.asarray(call.first_row, jnp.int32)
        words = jax.lax.bitcast_convert_type(call.dropout_key, jnp.int32)
        arrays["dropout"] = jnp.concatenate([words, first[None]])
    return arrays


def get_vector_length(length: int) -> int:
    """Return the length of a padded vector: a block of 256 may start at any of its slots."""
    return round_up(length, 8) + 256


def transpose_score_tiles(operands: HopperOperands) -> HopperOperands:
    """Return operands with ``bias`` and ``allowed`` as ``[..., S, T]``: keys as rows.

    These are copies: no load of Mosaic GPU transposes a tile on its way into registers.
    """
    arrays = dict(operands.arrays)
    for name in {"bias", "allowed"} & set(arrays):
        array = arrays[name][..., : operands.call.kv_len].swapaxes(2, 3)
        arrays[name] = align_rows(array)
    return dataclasses.replace(operands, arrays=arrays)


def _make_bias_arrays(call: AttentionCall, rows: int, keys: int) -> dict[str, jax.Array]:
    """Return the bias, as a vector where it broadcasts over rows or over keys."""
    bias = present(call.bias)
    if bias.shape[2] == 1:
        vector = jnp.broadcast_to(bias[:, :, 0], (*bias.shape[:2], call.kv_len))
        return {"key_bias": pad_axis(vector.astype(jnp.float32), keys, axis=-1)}
    if bias.shape[3] == 1:
        return {"row_bias": pad_axis(bias[..., 0].astype(jnp.float32), rows, axis=-1)}
    # TMA has no float64.
    return {"bias": align_rows(bias if bias.dtype.itemsize <= 4 else bias.astype(jnp.float32))}


def pad_rows(call: AttentionCall, array: jax.Array, length: int) -> jax.Array:
    """Return ``[B, T, N, size]`` with ``length`` rows, of which unused ones are zero."""
    slots = jnp.arange(array.shape[1])
    return pad_axis(zero_unused(array, slots, find_q_lengths(call.mask)), length)


def _pad_keys(call: AttentionCall, array: jax.Array) -> jax.Array:
    slots = jnp.arange(array.shape[1])
    return pad_axis(
        zero_unused(array, slots, find_kv_lengths(call.mask)), round_up_length(call.kv_len)
    )


def align_rows(array: jax.Array) -> jax.Array:
    """Pad the last axis of ``[..., S]``, so that TMA can address the rows."""
    return pad_axis(array, round_up(array.shape[-1], TMA_BYTES // array.dtype.itemsize), axis=-1)
