"""An NNX layer's parameters: read without a call, and with names for their axes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from axattn._layers.axes import LOGICAL_AXES

NORMS: dict[str, Callable[..., nnx.LayerNorm | nnx.RMSNorm]] = {
    "layer": functools.partial(nnx.LayerNorm, use_bias=False),
    "rms": nnx.RMSNorm,
}
_DENSE, _CALL = nnx.LinearGeneral, nnx.LinearGeneral.__call__


def is_plain(layer: Any, *, use_bias: bool, **made_with: Any) -> bool:
    """Return whether a call of ``layer`` is Flax's product of the last axis with its kernel.

    An adapter, a subclass, a module with another ``dot_general`` or a bias of its own, and Flax's
    class with another ``__call__`` (``nnx.capture`` puts one there) have to be called.

    Args:
      layer: what is in the place of the ``nnx.LinearGeneral`` that a layer made.
      use_bias: whether the layer gave it a bias.
      made_with: its other attributes, by name, where the layer chose them.
    """
    if type(layer) is not _DENSE or _DENSE.__call__ is not _CALL:
        return False
    made_with = {"dot_general": None, "dot_general_cls": None, **made_with}
    made_with.update(axis=(-1,), batch_axis={}, preferred_element_type=None)
    return (layer.bias is not None) is use_bias and all(
        getattr(layer, name) == value for name, value in made_with.items()
    )


def name_axes(
    layer: nnx.Module, axes: Mapping[tuple[str, ...], tuple[str, ...]] = LOGICAL_AXES
) -> None:
    """Set ``out_sharding`` of every parameter that has none.

    Arrays stay where they are: ``nnx.get_named_sharding`` says where they belong, under
    ``nnx.logical_axis_rules``.
    """
    for path, names in axes.items():
        found: Any = layer
        for name in path:
            found = getattr(found, name, None)
        if isinstance(found, nnx.Param) and not found.get_metadata().get("out_sharding"):
            found.set_metadata(out_sharding=names)
