"""A layer's parameters without its product."""

from __future__ import annotations

import flax.linen as nn

from axattn._typing import Array, Float


def parameters(
    layer: nn.DenseGeneral, inputs: Float[Array, "*batch T E"]
) -> tuple[Array, Array | None]:
    """Kernel and bias of a layer that would be called with ``inputs``, made by its own rules."""
    layer(inputs[..., :0, :])  # no tokens, no work
    params = nn.meta.unbox(layer.variables["params"])
    return params["kernel"], params.get("bias")
