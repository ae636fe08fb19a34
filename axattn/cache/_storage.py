"""Storage of caches: their arrays, the encoding of tokens, and bytes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from axattn import _quantization
from axattn._stored import KeyValueArrays
from axattn._typing import Array, ArrayLike
from axattn.cache._checks import check_positive, convert_to_array


def encode_tokens(key: Array, value: Array | None, dtype: str, stored: Any) -> KeyValueArrays:
    """Return tokens ``[B, T, K, size]`` in their stored form, with scales ``[B, T, K]``."""
    if stored == dtype and not _quantization.is_quantized(dtype):
        return KeyValueArrays(key, value, None, None)
    return _convert_tokens(dtype, stored, key, value)


# Rounding and bit casts have no derivative: JAX would silently use zero.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _convert_tokens(dtype: str, stored: Any, key: Array, value: Array | None) -> KeyValueArrays:
    if not _quantization.is_quantized(dtype):
        if value is not None:
            value = _quantization.cast_to_storage(value, dtype, stored)
        return KeyValueArrays(_quantization.cast_to_storage(key, dtype, stored), value, None, None)
    keys = _quantization.quantize(key, dtype)
    if value is None:
        return KeyValueArrays(keys.codes, None, keys.scales, None)
    values = _quantization.quantize(value, dtype)
    return KeyValueArrays(keys.codes, values.codes, keys.scales, values.scales)


@_convert_tokens.defjvp
def _refuse_derivative(dtype, stored, primals, tangents):
    form = dtype if stored == dtype else f"{dtype} as {stored}"
    raise NotImplementedError(
        f"keys and values that a cache stores in another form ({form}) have no derivative; a "
        'float32 cache has, with implementation "xla"'
    )


def make_empty_fields(
    batch: int,
    rows: int,
    slots: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    value_head_dim: int | None,
    values_in_keys: bool,
    dtype: DTypeLike | None,
    key_center: ArrayLike | None,
) -> dict[str, Any]:
    """Make the fields of an empty cache with ``rows`` of ``slots``. Check all sizes."""
    for name, count in (
        ("batch", batch),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
        ("value_head_dim", head_dim if value_head_dim is None else value_head_dim),
    ):
        check_positive(name, count)
    dtype = _quantization.check_dtype(dtype)
    storage_dtype = _quantization.get_storage_dtype(dtype)
    if jax.dtypes.canonicalize_dtype(storage_dtype) != storage_dtype:
        raise TypeError(f"dtype takes {dtype} with jax_enable_x64 only")
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    if values_in_keys and value_head_dim > head_dim:
        raise ValueError(
            f"value_head_dim takes at most head_dim, {head_dim}, where values are in the keys, got "
            f"{value_head_dim}"
        )
    key_center = _check_key_center(key_center, num_kv_heads, head_dim, values_in_keys)

    def make_vectors(size):
        return jnp.zeros((rows, num_kv_heads, slots, size), _quantization.get_storage_dtype(dtype))

    def make_scales():
        if not _quantization.is_quantized(dtype):
            return None
        return jnp.zeros((rows, num_kv_heads, slots), jnp.float32)

    with_values = not values_in_keys
    return {
        "arrays": KeyValueArrays(
            make_vectors(head_dim),
            make_vectors(value_head_dim) if with_values else None,
            make_scales(),
            make_scales() if with_values else None,
        ),
        "lengths": jnp.zeros((batch,), jnp.int32),
        "overflowed": jnp.zeros((batch,), bool),
        "key_center": key_center,
        "dtype": dtype,
        "head_dim": head_dim,
        "value_head_dim": value_head_dim,
    }


def _check_key_center(
    key_center: ArrayLike | None, num_kv_heads: int, head_dim: int, values_in_keys: bool
) -> Array | None:
    if key_center is None:
        return None
    key_center = convert_to_array("key_center", key_center)
    if not jnp.issubdtype(key_center.dtype, jnp.floating):
        raise TypeError(f"key_center takes floating-point numbers, got {key_center.dtype}")
    if key_center.shape != (num_kv_heads, head_dim):
        raise ValueError(
            f"key_center takes [K, H] = [{num_kv_heads}, {head_dim}], got {key_center.shape}"
        )
    if values_in_keys:
        raise ValueError("key_center takes None where values are in the keys")
    # A copy: the cache can be donated, and the caller keeps the array.
    return jnp.array(key_center, jnp.float32, copy=True)


# The unsigned integers that can hold the bits of a dtype.
_BITS = {"float8_e4m3fn": "uint8", "bfloat16": "uint16"}


def wrap_arrays(
    keys: ArrayLike,
    values: ArrayLike | None,
    key_scales: ArrayLike | None,
    value_scales: ArrayLike | None,
    *,
    rows: str,
    slots: str,
    value_head_dim: int | None,
    dtype: DTypeLike | None,
    key_center: ArrayLike | None,
) -> dict[str, Any]:
    """Make the fields of a cache of existing arrays, without ``lengths`` and ``overflowed``.

    ``rows`` and ``slots`` name the first and third dimension of the arrays in errors.
    """
    keys = convert_to_array("keys", keys)
    if keys.ndim != 4 or 0 in keys.shape:
        raise ValueError(f"keys takes [{rows}, K, {slots}, H], got shape {keys.shape}")
    if dtype is None and keys.dtype.name in _BITS.values():
        raise TypeError(f"dtype takes that of the numbers whose bits keys holds, {keys.dtype}")
    dtype = _quantization.check_dtype(keys.dtype if dtype is None else dtype)
    *lead, head_dim = keys.shape
    shape = ", ".join(map(str, lead))

    def convert_vectors(name, x):
        if x.dtype.name not in (dtype, _BITS.get(dtype)):
            bits = f" (or its bits, {_BITS[dtype]})" if dtype in _BITS else ""
            raise TypeError(f"{name} takes {dtype}{bits}, got {x.dtype}")
        x = x if x.dtype == jnp.dtype(dtype) else lax.bitcast_convert_type(x, jnp.dtype(dtype))
        return _quantization.cast_to_storage(x, dtype, _quantization.get_storage_dtype(dtype))

    def check_scales(name, x, vectors):
        if vectors is None or not _quantization.is_quantized(dtype):
            if x is not None:
                why = f"of {dtype}" if vectors is not None else "where values are in the keys"
                raise ValueError(f"{name} takes None {why}")
            return None
        takes = f"float32 [{rows}, K, {slots}] = [{shape}] for {dtype}"
        if x is None:
            raise ValueError(f"{name} takes {takes}, got None")
        x = convert_to_array(name, x)
        if x.dtype != jnp.float32:
            raise TypeError(f"{name} takes {takes}, got {x.dtype}")
        if x.shape != tuple(lead):
            raise ValueError(f"{name} takes {takes}, got shape {x.shape}")
        return x

    if values is not None:
        values = convert_to_array("values", values)
        if values.ndim != 4 or values.shape[:3] != tuple(lead) or values.shape[3] == 0:
            raise ValueError(
                f"values takes [{rows}, K, {slots}, h] = [{shape}, h] like keys, got shape "
                f"{values.shape}"
            )
        if value_head_dim not in (None, values.shape[3]):
            raise ValueError(
                f"value_head_dim takes that of values, {values.shape[3]}, or None, got "
                f"{value_head_dim!r}"
            )
        value_head_dim = values.shape[3]
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    check_positive("value_head_dim", value_head_dim)
    if values is None and value_head_dim > head_dim:
        raise ValueError(
            f"value_head_dim takes at most head_dim, {head_dim}, where values are in the keys, got "
            f"{value_head_dim}"
        )
    arrays = KeyValueArrays(
        convert_vectors("keys", keys),
        None if values is None else convert_vectors("values", values),
        check_scales("key_scales", key_scales, keys),
        check_scales("value_scales", value_scales, values),
    )
    return {
        "arrays": arrays,
        "key_center": _check_key_center(key_center, keys.shape[1], head_dim, values is None),
        "dtype": dtype,
        "head_dim": head_dim,
        "value_head_dim": value_head_dim,
    }


def bytes_per_token(
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int | None = None,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    values_in_keys: bool = False,
) -> int:
    """Return the bytes that a cache stores per token and layer, scales included.

    Args:
      num_kv_heads: K, key/value heads.
      head_dim: H, the size of a key.
      value_head_dim: h; H by default.
      dtype: dtype of keys and values, as in `DenseCache.create`.
      values_in_keys: values are the first h features of the keys, and take no bytes.

    Raises:
      TypeError: another ``dtype``.

    Example:
      >>> from axattn.cache import bytes_per_token
      >>> bytes_per_token(1, 128), bytes_per_token(1, 128, dtype="int8")
      (512, 264)
      >>> 32 * 4096 * bytes_per_token(8, 128) / 2**20  # 32 layers, 4096 tokens, in MiB
      512.0
    """
    total = _quantization.bytes_per_vector(dtype, head_dim)
    if not values_in_keys:
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        total += _quantization.bytes_per_vector(dtype, value_head_dim)
    return num_kv_heads * total
