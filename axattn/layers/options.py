"""The options that the layers add to Flax's, checked and brought into one form."""

from __future__ import annotations

import operator
from collections.abc import Sequence

QK_NORMS = (None, "layer", "rms")


def count(name: str, value) -> int:
    """``value``, if it is a positive integer; errors say ``name``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number


def head_layout(num_heads: int, num_kv_heads: int | None, qkv_features: int) -> tuple[int, int]:
    """The number of key/value heads K and the head size H of a layer.

    Raises:
      ValueError: a count is not positive, ``num_heads`` is not a multiple of ``num_kv_heads``, or
        ``qkv_features`` (the size of all query heads together) is not one of ``num_heads``.
      TypeError: a count is not an integer.
    """
    num_heads = count("num_heads", num_heads)
    num_kv_heads = num_heads if num_kv_heads is None else count("num_kv_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
        )
    if count("qkv_features", qkv_features) % num_heads:
        raise ValueError(
            f"qkv_features must be a multiple of num_heads, got {qkv_features} and {num_heads}"
        )
    return num_kv_heads, qkv_features // num_heads


def qk_norm_kind(normalize_qk: bool, qk_norm: str | None, per_head: bool = True) -> str | None:
    """Which norm queries and keys get: None, "layer" or "rms".

    ``normalize_qk=True`` is Flax's way of saying "layer".
    """
    if not per_head and not normalize_qk and qk_norm is None:
        raise ValueError("qk_norm_per_head=False takes a qk_norm, 'layer' or 'rms', got None")
    if qk_norm not in QK_NORMS:
        raise ValueError(f"qk_norm must be one of {QK_NORMS}, got {qk_norm!r}")
    if normalize_qk and qk_norm == "rms":
        raise ValueError(
            "normalize_qk=True is a layer norm and contradicts qk_norm='rms'; leave normalize_qk "
            "at False to have qk_norm='rms'"
        )
    return "layer" if normalize_qk else qk_norm


def static(value):
    """A field that may be a sequence of numbers or names, as something hashable."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def requested(**options) -> dict:
    """The options that were asked for: all but those that are None or False."""
    return {
        name: value for name, value in options.items() if value is not None and value is not False
    }
