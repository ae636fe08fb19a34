"""How query rows, and what goes with each of them, lie in tiles.

A tile has ``block_q`` tokens of all G query heads of a group: its row g * block_q + t is token t of
the group's head g.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from axattn.kernels._padding import padded
from axattn.kernels._problem import Problem, cdiv

LANES = 128
SUBLANES = 8


class Cut(Protocol):
    @property
    def problem(self) -> Problem: ...
    @property
    def block_q(self) -> int: ...


def by_tile(array: jax.Array, cut: Cut, fill: float = 0) -> jax.Array:
    """``[B or 1, N or 1, T, ...]`` as ``[B or 1, K or 1, tiles, G * block_q, ...]``.

    ``fill`` stands behind the last token.
    """
    problem, tiles = cut.problem, cdiv(cut.problem.q_len, cut.block_q)
    batch, heads, _, *rest = array.shape
    array = padded(array, tiles * cut.block_q, fill, axis=2)
    array = array.reshape(batch, heads, tiles, cut.block_q, *rest)
    if heads == 1:
        array = jnp.broadcast_to(array[:, :, None], (batch, 1, problem.group, *array.shape[2:]))
    else:
        array = array.reshape(batch, -1, problem.group, *array.shape[2:])
    array = array.swapaxes(2, 3)
    return array.reshape(batch, array.shape[1], tiles, problem.group * cut.block_q, *rest)


def by_token(rows: jax.Array, cut: Cut) -> jax.Array:
    """``[B, K, tiles, G * block_q, ...]`` as ``[B, T, N, ...]``."""
    problem = cut.problem
    batch, _, tiles, _, *rest = rows.shape
    rows = rows.reshape(batch, -1, tiles, problem.group, cut.block_q, *rest)
    rows = jnp.moveaxis(rows, (1, 3), (3, 4))  # [B, tiles, block_q, K, G, ...]
    return rows.reshape(batch, -1, problem.num_heads, *rest)[:, : problem.q_len]


def column(row: jax.Array) -> jax.Array:
    """``[..., 1, n]`` as ``[..., n, 1]``, in a kernel: turns whole tiles and keeps one column."""
    *lead, _, size = row.shape
    return jnp.swapaxes(jnp.broadcast_to(row, (*lead, SUBLANES, size)), -1, -2)[..., :1]
