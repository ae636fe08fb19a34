"""Codes and scales of keys and values. `axattn.quantization` describes them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn import _jax_compat, _serialization
from axattn._dtypes import FLOATS, promote_floats
from axattn._typing import Array, Float, Integer

# The largest code of each quantized dtype. -128 and -8 are not used: codes are symmetric.
LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0, "int4": 7.0}


class Quantized(NamedTuple):
    """Codes as they are stored, and the scale of each vector: what `quantize` returns.

    A named tuple, and so a pytree. It checks nothing.

    Attributes:
      codes: ``[..., H]``, int8, int4 or, of float8_e4m3fn, the bits of the codes as uint8.
      scales: float32 ``[...]``, one for each vector.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn import quantization
      >>> quantized = quantization.quantize(jnp.array([[1.0, -2.0], [0.0, 0.0]]), "int8")
      >>> quantized.codes.tolist()
      [[64, -127], [0, 0]]
      >>> (127 * quantized.scales).tolist()
      [2.0, 0.0]
    """

    codes: Array
    scales: Float[Array, "..."]


_serialization.register_named_tuple(Quantized)


def check_dtype(dtype: Any) -> str:
    """Return the name of a dtype that a cache can have; raise TypeError for another."""
    try:
        name = repr(None) if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in (*FLOATS, *LIMITS):
        raise TypeError(f"dtype takes one of {', '.join((*FLOATS, *LIMITS))}, got {dtype!r}")
    return name


def is_quantized(dtype: str) -> bool:
    return dtype in LIMITS


def get_storage_dtype(dtype: str) -> Any:
    """Return the JAX dtype of the array that holds numbers of ``dtype``, or their bits."""
    if dtype == "float8_e4m3fn":
        return jnp.dtype(jnp.uint8)
    if dtype == "bfloat16" and not _jax_compat.cpu_moves_bfloat16():
        return jnp.dtype(jnp.uint16)
    return jnp.dtype(dtype)


def cast_to_storage(x: Array, dtype: str, stored: Any) -> Array:
    """Cast numbers to ``dtype`` and return them, or their bits, as an array of dtype ``stored``."""
    x = x.astype(dtype)
    return x if x.dtype == stored else lax.bitcast_convert_type(x, stored)


def count_bytes(array: Any) -> int:
    """Return the bytes of an array or its shape in memory: an int4 takes half a byte."""
    bits = 4 if array.dtype == jnp.int4 else 8 * array.dtype.itemsize
    return -(-math.prod(array.shape) * bits // 8)


def quantize(x: Float[Array, "... H"], dtype: Any) -> Quantized:
    """Compute codes and float32 scales of the vectors along the last axis.

    The scale of a vector is its largest magnitude over the largest code: 127, 448 or 7. A zero
    vector has codes and scale 0. A vector with a NaN or an infinity comes back as NaN from
    `dequantize`, all of it, and no other vector does.

    Args:
      x: ``[..., H]``, floating point.
      dtype: int8, float8_e4m3fn or int4, as a dtype or its name.

    Returns:
      Codes ``[..., H]`` and scales, float32 ``[...]``, as a `Quantized`.

    Raises:
      TypeError: another ``dtype``.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn import quantization
      >>> x = jnp.array([0.1, -0.5, 1.0])
      >>> quantized = quantization.quantize(x, jnp.int8)
      >>> quantized.codes
      Array([ 13, -64, 127], dtype=int8)
      >>> error = jnp.abs(quantization.dequantize(quantized, jnp.int8) - x)
      >>> bool((error <= quantized.scales / 2).all())
      True
    """
    name = check_dtype(dtype)
    if name not in LIMITS:
        raise TypeError(f"dtype takes one of {', '.join(LIMITS)}, got {dtype!r}")
    limit = LIMITS[name]
    x = x.astype(jnp.float32)
    top = jnp.abs(x).max(-1)
    # No code is NaN: the scale alone tells that a vector is not finite.
    finite = jnp.isfinite(top)
    scales = jnp.where(finite, top / limit, jnp.nan)
    # In two steps, since limit / top overflows where top is denormal.
    unit = jnp.where((top > 0) & finite, top, 1.0)[..., None]
    codes = jnp.where(finite[..., None], x, 0.0) / unit * limit
    if name == "float8_e4m3fn":
        codes = jnp.clip(codes, -limit, limit)
    else:
        codes = jnp.clip(jnp.rint(codes), -limit, limit)
    return Quantized(cast_to_storage(codes, name, get_storage_dtype(name)), scales)


def cast_codes(codes: Array, dtype: str, compute_dtype: Any) -> Array:
    """Cast stored codes ``[..., H]`` to numbers of ``compute_dtype``, without their scales.

    Codes are exact in bfloat16, float16 and float32.
    """
    if codes.dtype != jnp.dtype(dtype):
        codes = lax.bitcast_convert_type(codes, jnp.dtype(dtype))
    return codes.astype(compute_dtype)


def dequantize(quantized: Quantized, dtype: Any) -> Float[Array, "... H"]:
    """Restore the vectors, to test or to look at a cache: attention folds the scales instead.

    Args:
      quantized: what `quantize` returned.
      dtype: that of its codes: int8, float8_e4m3fn or int4.

    Returns:
      float32 ``[..., H]``.

    Raises:
      TypeError: a ``dtype`` that no cache has.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn import quantization
      >>> quantized = quantization.quantize(jnp.array([[2.0, -8.0, 16.0]]), "float8_e4m3fn")
      >>> quantization.dequantize(quantized, "float8_e4m3fn")
      Array([[ 2., -8., 16.]], dtype=float32)
    """
    name = check_dtype(dtype)
    numbers = cast_codes(quantized.codes, name, jnp.float32)
    return numbers * quantized.scales[..., None]


def key_center(
    key: Float[Array, "B T K H"], lengths: Integer[Array, " B"] | None = None
) -> Float[Array, "K H"]:
    """Compute the mean key per head and channel, to give to a cache as ``key_center``.

    A few channels of keys often carry large constant offsets (KIVI,
    https://arxiv.org/abs/2402.02750, has figures of them), which take up the range of the scales.
    Attention over ``key - center`` differs by a number per query, which is added back to its
    scores: exact, also under a soft cap and in the LSE.

    Args:
      key: ``[B, T, K, H]``, floating point, as it is appended (after RoPE).
      lengths: int ``[B]``, the leading tokens that are real; all by default.

    Returns:
      float32 ``[K, H]``; zeros where there is no token.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn import cache, quantization
      >>> key = jnp.array([1.0, 3.0, 100.0]).reshape(1, 3, 1, 1)  # the last one is padding
      >>> center = quantization.key_center(key, jnp.array([2]))
      >>> center
      Array([[2.]], dtype=float32)
      >>> kv = cache.DenseCache.create(1, 8, 1, 1, dtype="int8", key_center=center)
    """
    key = key.astype(jnp.float32)
    if lengths is None:
        return key.mean((0, 1))
    real = (
        jnp.arange(key.shape[1], dtype=jnp.int32)[None] < jnp.asarray(lengths, jnp.int32)[:, None]
    )
    total = jnp.where(real[..., None, None], key, 0.0).sum((0, 1))
    return total / jnp.maximum(real.sum(), 1).astype(jnp.float32)


def get_product_dtype(dtype: str, query_dtype: Any) -> Any:
    """Return the dtype in which a query is multiplied with stored keys and values."""
    if is_quantized(dtype):
        # A weight times a small value scale would leave the range of float16.
        return promote_floats(query_dtype, jnp.bfloat16)
    return promote_floats(query_dtype, dtype)


def bytes_per_vector(dtype: Any, head_dim: int) -> int:
    """Return the bytes of one stored vector, its scale included.

    Args:
      dtype: float32, bfloat16, float16, float64, or int8, float8_e4m3fn, int4, which have a
        float32 scale.
      head_dim: its features.

    Returns:
      Bytes. An int4 takes half a byte.

    Raises:
      TypeError: another ``dtype``.

    Example:
      >>> from axattn import quantization
      >>> [quantization.bytes_per_vector(d, 128) for d in ("bfloat16", "int8", "int4")]
      [256, 132, 68]
    """
    name = check_dtype(dtype)
    vector = jax.ShapeDtypeStruct((head_dim,), get_storage_dtype(name))
    return count_bytes(vector) + (4 if is_quantized(name) else 0)
