"""The names that signatures use for arrays and their shapes.

They are jaxtyping's where it is installed. ``import axattn`` needs jax and numpy only, so
without jaxtyping the subscripted names (``Float[Array, "... T N H"]``) stand for ``Any``.
"""

from __future__ import annotations

__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "Float",
    "Float32",
    "Int",
    "Integer",
    "Key",
    "Num",
    "PyTree",
    "Shaped",
]

try:
    from jaxtyping import (
        Array,
        ArrayLike,
        Bool,
        Float,
        Float32,
        Int,
        Integer,
        Key,
        Num,
        PyTree,
        Shaped,
    )
except ImportError:
    from typing import Any

    from jax import Array
    from jax.typing import ArrayLike

    class _Unchecked:
        def __class_getitem__(cls, item):
            return Any

    Bool = Float = Float32 = Int = Integer = Key = Num = PyTree = Shaped = _Unchecked
