"""Few query tokens: all rows that read a key/value head, packed into tiles of 64.

Row r of a head's tile is query token r // G of group member r % G, so that one token per sequence
lies in HBM as its packed rows already do.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn._stored import UNUSED_POSITION
from axattn.kernels._hopper.kv_loader import KVLoader
from axattn.kernels._hopper.operands import HopperOperands, align_rows, make_score_arrays
from axattn.kernels._hopper.primitives import ROW_GROUP, ROWS
from axattn.kernels._masks import compute_row_bounds, fold_key_masks
from axattn.kernels._padding import pad_axis
from axattn.kernels._problem import cdiv, round_up


@dataclasses.dataclass(frozen=True)
class PackGQA:
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

    def pack_query(self, array: jax.Array) -> jax.Array:
        """Return ``[B, T, N, size]`` as ``[B, K, stored_rows, size]``."""
        batch, _, heads, size = array.shape
        array = array.reshape(batch, self.q_len, heads // self.group, self.group, size)
        array = array.transpose(0, 2, 1, 3, 4).reshape(batch, -1, self.rows, size)
        return pad_axis(array, self.stored_rows, axis=2)

    def pack_tokens(self, vector: jax.Array, fill: int = 0) -> jax.Array:
        """Return ``[B or 1, T or more]``, the same for all heads, as ``[B or 1, tiles * 64]``."""
        vector = jnp.repeat(vector[:, : self.q_len], self.group, axis=1)
        return pad_axis(vector, self.tiles * ROWS, fill)

    def pack_vectors(self, array: jax.Array) -> jax.Array:
        """Return ``[B or 1, N or 1, T or more]`` as ``[B or 1, K or 1, tiles * 64]``."""
        return pad_axis(
            self._group_rows(array[..., : self.q_len, None])[..., 0], self.tiles * ROWS, axis=2
        )

    def pack_score_tiles(self, array: jax.Array) -> jax.Array:
        """Return ``[B or 1, N or 1, T, S]`` as ``[B or 1, K or 1, stored_rows, S]``."""
        return pad_axis(self._group_rows(array), self.stored_rows, axis=2)

    def _group_rows(self, array: jax.Array) -> jax.Array:
        """Return ``[B or 1, N or 1, T, n]`` as ``[B or 1, K or 1, rows, n]``."""
        batch, heads, _, size = array.shape
        if heads == 1:
            return jnp.repeat(array, self.group, axis=2)
        array = array.reshape(batch, heads // self.group, self.group, self.q_len, size)
        return array.swapaxes(2, 3).reshape(batch, -1, self.rows, size)


def gather_packed_operands(call: AttentionCall) -> HopperOperands:
    """Return what `gather_operands` does, with packed rows; vectors have the rows of whole tiles.

    query   [B * K, stored_rows, H]
    bias, allowed   [B or 1, K or 1, stored_rows, S]
    low, high, q_positions, q_segments   int32 [B or 1, tiles * 64]
    row_bias, row_shift, row_slopes   float32 [B or 1, K or 1, tiles * 64]
    """
    kv = KVLoader.from_call(call)
    packing = PackGQA(call.group, call.q_len)
    call = fold_key_masks(call)
    limits = compute_row_bounds(call)
    arrays = make_score_arrays(call, limits)
    query = packing.pack_query(call.query.astype(call.product_dtype))
    query = query.reshape(-1, *query.shape[2:])
    if "key_bias" in arrays and arrays["key_bias"].shape[1] not in (1, call.num_kv_heads):
        # One per head: rows of one tile differ.
        bias = arrays.pop("key_bias")[:, :, None, : call.kv_len]
        arrays["bias"] = align_rows(jnp.repeat(bias, call.q_len, axis=2))
    if "slopes" in arrays:
        slopes = arrays.pop("slopes")[:, :, None]
        arrays["row_slopes"] = jnp.broadcast_to(slopes, (*slopes.shape[:2], call.q_len))
    for name in list(arrays):
        if name in ("low", "high", "q_positions", "q_segments"):
            arrays[name] = packing.pack_tokens(
                arrays[name], -UNUSED_POSITION if name == "high" else 0
            )
        elif name in ("row_bias", "row_shift", "row_slopes"):
            arrays[name] = packing.pack_vectors(arrays[name])
        elif name in ("bias", "allowed"):
            arrays[name] = packing.pack_score_tiles(arrays[name])
    return HopperOperands({"query": query, **kv.select_arrays(call), **arrays}, call, limits)
