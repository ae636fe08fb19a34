"""Where keys and values lie in HBM, and how a block of them comes into shared memory.

They are arrays of a caller, rows of a cache, or its pages. A block of pages is copied in slices,
each within one page. Quantized keys and values come as codes, with a scale per slot.
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

from axattn import _quantization as quantization
from axattn._call import AttentionCall
from axattn._masks import find_kv_lengths
from axattn._typing import present
from axattn.kernels._hopper.pipeline import Pipeline
from axattn.kernels._hopper.primitives import (
    ROW_GROUP,
    declare_row_major,
    declare_swizzled,
    div,
    load_vector,
    make_opaque,
    rem,
)

# The shortest copy of TMA, in float32: shorter slices of scales come with what lies behind them.
_MIN_SCALES = 32


class KVBlock(NamedTuple):
    """A block of keys or of values in shared memory, as stored, and the scale of each slot."""

    numbers: Any  # [block, size]
    scales: Any | None  # float32 [slices, 32 or more]


class ScaleLoaders(NamedTuple):
    """Functions that load the scales of a block's keys and of its values, or None.

    They are called where the scales are needed: a vector over keys takes a register for four.
    """

    key: Callable[[], jax.Array] | None = None
    value: Callable[[], jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class KVLoader:
    """Static facts about keys and values; hashable.

    Arrays of a cache are read as ``[rows * K, slots, size]``, their scales as one long vector.
    """

    kind: str  # "arrays", "rows" or "pages"
    dtype: str  # as stored
    num_kv_heads: int
    page_size: int  # slots of a row, or of a page
    num_pages: int
    pages_per_row: int
    values_in_keys: bool
    has_unused_slots: bool  # which may hold anything

    @classmethod
    def from_call(cls, call: AttentionCall) -> KVLoader:
        has_unused = find_kv_lengths(call.mask) is not None or call.kv_positions is not None
        if call.stored is None:
            key = present(call.key)
            batch, slots, heads, _ = key.shape
            return cls("arrays", key.dtype.name, heads, slots, batch, 1, False, has_unused)
        stored, table = call.stored, call.stored.block_table
        return cls(
            "rows" if table is None else "pages",
            stored.dtype,
            stored.num_kv_heads,
            stored.page_size,
            stored.arrays.keys.shape[0],
            1 if table is None else table.shape[1],
            stored.arrays.values is None,
            has_unused,
        )

    @property
    def is_quantized(self) -> bool:
        return quantization.is_quantized(self.dtype)

    @property
    def may_hold_nan(self) -> bool:
        """Whether an unused slot may hold a NaN, which a weight of zero would not stop."""
        return self.has_unused_slots and self.dtype != "int8"

    @property
    def is_prepared(self) -> bool:
        """Whether blocks in shared memory are converted or cleaned before they are multiplied."""
        return self.kind != "arrays" and (self.is_quantized or self.has_unused_slots)

    def select_arrays(self, call: AttentionCall) -> dict[str, jax.Array]:
        """Return what the kernels read, by name; slots of arrays are rounded up to 8."""
        found: dict[str, jax.Array] = {}
        if find_kv_lengths(call.mask) is not None:
            lengths = jnp.asarray(find_kv_lengths(call.mask), jnp.int32)
            found["kv_lengths"] = jnp.broadcast_to(lengths, (call.batch,))
        if self.kind == "arrays":
            missing = -self.page_size % ROW_GROUP
            pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, missing), (0, 0), (0, 0)))
            return found | {"key": pad(present(call.key)), "value": pad(present(call.value))}
        stored = present(call.stored)
        arrays = stored.arrays
        found["key"] = self._flatten_heads(arrays.keys)
        if not self.values_in_keys:
            found["value"] = self._flatten_heads(present(arrays.values))
        if self.is_quantized:
            found["key_scales"] = present(arrays.key_scales).reshape(-1)
            if not self.values_in_keys:
                found["value_scales"] = present(arrays.value_scales).reshape(-1)
        if self.kind == "pages":
            found["block_table"] = present(stored.block_table)
        return found

    def _flatten_heads(self, array: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        if array.dtype != dtype:
            array = lax.bitcast_convert_type(array, dtype)
        return array.reshape(-1, *array.shape[2:])

    # ---- producer -----------------------------------------------------------------------------

    def declare(self, stages: int, block_kv: int, size: int, *, consumers: int) -> Pipeline:
        """Return a pipeline of `KVBlock`s of ``size`` features."""
        slices = block_kv // self._get_slice_size(block_kv)
        scales, copies = None, slices
        if self.is_quantized:
            shape = (stages, slices, max(self._get_slice_size(block_kv), _MIN_SCALES))
            scales, copies = declare_row_major(shape, jnp.float32), 2 * slices
        numbers = declare_swizzled((stages, block_kv, size), jnp.dtype(self.dtype), block_kv)
        return Pipeline.declare(
            stages, KVBlock(numbers, scales), copies=copies, consumers=consumers
        )

    def locate(self, gmem: Mapping[str, Any], batch, kv_head, slot, block_kv: int) -> list[KVSlice]:
        """Return the slices of the block that begins at ``slot`` of a batch row."""
        if self.kind != "pages":
            return [KVSlice(self, batch, kv_head, slot, block_kv)]
        size, found = self._get_slice_size(block_kv), []
        for first in (slot + n for n in range(0, block_kv, size)):
            index = jnp.minimum(div(first, self.page_size), self.pages_per_row - 1)
            # Entries that no token needs may be garbage. They name some page: any will do.
            page = jnp.clip(gmem["block_table"][batch, index], 0, self.num_pages - 1)
            found.append(KVSlice(self, page, kv_head, rem(first, self.page_size), size))
        return found

    def copy(
        self, pipeline: Pipeline, step, gmem: Mapping[str, Any], name: str, slices: list[KVSlice]
    ) -> None:
        """Start the copies of a block for a step; ``name`` is "key" or "value"."""
        stage = pipeline.acquire(step)
        full, block = pipeline.full.at[stage], pipeline.select(stage)
        for i, one in enumerate(slices):
            rows = pl.ds(i * one.size, one.size)
            numbers = gmem[name].at[one.index_numbers()]
            plgpu.copy_gmem_to_smem(numbers, block.numbers.at[rows], full)
            if block.scales is not None:
                scales = gmem[f"{name}_scales"].at[pl.ds(one.index_scale(), block.scales.shape[1])]
                plgpu.copy_gmem_to_smem(scales, block.scales.at[i], full)

    def _get_slice_size(self, block_kv: int) -> int:
        """Return the slots that are copied at once."""
        return math.gcd(block_kv, self.page_size) if self.kind == "pages" else block_kv

    # ---- consumers ----------------------------------------------------------------------------

    def make_scale_loaders(self, smem: Mapping[str, Any], step, block_kv: int) -> ScaleLoaders:
        """Return functions that load the scales of a step; its keys and values have arrived."""
        if not self.is_quantized:
            return ScaleLoaders()

        def load(name):
            pipeline = smem["key" if smem["value"] is None else name]
            # Again for the values, where they share those of the keys.
            block = pipeline.select(rem(make_opaque(step), pipeline.stages))
            return self._load_scales(block, block_kv)

        return ScaleLoaders(functools.partial(load, "key"), functools.partial(load, "value"))

    def _load_scales(self, block: KVBlock, block_kv: int) -> jax.Array:
        scales, slots = present(block.scales), pl.ds(0, self._get_slice_size(block_kv))
        count = scales.shape[0]
        vectors = [load_vector(scales.at[i, slots], 1) for i in range(count)]
        return vectors[0] if count == 1 else jnp.concatenate(vectors)


class KVSlice(NamedTuple):
    """Consecutive slots of one key/value head in HBM."""

    loader: KVLoader
    row: jax.Array
    kv_head: jax.Array
    slot: jax.Array
    size: int

    def index_numbers(self) -> tuple:
        """Return the index of the slice in keys or values."""
        slots = pl.ds(self.slot, self.size)
        if self.loader.kind == "arrays":
            return self.row, slots, self.kv_head
        return self.row * self.loader.num_kv_heads + self.kv_head, slots

    def index_scale(self) -> jax.Array:
        """Return the first slot, counted through all rows and heads."""
        row = self.row * self.loader.num_kv_heads + self.kv_head
        return row * self.loader.page_size + self.slot
