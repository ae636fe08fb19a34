"""How query rows, and the values that go with each of them, lie in tiles.

A tile has ``block_q`` tokens of all G query heads of a key/value head: its row g * block_q + t is
token t of query head g.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from axattn import _quantization
from axattn.kernels._padding import pad_axis
from axattn.kernels._problem import Problem, cdiv, round_up

LANES = 128
SUBLANES = 8


class QueryTiling(Protocol):
    @property
    def problem(self) -> Problem: ...
    @property
    def block_q(self) -> int: ...


def split_into_tiles(array: jax.Array, tiling: QueryTiling, fill: float = 0) -> jax.Array:
    """Return ``[B or 1, N or 1, T, ...]`` as ``[B or 1, K or 1, tiles, G * block_q, ...]``.

    The padding after the last token is ``fill``.
    """
    problem, tiles = tiling.problem, cdiv(tiling.problem.q_len, tiling.block_q)
    batch, heads, _, *rest = array.shape
    array = pad_axis(array, tiles * tiling.block_q, fill, axis=2)
    array = array.reshape(batch, heads, tiles, tiling.block_q, *rest)
    if heads == 1:
        array = jnp.broadcast_to(array[:, :, None], (batch, 1, problem.group, *array.shape[2:]))
    else:
        array = array.reshape(batch, -1, problem.group, *array.shape[2:])
    array = array.swapaxes(2, 3)
    return array.reshape(batch, array.shape[1], tiles, problem.group * tiling.block_q, *rest)


def join_tiles(rows: jax.Array, tiling: QueryTiling) -> jax.Array:
    """Return ``[B, K, tiles, G * block_q, ...]`` as ``[B, T, N, ...]``, without the padding."""
    problem = tiling.problem
    batch, _, tiles, _, *rest = rows.shape
    rows = rows.reshape(batch, -1, tiles, problem.group, tiling.block_q, *rest)
    rows = jnp.moveaxis(rows, (1, 3), (3, 4))  # [B, tiles, block_q, K, G, ...]
    return rows.reshape(batch, -1, problem.num_heads, *rest)[:, : problem.q_len]


def transpose_to_column(row: jax.Array) -> jax.Array:
    """Return ``[..., 1, n]`` as ``[..., n, 1]``.

    Mosaic transposes whole memory tiles: eight equal rows become columns, and one is kept.
    """
    *lead, _, size = row.shape
    return jnp.swapaxes(jnp.broadcast_to(row, (*lead, SUBLANES, size)), -1, -2)[..., :1]


def count_vmem_bytes(array: Any) -> int:
    """Return the bytes of an array, or of its shape, in whole memory tiles of VMEM."""
    *lead, sublanes, lanes = array.shape
    shape = (*lead, round_up(sublanes, SUBLANES), round_up(lanes, LANES))
    return _quantization.count_bytes(jax.ShapeDtypeStruct(shape, array.dtype))
