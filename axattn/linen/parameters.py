"""A layer's parameters: without its product, and with names for their axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn

from axattn._typing import Array, Float
from axattn.layers.axes import LOGICAL_AXES


def parameters(
    layer: nn.DenseGeneral, inputs: Float[Array, "*batch T E"]
) -> tuple[Array, Array | None]:
    """Kernel and bias of a layer that would be called with ``inputs``, made by its own rules."""
    layer(inputs[..., :0, :])  # no tokens, no work
    params = nn.meta.unbox(layer.variables["params"])
    return params["kernel"], params.get("bias")


def named(
    layer: nn.Module,
    init: Callable[..., Array],
    *path: str,
    axes: Mapping[tuple[str, ...], tuple[str, ...]] = LOGICAL_AXES,
) -> Callable[..., Array]:
    """``init`` of the parameter at ``path``, boxed with its axes where the layer's are named."""
    return nn.with_logical_partitioning(init, axes[path]) if layer.logical_axes else init
