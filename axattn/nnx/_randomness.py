"""Whether an NNX layer drops weights, and which random key it uses."""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.nnx.module import first_from

from axattn._typing import Array


def resolve_dropout(
    layer: Any, deterministic: bool | None, rngs: nnx.Rngs | nnx.RngStream | None
) -> tuple[bool, Array | None]:
    """Return whether a call drops nothing, and if it drops, a key of its ``rngs`` or the layer's.

    Raises:
      ValueError: nobody says whether the layer drops, or there is no key.
    """
    name = type(layer).__name__
    if layer.dropout_rate <= 0.0 or first_from(
        deterministic,
        layer.deterministic,
        error_msg=f"No `deterministic` argument was provided to {name}, neither to its constructor "
        "nor to its call nor as an attribute.",
    ):
        return True, None
    rngs = rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
    rngs = layer.rngs if rngs is None else rngs
    if rngs is None:
        raise ValueError(
            f"'rngs' must be provided to __call__ method if {name} instance is defined with "
            "keep_rngs=False."
        )
    return False, rngs()
