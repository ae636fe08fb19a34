"""Names for the axes of a layer's parameters, as metadata that Flax's sharding reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from axattn.layers.axes import LOGICAL_AXES


def name_axes(
    layer: nnx.Module, axes: Mapping[tuple[str, ...], tuple[str, ...]] = LOGICAL_AXES
) -> None:
    """Sets ``out_sharding`` of every parameter that has none of its own.

    Arrays stay where they are: ``nnx.get_named_sharding`` says where they belong, under
    ``nnx.logical_axis_rules``.
    """
    for path, names in axes.items():
        found: Any = layer
        for name in path:
            found = getattr(found, name, None)
        if isinstance(found, nnx.Param) and not found.get_metadata().get("out_sharding"):
            found.set_metadata(out_sharding=names)
