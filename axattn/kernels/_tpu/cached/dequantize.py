"""Numbers of a cache as operands of the matrix unit; their scales are applied elsewhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from axattn import _quantization


def decode_numbers(codes: jax.Array, stored_dtype: str, dtype: Any) -> jax.Array:
    """Return codes ``[heads, copies, slots, size]`` as ``[heads, copies * slots, size]``.

    Codes ``[heads, size, slots]`` keep their shape. ``stored_dtype`` is the dtype of the numbers;
    the array may hold their bytes as integers. ``dtype`` is that of the result. Quantized bytes
    that are NaN become numbers, since unused slots may hold any bytes.
    """
    if stored_dtype == "float8_e4m3fn":
        codes = _decode_float8(codes)
    elif stored_dtype in ("int8", "int4"):
        codes = codes.astype(jnp.float32)
    elif codes.dtype != jnp.dtype(stored_dtype):
        codes = lax.bitcast_convert_type(codes, jnp.dtype(stored_dtype))
    if codes.ndim == 3:
        return codes.astype(dtype)
    heads, copies, slots, size = codes.shape
    if slots % (8 * 4 // codes.dtype.itemsize):
        codes = codes.astype(jnp.float32)  # its memory tiles have the fewest rows
    return codes.reshape(heads, copies * slots, size).astype(dtype)


def may_be_nan(stored_dtype: str) -> bool:
    """Say whether an unused slot may be NaN after decoding."""
    return not _quantization.is_quantized(stored_dtype)


def _decode_float8(codes: jax.Array) -> jax.Array:
    """Return float32 of float8_e4m3fn: a sign, 4 bits of exponent (bias 7), 3 of mantissa.

    By integer operations, since older chips cannot convert it. NaN bytes become 480.
    """
    code = codes.astype(jnp.int32)
    magnitude, sign = code & 0x7F, (code & 0x80) << 24
    # The bits of a normal number, with float32's bias.
    normal = lax.bitcast_convert_type((magnitude << 20) + (120 << 23), jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * 2.0**-9  # multiples of 2^-9
    value = jnp.where(magnitude < 8, subnormal, normal)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(value, jnp.int32) | sign, jnp.float32)
