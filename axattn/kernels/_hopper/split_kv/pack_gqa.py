"""Few query tokens: all rows that read a key/value head, packed into tiles of 64.

Row r of a head's tile is query token r // G of group member r % G, so that one token per sequence
lies in HBM as its packed rows already do.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn.kernels import _masks
from axattn.kernels._hopper import operands
from axattn.kernels._hopper.kv_loader import Source
from axattn.kernels._hopper.operands import Operands
from axattn.kernels._hopper.rows import ROW_GROUP, ROWS
from axattn.kernels._padding import padded
from axattn.kernels._problem import cdiv, round_up


@dataclasses.dataclass(frozen=True)
class Packing:
    """Rows of one key/value head: G heads by T tokens."""

    group: int
    q_len: int

    @property
    def rows(self) -> int:
        return self.group * self.q_len

    @property
    def tiles(self) -> int:
        return cdiv(self.rows, ROWS)

    @property
    def stored_rows(self) -> int:
        """Rows in HBM: TMA copies groups of them, and whole tiles where there are several."""
        return round_up(self.rows, ROW_GROUP if self.tiles == 1 else ROWS)

    @property
    def copied_rows(self) -> int:
        """Rows of a tile in HBM."""
        return min(self.stored_rows, ROWS)

    # ---- arrays -------------------------------------------------------------------------------

    def heads(self, array: jax.Array) -> jax.Array:
        """``[B, T, N, size]`` as ``[B, K, stored_rows, size]``."""
        batch, _, heads, size = array.shape
        array = array.reshape(batch, self.q_len, heads // self.group, self.group, size)
        array = array.transpose(0, 2, 1, 3, 4).reshape(batch, -1, self.rows, size)
        return padded(array, self.stored_rows, axis=2)

    def tokens(self, vector: jax.Array, fill: int = 0) -> jax.Array:
        """``[B or 1, T or more]``, the same for all heads, as ``[B or 1, tiles * 64]``."""
        vector = jnp.repeat(vector[:, : self.q_len], self.group, axis=1)
        return padded(vector, self.tiles * ROWS, fill)

    def vectors(self, array: jax.Array) -> jax.Array:
        """``[B or 1, N or 1, T or more]`` as ``[B or 1, K or 1, tiles * 64]``."""
        return padded(
            self._grouped(array[..., : self.q_len, None])[..., 0], self.tiles * ROWS, axis=2
        )

    def score_tiles(self, array: jax.Array) -> jax.Array:
        """``[B or 1, N or 1, T, S]`` as ``[B or 1, K or 1, stored_rows, S]``."""
        return padded(self._grouped(array), self.stored_rows, axis=2)

    def _grouped(self, array: jax.Array) -> jax.Array:
        """``[B or 1, N or 1, T, n]`` as ``[B or 1, K or 1, rows, n]``."""
        batch, heads, _, size = array.shape
        if heads == 1:
            return jnp.repeat(array, self.group, axis=2)
        array = array.reshape(batch, heads // self.group, self.group, self.q_len, size)
        return array.swapaxes(2, 3).reshape(batch, -1, self.rows, size)


def of(call: AttentionCall) -> Operands:
    """`operands.of` with packed rows; vectors over rows are as long as whole tiles.

    query   [B * K, stored_rows, H]
    bias, allowed   [B or 1, K or 1, stored_rows, S]
    low, high, q_positions, q_segments   int32 [B or 1, tiles * 64]
    row_bias, row_shift, row_slopes   float32 [B or 1, K or 1, tiles * 64]
    """
    source = Source.of(call)
    packing = Packing(call.group, call.q_len)
    call = _masks.fold_key_masks(call)
    limits = _masks.bounds(call)
    arrays = operands.score_arrays(call, limits)
    query = packing.heads(call.query.astype(call.product_dtype))
    query = query.reshape(-1, *query.shape[2:])
    if "key_bias" in arrays and arrays["key_bias"].shape[1] not in (1, call.num_kv_heads):
        # One per head: rows of one tile differ.
        bias = arrays.pop("key_bias")[:, :, None, : call.kv_len]
        arrays["bias"] = operands.aligned(jnp.repeat(bias, call.q_len, axis=2))
    if "slopes" in arrays:
        slopes = arrays.pop("slopes")[:, :, None]
        arrays["row_slopes"] = jnp.broadcast_to(slopes, (*slopes.shape[:2], call.q_len))
    for name in set(arrays):
        if name in ("low", "high", "q_positions", "q_segments"):
            arrays[name] = packing.tokens(arrays[name], -operands.NEVER if name == "high" else 0)
        elif name in ("row_bias", "row_shift", "row_slopes"):
            arrays[name] = packing.vectors(arrays[name])
        elif name in ("bias", "allowed"):
            arrays[name] = packing.score_tiles(arrays[name])
    return Operands({"query": query, **source.arrays(call), **arrays}, call, limits)
