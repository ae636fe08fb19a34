"""The arrays of caches: empty ones, tokens as they are stored, and their sizes."""

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
from axattn.cache._checks import as_array, positive


def encode(key: Array, value: Array | None, dtype: str, stored: Any) -> KeyValueArrays:
    """Tokens ``[B, T, K, size]`` as they are stored, and their scales ``[B, T, K]``."""
    if stored == dtype and not _quantization.is_quantized(dtype):
        return KeyValueArrays(key, value, None, None)
    return _encode(dtype, stored, key, value)


# Rounding and bits have no derivative: JAX would take it for zero without a word.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _encode(dtype: str, stored: Any, key: Array, value: Array | None) -> KeyValueArrays:
    if not _quantization.is_quantized(dtype):
        if value is not None:
            value = _quantization.cast_to_storage(value, dtype, stored)
        return KeyValueArrays(_quantization.cast_to_storage(key, dtype, stored), value, None, None)
    keys = _quantization.quantize(key, dtype)
    if value is None:
        return KeyValueArrays(keys.codes, None, keys.scales, None)
    values = _quantization.quantize(value, dtype)
    return KeyValueArrays(keys.codes, values.codes, keys.scales, values.scales)


@_encode.defjvp
def _no_derivative(dtype, stored, primals, tangents):
    held = dtype if stored == dtype else f"{dtype} as {stored}"
    raise NotImplementedError(
        f"keys and values that a cache stores in another form ({held}) have no derivative; a "
        'float32 cache has, with implementation "xla"'
    )


def empty_fields(
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
    """The fields of an empty cache whose arrays have so many rows of slots."""
    for name, count in (
        ("batch", batch),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
        ("value_head_dim", head_dim if value_head_dim is None else value_head_dim),
    ):
        positive(name, count)
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
    key_center = _center(key_center, num_kv_heads, head_dim, values_in_keys)

    def vectors(size):
        return jnp.zeros((rows, num_kv_heads, slots, size), _quantization.get_storage_dtype(dtype))

    def scales():
        if not _quantization.is_quantized(dtype):
            return None
        return jnp.zeros((rows, num_kv_heads, slots), jnp.float32)

    with_values = not values_in_keys
    return {
        "arrays": KeyValueArrays(
            vectors(head_dim),
            vectors(value_head_dim) if with_values else None,
            scales(),
            scales() if with_values else None,
        ),
        "lengths": jnp.zeros((batch,), jnp.int32),
        "overflowed": jnp.zeros((batch,), bool),
        "key_center": key_center,
        "dtype": dtype,
        "head_dim": head_dim,
        "value_head_dim": value_head_dim,
    }


def _center(
    key_center: ArrayLike | None, num_kv_heads: int, head_dim: int, values_in_keys: bool
) -> Array | None:
    if key_center is None:
        return None
    key_center = as_array("key_center", key_center)
    if not jnp.issubdtype(key_center.dtype, jnp.floating):
        raise TypeError(f"key_center takes floating-point numbers, got {key_center.dtype}")
    if key_center.shape != (num_kv_heads, head_dim):
        raise ValueError(
            f"key_center takes [K, H] = [{num_kv_heads}, {head_dim}], got {key_center.shape}"
        )
    if values_in_keys:
        raise ValueError("key_center takes None where values are in the keys")
    # A copy: the cache is to be donated, and the caller's array is not.
    return jnp.array(key_center, jnp.float32, copy=True)


# As which unsigned integers the bits of a dtype may be given.
_BITS = {"float8_e4m3fn": "uint8", "bfloat16": "uint16"}


def given_fields(
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
    """The fields of a cache with these arrays, but for those of its rows.

    ``rows`` and ``slots`` are the names of the arrays' first and third dimensions.
    """
    keys = as_array("keys", keys)
    if keys.ndim != 4 or 0 in keys.shape:
        raise ValueError(f"keys takes [{rows}, K, {slots}, H], got shape {keys.shape}")
    if dtype is None and keys.dtype.name in _BITS.values():
        raise TypeError(f"dtype takes that of the numbers whose bits keys holds, {keys.dtype}")
    dtype = _quantization.check_dtype(keys.dtype if dtype is None else dtype)
    *lead, head_dim = keys.shape
    shape = ", ".join(map(str, lead))

    def vectors(name, x):
        if x.dtype.name not in (dtype, _BITS.get(dtype)):
            bits = f" (or its bits, {_BITS[dtype]})" if dtype in _BITS else ""
            raise TypeError(f"{name} takes {dtype}{bits}, got {x.dtype}")
        x = x if x.dtype == jnp.dtype(dtype) else lax.bitcast_convert_type(x, jnp.dtype(dtype))
        return _quantization.cast_to_storage(x, dtype, _quantization.get_storage_dtype(dtype))

    def scales(name, x, vectors_of):
        if vectors_of is None or not _quantization.is_quantized(dtype):
            if x is not None:
                why = f"of {dtype}" if vectors_of is not None else "where values are in the keys"
                raise ValueError(f"{name} takes None {why}")
            return None
        takes = f"float32 [{rows}, K, {slots}] = [{shape}] for {dtype}"
        if x is None:
            raise ValueError(f"{name} takes {takes}, got None")
        x = as_array(name, x)
        if x.dtype != jnp.float32:
            raise TypeError(f"{name} takes {takes}, got {x.dtype}")
        if x.shape != tuple(lead):
            raise ValueError(f"{name} takes {takes}, got shape {x.shape}")
        return x

    if values is not None:
        values = as_array("values", values)
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
    positive("value_head_dim", value_head_dim)
    if values is None and value_head_dim > head_dim:
        raise ValueError(
            f"value_head_dim takes at most head_dim, {head_dim}, where values are in the keys, got "
            f"{value_head_dim}"
        )
    arrays = KeyValueArrays(
        vectors("keys", keys),
        None if values is None else vectors("values", values),
        scales("key_scales", key_scales, keys),
        scales("value_scales", value_scales, values),
    )
    return {
        "arrays": arrays,
        "key_center": _center(key_center, keys.shape[1], head_dim, values is None),
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
    """Bytes that a cache stores per token and layer, scales included.

    Args:
      num_kv_heads: K, key/value heads.
      head_dim: H, the size of a key.
      value_head_dim: h; H by default.
      dtype: of keys and values, as in `DenseCache.create`.
      values_in_keys: values are the first h features of the keys, and take nothing.

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
