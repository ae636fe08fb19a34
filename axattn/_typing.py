"""Types in signatures: arrays with their shapes, and names that are strings.

The types of arrays are jaxtyping's where it is installed. ``import axattn`` needs jax and numpy
only, so without jaxtyping the subscripted names (``Float[Array, "... T N H"]``) stand for ``Any``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from jax import lax

__all__ = [
    "AnyCache",
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


class AnyCache(Protocol):
    """What every cache has, a whole one (`axattn.cache`) or one in parts (`axattn.parallel`)."""

    @property
    def batch(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def value_head_dim(self) -> int: ...
    @property
    def values_in_keys(self) -> bool: ...
    @property
    def stores_floats(self) -> bool: ...
    @property
    def lengths(self) -> Any: ...

    def next_positions(self, length: int) -> Any: ...
    def append(self, key: Any, value: Any = None, *, lengths: Any = None) -> Any: ...
    def attend(self, query: Any, **options: Any) -> Any: ...
    def extend(self, query: Any, key: Any, value: Any = None, **options: Any) -> Any: ...


# A call returns a cache of the type that it was given.
CacheType = TypeVar("CacheType", bound=AnyCache)

# Names as strings, for type checkers; values are checked where they are read.
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
    from jax import Array
    from jax.typing import ArrayLike

    class _Unchecked:
        def __class_getitem__(cls, item):
            return Any

    if not TYPE_CHECKING:
        Bool = Float = Float32 = Int = Integer = Key = Num = PyTree = Shaped = _Unchecked
