"""Stored numbers as operands of the matrix unit, without their scales."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from axattn import _quantization


def numbers(codes: jax.Array, dtype: str, product: Any) -> jax.Array:
    """Codes ``[heads, pieces, piece, size]`` as ``[heads, pieces * piece, size]`` for products.

    Or ``[heads, size, keys]``, as they are. ``dtype`` is that of the numbers where the array holds
    their bytes. Bytes that are no number become one: what stands in unused slots must not be NaN
    after it has been decoded.
    """
    if dtype == "float8_e4m3fn":
        codes = _of_float8(codes)
    elif dtype in ("int8", "int4"):
        codes = codes.astype(jnp.float32)
    elif codes.dtype != jnp.dtype(dtype):
        codes = lax.bitcast_convert_type(codes, jnp.dtype(dtype))
    if codes.ndim == 3:
        return codes.astype(product)
    heads, pieces, piece, size = codes.shape
    if piece % (8 * 4 // codes.dtype.itemsize):
        codes = codes.astype(jnp.float32)  # whose tiles have the fewest rows
    return codes.reshape(heads, pieces * piece, size).astype(product)


def may_be_nan(dtype: str) -> bool:
    """Whether `numbers` gives NaN for something that a slot may hold."""
    return not _quantization.is_quantized(dtype)


def _of_float8(codes: jax.Array) -> jax.Array:
    """float32 of the bytes of float8_e4m3fn: a sign, 4 bits of exponent (bias 7), 3 of mantissa.

    By integers, since older chips have no such conversion. NaN bytes become 480.
    """
    code = codes.astype(jnp.int32)
    magnitude, sign = code & 0x7F, (code & 0x80) << 24
    # The bits of a normal number, with float32's bias.
    normal = lax.bitcast_convert_type((magnitude << 20) + (120 << 23), jnp.float32)
    small = magnitude.astype(jnp.float32) * 2.0**-9  # denormals: multiples of 2^-9
    value = jnp.where(magnitude < 8, small, normal)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(value, jnp.int32) | sign, jnp.float32)
