"""The names that signatures use for arrays and their shapes, and for what strings name.

Those of arrays are jaxtyping's where it is installed. ``import axattn`` needs jax and numpy only,
so without jaxtyping the subscripted names (``Float[Array, "... T N H"]``) stand for ``Any``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

from jax import lax

if TYPE_CHECKING:
    from axattn.cache import Cache
    from axattn.parallel.held import HeldCache  # registered as a `Cache`, which checkers do not see

__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "CacheType",
    "Float",
    "Float32",
    "Implementation",
    "Int",
    "Integer",
    "Key",
    "Layout",
    "Num",
    "Precision",
    "PyTree",
    "QkNorm",
    "Shaped",
    "Strategy",
    "present",
]

_Type = TypeVar("_Type")

# What a call gets as ``cache`` it returns, with the same type.
CacheType = TypeVar("CacheType", bound="Cache | HeldCache")

# What is named by a string, for type checkers; values are checked where they are read.
Implementation = Literal["xla", "xla_chunked", "mosaic_gpu", "mosaic_tpu", "cudnn", "mosaic"]
Strategy = Literal["ring", "gather", "ulysses"]
Layout = Literal["contiguous", "zigzag"]
QkNorm = Literal["layer", "rms"]
_PrecisionName = Literal[
    "default", "high", "highest", "fastest", "float32", "bfloat16_3x", "tensorfloat32", "bfloat16"
]
Precision = (
    _PrecisionName
    | lax.Precision
    | tuple[_PrecisionName, _PrecisionName]
    | tuple[lax.Precision, lax.Precision]
    | lax.DotAlgorithm
    | lax.DotAlgorithmPreset
)


def present(value: _Type | None) -> _Type:
    """Return ``value``, for type checkers: they cannot see that it is not None here."""
    assert value is not None
    return value


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

    if not TYPE_CHECKING:
        Bool = Float = Float32 = Int = Integer = Key = Num = PyTree = Shaped = _Unchecked
