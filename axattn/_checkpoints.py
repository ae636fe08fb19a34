"""Trees of parameters: key/value heads pooled, layers stacked. `axattn.checkpoints` says why."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from axattn._dtypes import choose_accumulator

_PROJECTIONS = ("query", "key", "value", "out")


def mha_to_gqa(params: Any, num_kv_heads: int) -> Any:
    """Mean-pool the key and value heads of every attention layer in ``params``.

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
        names = _list_keys(path)
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

    def pool_leaf(path, leaf):
        names = _list_keys(path)
        for i in range(len(names) - 1):
            in_layer = tuple(names[:i]) in layers
            if in_layer and names[i] in ("key", "value") and names[i + 1] in ("kernel", "bias"):
                return _pool_heads(leaf, num_kv_heads, "/".join(names[: i + 2]))
        return leaf

    return jax.tree_util.tree_map_with_path(pool_leaf, params)


def mha_to_mqa(params: Any) -> Any:
    """Call `mha_to_gqa` for a single key/value head: multi-query attention.

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


def unstack_layers(params: Any, axis: int = 0) -> list[Any]:
    """Take apart what ``nn.scan``, ``nnx.scan`` or ``vmap`` stacked: one tree for each layer.

    A scan over layers compiles a deep model fast, with parameters ``[L, ...]``. It does not suit
    generation: caches that go through it as ``xs`` and ``ys`` are all copied at each step. A layer
    that is called by itself has a cache of its own, which is written in place.

    Args:
      params: of the scanned layers, and of nothing else: Linen parameters, an ``nnx.State``, a
        scanned NNX module, an optimizer's moments, any tree of arrays ``[..., L, ...]``. Arrays of
        numpy stay on the host, as views.
      axis: of the layers in every array; negative ones count from the end.

    Returns:
      L trees like ``params``, whose arrays lack that axis. Boxes (``nn.Partitioned`` ...) and NNX
      variables keep their metadata, except for the name of that axis.

    Raises:
      ValueError: there are no arrays, one has no such axis, or they have it in different sizes; the
        message names the array.
      TypeError: ``axis`` is not an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn import checkpoints
      >>> params = {"attention": {"query": {"kernel": jnp.ones((3, 32, 4, 8))}}}
      >>> layers = checkpoints.unstack_layers(params)
      >>> len(layers), layers[0]["attention"]["query"]["kernel"].shape
      (3, (32, 4, 8))
    """
    axis = _check_axis(axis)
    depths: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        where, shape = _format_path(path), jnp.shape(leaf)
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"{where} takes an axis {axis} of layers, got shape {shape}: params are those of "
                "the scanned layers alone"
            )
        depths.setdefault(shape[axis], where)
    if len(depths) != 1:
        found = " and ".join(f"{size} in {where}" for size, where in depths.items())
        raise ValueError(
            f"params takes arrays with one number of layers along axis {axis}, got "
            f"{found or 'no arrays'}"
        )
    (depth,) = depths

    def slice_layer(i: int) -> Any:
        sliced = jax.tree.map(lambda leaf: leaf[(slice(None),) * (axis % leaf.ndim) + (i,)], params)
        return _rename_axes(sliced, lambda names, rank: _drop_axis(names, axis % (rank + 1)))

    return [slice_layer(i) for i in range(depth)]


def stack_layers(layers: Sequence[Any], axis: int = 0, *, axis_name: str | None = None) -> Any:
    """Stack the parameters of like layers for a scan over them; undo `unstack_layers`.

    Args:
      layers: trees of arrays of one structure, with the same shapes and dtypes.
      axis: the new axis in every array; negative ones count from the end of the result's.
      axis_name: its name, for boxes (``nn.Partitioned`` ...) and NNX variables that name axes.

    Returns:
      The tree with arrays ``[..., L, ...]``; of numpy where all of its layers' are.

    Raises:
      ValueError: there are no layers, or one differs from the first in structure, shapes or dtypes;
        the message names the array. An array has too few axes for ``axis``.
      TypeError: ``axis`` is not an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn import checkpoints
      >>> layers = [{"kernel": jnp.full((4, 8), i)} for i in range(3)]
      >>> checkpoints.stack_layers(layers)["kernel"].shape
      (3, 4, 8)
    """
    axis, layers = _check_axis(axis), list(layers)
    if not layers:
        raise ValueError("layers takes at least one, got none")
    structure: Any
    first, structure = jax.tree_util.tree_flatten_with_path(layers[0])
    for i, layer in enumerate(layers):
        if structure != jax.tree.structure(layer):
            raise ValueError(
                f"layers takes trees of one structure, got in layer {i} {jax.tree.structure(layer)}"
                f" and in layer 0 {structure}"
            )
        for (path, one), other in zip(first, jax.tree.leaves(layer), strict=True):
            kinds = [(jnp.shape(x), jnp.result_type(x)) for x in (one, other)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"layers takes arrays of one shape and dtype, got in layer {i} {kinds[1]} for "
                    f"{_format_path(path)} and in layer 0 {kinds[0]}"
                )
            if not -len(kinds[0][0]) - 1 <= axis <= len(kinds[0][0]):
                raise ValueError(
                    f"axis={axis} is none of {_format_path(path)}, stacked from shape {kinds[0][0]}"
                )

    def stack_leaves(*leaves):
        on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
        return (np if on_host else jnp).stack(leaves, axis)

    tree = jax.tree.map(stack_leaves, *layers)
    return _rename_axes(tree, lambda names, rank: _insert_axis(names, axis % rank, axis_name))


def _check_axis(axis: Any) -> int:
    try:
        return operator.index(axis)
    except TypeError:
        raise TypeError(f"axis takes an integer, got {axis!r}") from None


def _drop_axis(names: tuple, axis: int) -> tuple:
    """Return names of axes without the one at ``axis``."""
    return names[:axis] + names[axis + 1 :]


def _insert_axis(names: tuple, axis: int, name: str | None) -> tuple:
    """Return names of axes with one more at ``axis``."""
    names += (None,) * (axis - len(names))
    return names[:axis] + (name,) + names[axis:]


def _rename_axes(tree: Any, rename: Callable[[tuple, int], tuple]) -> Any:
    """Apply ``rename(names, rank)`` to the names of axes that a tree's arrays carry."""

    def is_named(x: Any) -> bool:  # Flax's boxes, and its NNX variables; without importing Flax
        return hasattr(x, "replace_boxed") or hasattr(x, "set_metadata")

    def rename_leaf(x: Any) -> Any:
        if hasattr(x, "set_metadata"):
            names = x.get_metadata().get("out_sharding")
            if names:
                x.set_metadata(out_sharding=rename(tuple(names), x[...].ndim))
        elif hasattr(x, "names"):
            return x.replace(names=rename(tuple(x.names), x.unbox(False).ndim))
        return x

    return jax.tree.map(rename_leaf, tree, is_leaf=is_named)


def _list_keys(path: Any) -> list[str]:
    """Return the keys, attributes and indices of a tree path."""
    return [jax.tree_util.keystr((entry,), simple=True) for entry in path]


def _format_path(path: Any) -> str:
    """Return a tree path for error messages."""
    return "/".join(_list_keys(path)) or "params"


def _pool_heads(leaf, num_kv_heads: int, where: str):
    """Return ``leaf`` with ``num_kv_heads`` heads, each the mean of those that it replaces."""
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
    mean = xp.mean(grouped.astype(choose_accumulator(leaf.dtype)), axis=-2)
    return mean.astype(leaf.dtype)
