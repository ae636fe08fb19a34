"""Key/value heads of a shard of the query heads: never one for each query head.

With more tensor-parallel ways than key/value heads some shards share a head. K and V are shared out
over as many of the heads' axes as go into K (one axis larger than K is none of them), and of what a
device then has it reads its own heads: keys and values are never written once per query head.
"""

from __future__ import annotations

import dataclasses

import jax
from jax import lax

from axattn._call import AttentionCall
from axattn._sharded.axes import Axes, names_of
from axattn._typing import present


def kv_axes(axes: Axes, mesh, num_heads: int, num_kv_heads: int) -> tuple[str, ...]:
    """The leading axes of ``axes.heads`` that share out the key/value heads.

    Raises:
      ValueError: query heads that the axes do not divide, or that need parts of several key/value
        heads.
    """
    names = names_of("heads", axes.heads)
    ways = axes.size(mesh, "heads")
    if num_heads % ways:
        raise ValueError(f"heads takes axes whose size divides {num_heads} heads, got {ways}")
    own, group = num_heads // ways, num_heads // num_kv_heads
    if own % group and group % own:
        raise ValueError(
            f"heads takes axes whose size divides the {num_kv_heads} key/value heads or is a "
            f"multiple of them, got {ways}"
        )
    taken, size = [], 1
    for name in names:
        size *= mesh.shape[name]
        if num_kv_heads % size:
            break
        taken.append(name)
    return tuple(taken)


def own(call: AttentionCall, axes: Axes, mesh, taken: tuple[str, ...]) -> AttentionCall:
    """Inside ``shard_map``: the call with those key/value heads that its query heads read."""
    rest = names_of("heads", axes.heads)[len(taken) :]
    ways = 1
    for name in rest:
        ways *= mesh.shape[name]
    if ways == 1:
        return call
    # This device's share of the query heads that go with its key/value heads.
    per_kv = call.num_heads * ways // call.num_kv_heads
    first = lax.axis_index(rest) * call.num_heads // per_kv
    count = max(1, call.num_heads // per_kv)

    def take(array: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, first, count, 2)

    return dataclasses.replace(call, key=take(present(call.key)), value=take(present(call.value)))
