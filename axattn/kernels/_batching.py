"""``vmap`` of a kernel: one call with a larger batch.

Pallas would add a grid axis, or loop where scalars differ, and cannot batch operands that stay in
HBM. A call has a batch dimension, so calls are merged along it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn._stored import KVView

# Fields with a row for each row of the batch, or one for all.
_BATCHED_FIELDS = ("query", "key", "value", "bias", "alibi_slopes", "q_positions", "kv_positions")

# Fields without batch rows: calls that differ in these run one after another.
_SHARED_FIELDS = ("sinks", "traced_scale", "dropout_key", "first_row", "first_head")


def merge_vmapped_calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``vmap`` of ``function(call, *arrays)`` one call with a larger batch."""
    function = jax.custom_batching.custom_vmap(function)

    @function.def_vmap
    def vmapped(size, batched, call, *arrays):
        own, *others = batched
        if not _can_merge(call, own):
            results = _map_calls(function, size, batched, (call, *arrays))
            return results, jax.tree.map(lambda _: True, results)
        rows = call.batch if not own.query else call.query.shape[1]
        merge = _BatchMerger(size, rows)
        together = [merge.merge_rows(x, b) for x, b in zip(arrays, others, strict=True)]
        results = function(_merge_calls(merge, call, own), *together)
        results = jax.tree.map(lambda x: x.reshape(size, rows, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return function


def _can_merge(call: AttentionCall, batched: Any) -> bool:
    """Say whether calls can be one; ``batched`` is the call with bools in place of arrays."""
    if call.dropout_key is not None:  # bits depend on the rows of each call
        return False
    if any(jax.tree.leaves([getattr(batched, name) for name in _SHARED_FIELDS])):
        return False
    if call.stored is None:
        return True
    arrays = all(jax.tree.leaves(batched.stored.arrays))
    if batched.stored.key_center or jax.tree.leaves(batched.stored.first_row) == [True]:
        return False
    if call.stored.block_table is None:
        # Several calls read the rows of one array: merging would copy them.
        return arrays and isinstance(call.stored.first_row, int)
    return arrays or not any(jax.tree.leaves(batched.stored.arrays))


def _map_calls(function, size: int, batched, arguments):
    leaves, structure = jax.tree.flatten(arguments)
    mapped = jax.tree.leaves(batched)

    def call(i):
        own = [x[i] if m else x for x, m in zip(leaves, mapped, strict=True)]
        return function(*jax.tree.unflatten(structure, own))

    return jax.lax.map(call, jnp.arange(size))


@dataclasses.dataclass(frozen=True)
class _BatchMerger:
    """Merges ``size`` batches of ``batch`` rows into one."""

    size: int
    batch: int

    def merge_rows(self, array: jax.Array, batched: bool) -> jax.Array:
        """Return an array with all rows of the batch."""
        if not batched:
            array = jnp.broadcast_to(array, (self.size, *array.shape))
        if array.ndim == 1:
            array = array[:, None]
        array = jnp.broadcast_to(array, (self.size, self.batch, *array.shape[2:]))
        return array.reshape(self.size * self.batch, *array.shape[2:])

    def merge_if_batched(self, array: Any, batched: bool) -> Any:
        """Return an array with all rows, or one that serves all rows, or a number."""
        if array is None or (not batched and jnp.ndim(array) == 0):
            return array
        if not batched and array.ndim > 1 and array.shape[0] == 1:
            return array
        return self.merge_rows(array, batched)


def _merge_calls(merge: _BatchMerger, call: AttentionCall, batched: Any) -> AttentionCall:
    changes: dict[str, Any] = {}
    for name in _BATCHED_FIELDS:
        combine = merge.merge_rows if name in ("query", "key", "value") else merge.merge_if_batched
        if getattr(call, name) is not None:
            changes[name] = combine(getattr(call, name), getattr(batched, name))
    leaves, structure = jax.tree.flatten(call.mask)
    mapped = jax.tree.leaves(batched.mask)
    leaves = [merge.merge_if_batched(x, b) for x, b in zip(leaves, mapped, strict=True)]
    changes["mask"] = jax.tree.unflatten(structure, leaves)
    if call.stored is not None:
        changes["stored"] = _merge_caches(merge, call.stored, batched.stored)
    return dataclasses.replace(call, **changes)


def _merge_caches(merge: _BatchMerger, stored: KVView, batched: Any) -> KVView:
    """Put caches end to end; their pages are numbered through."""
    changes: dict[str, Any] = {"batch": merge.size * merge.batch}
    together = any(jax.tree.leaves(batched.arrays))
    if together:
        changes["arrays"] = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stored.arrays)
    if stored.block_table is not None:
        table = merge.merge_rows(stored.block_table, batched.block_table)
        if together:
            pages = stored.arrays.keys.shape[1]
            # Garbage entries stay within the pages of their own cache.
            first = jnp.repeat(jnp.arange(merge.size, dtype=jnp.int32) * pages, merge.batch)
            table = jnp.clip(table, 0, pages - 1) + first[:, None]
        changes["block_table"] = table
    return dataclasses.replace(stored, **changes)
