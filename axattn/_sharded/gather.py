"""Every shard gets all keys and values: cheap where heads share them. Inside ``shard_map``.

The gradient of the gathering is a reduce-scatter: each shard gets the sum for its own keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp
from jax import lax

from axattn import _mask_parts as parts
from axattn._call import AttentionCall
from axattn._masks import Mask

Results = tuple[jax.Array, jax.Array]


@overload
def whole(array: jax.Array, axis: str, dim: int = ...) -> jax.Array: ...


@overload
def whole(array: jax.Array | None, axis: str, dim: int = ...) -> jax.Array | None: ...


def whole(array: jax.Array | None, axis: str, dim: int = 1) -> jax.Array | None:
    """All shards' parts, in order."""
    if array is None:
        return None
    return lax.all_gather(array, axis, axis=dim, tiled=True)


def attend(call: AttentionCall, axis: str, run: Callable[[AttentionCall], Results]) -> Results:
    """``run`` of this shard's queries over all keys."""
    here = lax.axis_index(axis)

    def part(one: parts.Part) -> parts.Part:
        if isinstance(one, parts.Segments):
            return dataclasses.replace(one, kv_ids=whole(one.kv_ids, axis))
        if isinstance(one, parts.Lengths) and one.q is not None:
            own = jnp.clip(one.q - here * call.q_len, 0, call.q_len)
            return dataclasses.replace(one, q=own)
        return one

    return run(
        dataclasses.replace(
            call,
            key=whole(call.key, axis),
            value=whole(call.value, axis),
            mask=Mask(tuple(map(part, call.mask.parts))),
        )
    )
