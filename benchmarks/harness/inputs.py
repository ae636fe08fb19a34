"""Random inputs: never zeros, on which hardware and some kernels are faster."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def random_like(tree: Any, seed: int = 0, ints: Mapping[str, int] | None = None) -> Any:
    """Arrays on the default device, drawn on the host, for a tree of ``jax.ShapeDtypeStruct``.

    Floating-point leaves are normal, with variance 1, or 1 / fan-in where the path ends in
    "kernel"; integer leaves are looked up in ``ints`` by the last name of their path. Nothing
    is drawn on the device, whose allocator would count it.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = str(getattr(path[-1], "key", "")) if path else ""
        if np.issubdtype(leaf.dtype, np.integer):
            return jax.device_put(np.full(leaf.shape, (ints or {})[name], leaf.dtype))
        fan_in = leaf.shape[0] if name == "kernel" else 1
        values = rng.standard_normal(leaf.shape, np.float32) / math.sqrt(fan_in)
        return jax.device_put(values.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, tree)


def normal_on_device(tree: Any, seed: int = 0) -> Any:
    """Normal arrays for a tree of floating-point ``jax.ShapeDtypeStruct``, drawn where they are.

    The host takes seconds for the gigabytes that a GPU draws in no time.
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [_normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return structure.unflatten(drawn)


@functools.partial(jax.jit, static_argnums=(1, 2))  # compiled once per shape: that takes seconds
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, np.float32).astype(dtype)


def attention_inputs(
    batch: int, q_len: int, kv_len: int, heads: int, kv_heads: int, head_dim: int, dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query [B, T, N, H], key and value [B, S, K, H]."""
    query, kv = (
        jax.ShapeDtypeStruct((batch, length, n, head_dim), dtype)
        for length, n in ((q_len, heads), (kv_len, kv_heads))
    )
    return random_like((query, kv, kv))
