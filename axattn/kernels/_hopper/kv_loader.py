"""Where keys and values lie in HBM, and how a block of them comes into shared memory.

They are arrays as a caller has them, the rows of a cache, or its pages: then a block is copied in
pieces that no page border cuts. Quantized ones come as codes, with a scale per key.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from axattn import _quantization
from axattn._call import AttentionCall
from axattn._typing import present
from axattn.kernels._hopper import primitives
from axattn.kernels._hopper.pipeline import Ring
from axattn.kernels._hopper.primitives import div, rem
from axattn.kernels._hopper.rows import ROW_GROUP

# The shortest copy of TMA, in float32: shorter pieces of scales come with what lies behind them.
_MIN_SCALES = 32


class Block(NamedTuple):
    """A block of keys or of values in shared memory, as stored, and the scale of each slot."""

    numbers: Any  # [block, size]
    scales: Any | None  # float32 [pieces, 32 or more]


class KeyScales(NamedTuple):
    """Functions that load the scales of a block's keys and values, as vectors over them, or None.

    They are called where the scales are needed: a vector over keys takes a register for four.
    """

    key: Callable[[], jax.Array] | None = None
    value: Callable[[], jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Static facts about keys and values; hashable.

    Arrays of a cache are read as ``[rows * K, slots, size]``, their scales as one long vector.
    """

    kind: str  # "arrays", "rows" or "pages"
    dtype: str  # of the numbers that are stored
    num_kv_heads: int
    page_size: int  # slots of a row, or of a page
    num_pages: int
    pages_per_row: int
    values_in_keys: bool
    dirty: bool  # slots without a token may hold anything

    @classmethod
    def of(cls, call: AttentionCall) -> Source:
        dirty = call.mask.kv_lengths() is not None or call.kv_positions is not None
        if call.stored is None:
            key = present(call.key)
            batch, slots, heads, _ = key.shape
            return cls("arrays", key.dtype.name, heads, slots, batch, 1, False, dirty)
        stored, table = call.stored, call.stored.block_table
        return cls(
            "rows" if table is None else "pages",
            stored.dtype,
            stored.num_kv_heads,
            stored.page_size,
            stored.arrays.keys.shape[0],
            1 if table is None else table.shape[1],
            stored.arrays.values is None,
            dirty,
        )

    @property
    def scaled(self) -> bool:
        return _quantization.is_quantized(self.dtype)

    @property
    def has_nan(self) -> bool:
        """Whether a slot without a token may hold a NaN, which a weight of zero would not stop."""
        return self.dirty and self.dtype != "int8"

    def arrays(self, call: AttentionCall) -> dict[str, jax.Array]:
        """What the kernels read, by name; slots of arrays are rounded up to 8."""
        found: dict[str, jax.Array] = {}
        if call.mask.kv_lengths() is not None:
            lengths = jnp.asarray(call.mask.kv_lengths(), jnp.int32)
            found["kv_lengths"] = jnp.broadcast_to(lengths, (call.batch,))
        if self.kind == "arrays":
            missing = -self.page_size % ROW_GROUP
            pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, missing), (0, 0), (0, 0)))
            return found | {"key": pad(present(call.key)), "value": pad(present(call.value))}
        stored = present(call.stored)
        arrays = stored.arrays
        found["key"] = self._numbers(arrays.keys)
        if not self.values_in_keys:
            found["value"] = self._numbers(present(arrays.values))
        if self.scaled:
            found["key_scales"] = present(arrays.key_scales).reshape(-1)
            if not self.values_in_keys:
                found["value_scales"] = present(arrays.value_scales).reshape(-1)
        if self.kind == "pages":
            found["block_table"] = present(stored.block_table)
        return found

    def _numbers(self, array: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        if array.dtype != dtype:
            array = lax.bitcast_convert_type(array, dtype)
        return array.reshape(-1, *array.shape[2:])

    # ---- shared memory ------------------------------------------------------------------------

    def ring(self, stages: int, block_kv: int, size: int, *, consumers: int) -> Ring:
        """A ring of `Block`s of ``size`` features."""
        pieces = block_kv // self._piece(block_kv)
        scales, copies = None, pieces
        if self.scaled:
            shape = (stages, pieces, max(self._piece(block_kv), _MIN_SCALES))
            scales, copies = primitives.flat(shape, jnp.float32), 2 * pieces
        numbers = primitives.swizzled((stages, block_kv, size), jnp.dtype(self.dtype), block_kv)
        return Ring.scratch(stages, Block(numbers, scales), copies=copies, consumers=consumers)

    def stored_bytes(self, stages: int, block_kv: int, size: int) -> list[int]:
        """Shared memory of such a ring, one number per buffer."""
        found = [stages * block_kv * size * jnp.dtype(self.dtype).itemsize]
        if self.scaled:
            piece = self._piece(block_kv)
            found.append(stages * (block_kv // piece) * max(piece, _MIN_SCALES) * 4)
        return found

    def fill(self, ring: Ring, step: jax.Array, gmem: Mapping[str, Any], name: str, places) -> None:
        """Has the block of ``places`` copied into the ring: ``name`` is "key" or "value"."""
        at = ring.acquire(step)
        full, block = ring.full.at[at], ring.at(at)
        for i, place in enumerate(places):
            part = pl.ds(i * place.size, place.size)
            numbers = gmem[name].at[place.of_numbers()]
            plgpu.copy_gmem_to_smem(numbers, block.numbers.at[part], full)
            if block.scales is not None:
                scales = gmem[f"{name}_scales"].at[pl.ds(place.flat(), block.scales.shape[1])]
                plgpu.copy_gmem_to_smem(scales, block.scales.at[i], full)

    def loaders(self, smem: Mapping[str, Any], step: jax.Array, block_kv: int) -> KeyScales:
        """What loads the scales of a step whose keys and values have been waited for."""
        if not self.scaled:
            return KeyScales()

        def load(name):
            ring = smem["key" if smem["value"] is None else name]
            # Anew for the values, where they share those of the keys.
            block = ring.at(rem(primitives.unknown(step), ring.stages))
            return self._scales(block, block_kv)

        return KeyScales(functools.partial(load, "key"), functools.partial(load, "value"))

    def _scales(self, block: Block, block_kv: int) -> jax.Array:
        scales, piece = present(block.scales), pl.ds(0, self._piece(block_kv))
        count = scales.shape[0]
        vectors = [primitives.load_vector(scales.at[i, piece], 1) for i in range(count)]
        return vectors[0] if count == 1 else jnp.concatenate(vectors)

    # ---- HBM ----------------------------------------------------------------------------------

    def _piece(self, block_kv: int) -> int:
        """Slots that are copied at once."""
        return math.gcd(block_kv, self.page_size) if self.kind == "pages" else block_kv

    def places(self, gmem: Mapping[str, Any], batch, kv_head, slot, block_kv: int) -> list[Place]:
        """Where the pieces of the block that begins at ``slot`` of a batch row are."""
        if self.kind != "pages":
            return [Place(self, batch, kv_head, slot, block_kv)]
        piece, found = self._piece(block_kv), []
        for first in (slot + n for n in range(0, block_kv, piece)):
            index = jnp.minimum(div(first, self.page_size), self.pages_per_row - 1)
            # Entries that no token needs may be garbage. They name some page: any will do.
            page = jnp.clip(gmem["block_table"][batch, index], 0, self.num_pages - 1)
            found.append(Place(self, page, kv_head, rem(first, self.page_size), piece))
        return found


class Place(NamedTuple):
    """Consecutive slots of one key/value head in HBM."""

    source: Source
    row: jax.Array
    kv_head: jax.Array
    slot: jax.Array
    size: int

    def of_numbers(self) -> tuple:
        slots = pl.ds(self.slot, self.size)
        if self.source.kind == "arrays":
            return self.row, slots, self.kv_head
        return self.row * self.source.num_kv_heads + self.kv_head, slots

    def flat(self) -> jax.Array:
        """The first slot, counted through all rows and heads."""
        row = self.row * self.source.num_kv_heads + self.kv_head
        return row * self.source.page_size + self.slot
