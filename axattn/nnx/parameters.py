"""Whether a projection is still what the layer put there, so that its parameters may be read."""

from __future__ import annotations

from typing import Any

from flax import nnx

_DENSE, _CALL = nnx.LinearGeneral, nnx.LinearGeneral.__call__


def is_plain(layer: Any, *, use_bias: bool, **made_with: Any) -> bool:
    """Whether a call of ``layer`` is Flax's product of the last axis with its kernel.

    An adapter, a subclass, a module with another ``dot_general`` or a bias of its own, and Flax's
    class with another ``__call__`` (``nnx.capture`` puts one there) have to be called.

    Args:
      layer: what stands where the layer put an ``nnx.LinearGeneral``.
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
