"""Turning the parameters of multi-head attention into those of grouped- or multi-query attention.

The recipe is that of the GQA paper (Ainslie et al., 2023, https://arxiv.org/abs/2305.13245): each
key and value head of the new model is the mean of the heads it replaces; then training goes on for
a few percent of the original steps.
"""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["mha_to_gqa", "mha_to_mqa"]

_PROJECTIONS = ("query", "key", "value", "out")


def mha_to_gqa(params: Any, num_kv_heads: int) -> Any:
    """Mean-pools the key and value heads of every attention layer in ``params``.

    Section 2.1 of https://arxiv.org/abs/2305.13245. Query head n of the result reads key/value head
    ``n // (N / num_kv_heads)``, as everywhere in axattn: new head j is the mean of the old heads
    ``j * P ... (j + 1) * P - 1`` where P is the number of old heads per new one.

    A layer is any node with the children ``query``, ``key``, ``value`` and ``out`` that have a
    ``kernel`` each, the names of Flax's and axattn's layers, wherever it stands. Heads are the
    last axis but one of its kernels (``[..., E, K, H]``) and biases (``[..., K, H]``), so that
    layers stacked along leading axes by a scan are pooled as well. All else is returned as it is.

    Args:
      params: a tree of arrays: Linen variables or parameters, an ``nnx.State`` or an NNX module.
        Boxes (``nn.Partitioned`` ...) and NNX variables keep their metadata. Arrays of numpy stay
        on the host.
      num_kv_heads: of the result; must divide that of each layer, and may be equal to it.

    Returns:
      The same tree with pooled keys and values, in their dtypes; means are taken in float32 (or
      float64 for float64).

    Raises:
      ValueError: no attention layer is found, or its heads cannot be pooled into that many; the
        message names the layer.
      TypeError: ``num_kv_heads`` is not an integer, or weights are not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn import checkpoints, linen
      >>> x = jnp.ones((1, 8, 32))
      >>> trained = jax.jit(linen.MultiHeadAttention(num_heads=4).init)(jax.random.key(0), x)
      >>> params = checkpoints.mha_to_gqa(trained, num_kv_heads=2)
      >>> params["params"]["key"]["kernel"].shape
      (32, 2, 8)
      >>> linen.GroupedQueryAttention(num_heads=4, num_kv_heads=2).apply(params, x).shape
      (1, 8, 32)
    """
    try:
        num_kv_heads = operator.index(num_kv_heads)
    except TypeError:
        raise TypeError(f"num_kv_heads must be an integer, got {num_kv_heads!r}") from None
    if num_kv_heads < 1:
        raise ValueError(f"num_kv_heads must be positive, got {num_kv_heads}")

    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    kernels = set()
    for path, _ in flat:
        names = [_name(entry) for entry in path]
        kernels |= {tuple(names[: i + 1]) for i, name in enumerate(names) if name == "kernel"}
    layers = {
        kernel[:-2]
        for kernel in kernels
        if all((*kernel[:-2], name, "kernel") in kernels for name in _PROJECTIONS)
    }
    if not layers:
        raise ValueError(
            "params has no attention layer: no node with children query, key, value and out, each "
            "with a kernel"
        )

    def pool(path, leaf):
        names = [_name(entry) for entry in path]
        for i in range(len(names) - 1):
            in_layer = tuple(names[:i]) in layers
            if in_layer and names[i] in ("key", "value") and names[i + 1] in ("kernel", "bias"):
                return _pool(leaf, num_kv_heads, "/".join(map(str, names[: i + 2])))
        return leaf

    return jax.tree_util.tree_map_with_path(pool, params)


def mha_to_mqa(params: Any) -> Any:
    """`mha_to_gqa` to a single key/value head: multi-query attention.

    Multi-query attention is https://arxiv.org/abs/1911.02150.

    Args:
      params: as in `mha_to_gqa`.

    Returns:
      The same tree with one key head and one value head in each layer.

    Raises:
      ValueError: no attention layer is found, or kernels are of another shape.
      TypeError: weights are not floating-point.

    Example:
      >>> import numpy as np
      >>> from axattn import checkpoints
      >>> kernel = {"kernel": np.ones((32, 4, 8), np.float32)}  # [E, K, H]
      >>> out = {"kernel": np.ones((4, 8, 32), np.float32)}
      >>> layer = {"query": kernel, "key": kernel, "value": kernel, "out": out}
      >>> params = checkpoints.mha_to_mqa({"layer_0": layer})
      >>> {name: p["kernel"].shape for name, p in params["layer_0"].items()}
      {'key': (32, 1, 8), 'out': (4, 8, 32), 'query': (32, 4, 8), 'value': (32, 1, 8)}
    """
    return mha_to_gqa(params, 1)


def _name(entry: Any) -> Any:
    """What a step of a tree path is called: key, attribute or index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def _pool(leaf, num_kv_heads: int, where: str):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"{where} must be floating-point, got {leaf.dtype}")
    if leaf.ndim < 2:
        raise ValueError(f"{where} must be [..., K, H], got shape {leaf.shape}")
    *lead, heads, head_dim = leaf.shape
    if heads % num_kv_heads:
        raise ValueError(
            f"{where} has {heads} heads (shape {leaf.shape}), which num_kv_heads={num_kv_heads} "
            "does not divide"
        )
    xp = np if isinstance(leaf, np.ndarray) else jnp
    grouped = leaf.reshape(*lead, num_kv_heads, heads // num_kv_heads, head_dim)
    mean = xp.mean(grouped.astype(jnp.promote_types(leaf.dtype, jnp.float32)), axis=-2)
    return mean.astype(leaf.dtype)
