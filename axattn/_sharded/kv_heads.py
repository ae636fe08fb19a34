"""Key/value heads of a shard of the query heads.

With more shards of the heads than key/value heads, some shards need the same head. K and V are then
sharded over the leading axes whose product divides K, and each device reads the heads that it needs
from its part. Keys and values are never copied per query head.
"""

from __future__ import annotations

import dataclasses

import jax
from jax import lax

from axattn._call import AttentionCall
from axattn._sharded.axes import Axes, list_axis_names
from axattn._typing import present


def choose_kv_axes(axes: Axes, mesh, num_heads: int, num_kv_heads: int) -> tuple[str, ...]:
    """Return the leading axes of ``axes.heads`` that shard the key/value heads.

    Raises:
      ValueError: the axes do not divide the query heads, or a shard would need parts of several
        key/value heads.
    """
    names = list_axis_names("heads", axes.heads)
    shards = axes.size(mesh, "heads")
    if num_heads % shards:
        raise ValueError(f"heads takes axes whose size divides {num_heads} heads, got {shards}")
    heads, group = num_heads // shards, num_heads // num_kv_heads
    if heads % group and group % heads:
        raise ValueError(
            f"heads takes axes whose size divides the {num_kv_heads} key/value heads or is a "
            f"multiple of them, got {shards}"
        )
    kv_axes, size = [], 1
    for name in names:
        size *= mesh.shape[name]
        if num_kv_heads % size:
            break
        kv_axes.append(name)
    return tuple(kv_axes)


def select_kv_heads(
    call: AttentionCall, axes: Axes, mesh, kv_axes: tuple[str, ...]
) -> AttentionCall:
    """Keep the key/value heads that the query heads of this shard read. Inside ``shard_map``."""
    rest = list_axis_names("heads", axes.heads)[len(kv_axes) :]
    shards = 1
    for name in rest:
        shards *= mesh.shape[name]
    if shards == 1:
        return call
    # Its key/value heads belong to the query heads of several devices.
    per_kv = call.num_heads * shards // call.num_kv_heads
    first = lax.axis_index(rest) * call.num_heads // per_kv
    count = max(1, call.num_heads // per_kv)

    def slice_heads(array: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, first, count, 2)

    return dataclasses.replace(
        call, key=slice_heads(present(call.key)), value=slice_heads(present(call.value))
    )
