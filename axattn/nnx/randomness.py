"""Where a layer's dropout gets its key."""

from __future__ import annotations

from typing import Any, Protocol

from flax import nnx

from axattn._typing import Array


class _HasRngs(Protocol):
    @property
    def rngs(self) -> Any: ...


def dropout_key(rngs: nnx.Rngs | nnx.RngStream | None, layer: _HasRngs) -> Array:
    """A new key: of the call's ``rngs``, or of those that the layer keeps.

    Raises:
      ValueError: there is neither.
    """
    if rngs is None:
        rngs = layer.rngs
    elif isinstance(rngs, nnx.Rngs):
        rngs = rngs.dropout
    if rngs is None:
        raise ValueError(
            f"'rngs' must be provided to __call__ method if {type(layer).__name__} instance is "
            "defined with keep_rngs=False."
        )
    return rngs()
