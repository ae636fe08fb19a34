"""From an AttentionCall to the blocks that the grid kernels read.

Queries and what comes back stay as they are: ``[B, T, N, H]`` where they are just there, and a step
has whole tiles of 8 heads; ``[B, N, T, H]`` where a program's products write and read them, which
XLA on TPUs does heads first at no cost. Keys and values, which a group shares, are the small
things: they are copied once to ``[B, K, S, H]`` with S in whole blocks and unused slots zeroed.
Vectors over query rows are laid out as the rows of a tile are, ``[B, K, tiles, 1, rows]``, vectors
over keys as ``[B, N or 1, blocks, 1, block]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from axattn._call import AttentionCall
from axattn._mask_parts import Segments
from axattn._masks import zero_unused
from axattn._stored import NEVER
from axattn._typing import present
from axattn.kernels import _masks
from axattn.kernels._padding import padded
from axattn.kernels._tpu.flash import grid as cuts
from axattn.kernels._tpu.flash.grid import Cut, Place
from axattn.kernels._tpu.layout import by_tile, by_token


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array and the block of it that a step has; None: it stays in HBM."""

    array: jax.Array | jax.ShapeDtypeStruct
    block: tuple[int, ...] | None
    index: Callable[[Place], tuple] | None

    def spec(self, cut: Cut) -> pl.BlockSpec:
        if self.block is None:
            return pl.BlockSpec(memory_space=pl.ANY)
        return cuts.spec(cut, self.block, self.index)


def of(call: AttentionCall, cut: Cut) -> dict[str, Operand]:
    """What every kernel reads, of a call without key masks (`masks.fold_key_masks`).

    query                  [B, T, N, H]
    key, value             [B, K, S', H], [B, K, S', h]
    low, high              int32 over rows: each attends to positions in [low, high)
    q_positions, kv_positions   int32 over rows and over keys where they are needed
    q_segments, kv_segments     int32 over rows and over keys
    row_bias, key_bias, slopes  float32
    dropout_rows           int32 over rows: the first counter of each
    bias, allowed          [B or 1, N or 1, T, S]; int8 where it is a mask
    """
    found = {"query": of_queries(cut, call.query)}
    for name, array in (("key", present(call.key)), ("value", present(call.value))):
        found[name] = of_keys_and_values(cut, stored_keys(call, cut, array))
    low, high = _masks.bounds(call)
    found["high"] = over_rows(cut, high[:, None], -NEVER)
    if low is not None:
        found["low"] = over_rows(cut, low[:, None], 0)
    if call.kv_positions is not None:
        found["kv_positions"] = over_keys(cut, call.kv_positions[:, None], NEVER)
    for part in call.mask.parts:
        if isinstance(part, Segments):
            found["q_segments"] = over_rows(cut, part.q_ids[:, None], 0)
            found["kv_segments"] = over_keys(cut, part.kv_ids[:, None], 0)
    if call.alibi_slopes is not None:
        positions = call.spans()[0].positions
        found["q_positions"] = over_rows(cut, positions[:, None], 0)
        found["slopes"] = over_rows(cut, call.alibi_slopes.astype(jnp.float32)[:, :, None])
    if call.dropout_key is not None:
        found["dropout_rows"] = over_rows(cut, dropout_rows(call))
    allowed = _masks.dense_mask(call)
    if allowed is not None:
        shape = (*allowed.shape[:2], call.q_len, call.kv_len)
        found["allowed"] = over_both(cut, jnp.broadcast_to(allowed, shape).astype(jnp.int8))
    return found | _biases(call, cut)


def _biases(call: AttentionCall, cut: Cut) -> dict[str, Operand]:
    """The bias, as a vector where it broadcasts over rows or over keys."""
    bias = call.bias
    if bias is None:
        return {}
    if bias.shape[2] == 1:
        return {"key_bias": over_keys(cut, bias[:, :, 0].astype(jnp.float32))}
    if bias.shape[3] == 1:
        return {"row_bias": over_rows(cut, bias[..., 0].astype(jnp.float32))}
    return {"bias": over_both(cut, bias)}


def dropout_rows(call: AttentionCall) -> jax.Array:
    """The row that each score's counter begins with, int32 ``[B or 1, N or 1, T]``."""
    slots = jnp.arange(call.q_len, dtype=jnp.int32)[None, None]
    if call.broadcast_dropout:
        return slots
    batch = jnp.arange(call.batch, dtype=jnp.int32) + jnp.asarray(call.first_row, jnp.int32)
    rows = batch[:, None] * call.num_heads + jnp.arange(call.num_heads, dtype=jnp.int32)[None]
    return rows[..., None] * call.q_len + slots


def stored_keys(call: AttentionCall, cut: Cut, array: jax.Array) -> jax.Array:
    """``[B, S, K, size]`` head by head, in whole blocks, unused slots zeroed: one copy."""
    clean = zero_unused(array, jnp.arange(call.kv_len, dtype=jnp.int32), call.mask.kv_lengths())
    if clean.shape[2] == 1:
        by_head = clean.reshape(clean.shape[0], 1, clean.shape[1], clean.shape[3])
    else:
        by_head = clean.swapaxes(1, 2)
    return padded(by_head, cut.num_kv * cut.block_kv, axis=2)


def clean_queries(call: AttentionCall, array: jax.Array) -> jax.Array:
    """``[B, T, N, size]`` with the rows behind the queries' lengths zeroed."""
    return zero_unused(array, jnp.arange(call.q_len, dtype=jnp.int32), call.mask.q_lengths())


def of_queries(cut: Cut, array: jax.Array) -> Operand:
    """``[B, T, N, size]``."""
    return _over_queries(cut, array.swapaxes(1, 2) if cut.heads_first else array)


def result_of_queries(cut: Cut, size: int, dtype: Any) -> Operand:
    """A result that `as_queries` makes ``[B, T, N, size]`` of."""
    tokens, heads = cut.problem.q_len, cut.problem.num_heads
    middle = (heads, tokens) if cut.heads_first else (tokens, heads)
    shape = (cut.problem.batch, *middle, size)
    return _over_queries(cut, jax.ShapeDtypeStruct(shape, dtype))


def as_queries(cut: Cut, result: jax.Array) -> jax.Array:
    return result.swapaxes(1, 2) if cut.heads_first else result


def _over_queries(cut: Cut, array: Any) -> Operand:
    size = array.shape[-1]
    if cut.heads_first:
        block = (1, cut.heads, cut.block_q, size)
        return Operand(array, block, lambda at: (at.batch, at.heads, at.q, 0))
    block = (1, cut.block_q, cut.heads, size)
    return Operand(array, block, lambda at: (at.batch, at.q, at.heads, 0))


def of_keys_and_values(cut: Cut, array: jax.Array | jax.ShapeDtypeStruct) -> Operand:
    """``[B, K, S', size]``."""
    block = (1, cut.kv_heads, cut.block_kv, array.shape[-1])
    return Operand(array, block, lambda at: (at.batch, at.heads, at.kv, 0))


def over_rows(cut: Cut, vector: jax.Array, fill: float = 0) -> Operand:
    """A vector ``[B or 1, N or 1, T or 1]``; ``fill`` stands behind the last row."""
    vector = jnp.broadcast_to(vector, (*vector.shape[:2], cut.problem.q_len))
    array = by_tile(vector, cut, fill)[:, :, :, None]
    return of_row_vectors(cut, array)


def of_row_vectors(cut: Cut, array: Any) -> Operand:
    """``[B or 1, K or 1, tiles, 1, rows]``."""
    own = array.shape[1] > 1 or cut.problem.num_kv_heads == 1
    block = (1, cut.kv_heads if own else 1, 1, 1, cut.rows)
    batched = array.shape[0] > 1
    return Operand(
        array,
        block,
        lambda at: (at.batch if batched else 0, at.heads if own else 0, at.q, 0, 0),
    )


def rows_apart(cut: Cut, array: jax.Array) -> jax.Array:
    """``[B, K, tiles, 1, rows]`` as ``[B, T, N]``."""
    return by_token(array[:, :, :, 0], cut)


def over_keys(cut: Cut, vector: jax.Array, fill: float = 0) -> Operand:
    """A vector ``[B or 1, N or 1, S or 1]``; ``fill`` stands behind the last key."""
    vector = jnp.broadcast_to(vector, (*vector.shape[:2], cut.problem.kv_len))
    array = padded(vector, cut.num_kv * cut.block_kv, fill, axis=2)
    array = array.reshape(*array.shape[:2], cut.num_kv, 1, cut.block_kv)
    batched, own = (size > 1 for size in array.shape[:2])
    block = (1, cut.heads if own else 1, 1, 1, cut.block_kv)
    return Operand(
        array,
        block,
        lambda at: (at.batch if batched else 0, at.heads if own else 0, at.kv, 0, 0),
    )


def over_both(cut: Cut, array: jax.Array) -> Operand:
    """A tile ``[B or 1, N or 1, T, S]``."""
    batched, own = (size > 1 for size in array.shape[:2])
    block = (1, cut.heads if own else 1, cut.block_q, cut.block_kv)
    return Operand(
        array,
        block,
        lambda at: (at.batch if batched else 0, at.heads if own else 0, at.q, at.kv),
    )
