"""What storing keys and values in fewer bits does to the output of attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from axattn import quantization
from axattn.cache import DenseCache

_OFFSET_SIGMAS = 10.0
_OFFSET_CHANNELS = 2


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """Norm of the output's error / norm of the output, against float64 on the host.

    Attributes:
      dtype: of the cache; queries are float32.
      gaussian: keys, values and queries N(0, 1).
      offset: two channels of the keys are 10 sigma off.
      centered: the same, with their mean as ``key_center``.
    """

    dtype: str
    kv_heads: int
    head_dim: int
    tokens: int
    gaussian: float
    offset: float
    centered: float


def quantization_error(
    dtype: str, *, heads: int, kv_heads: int, head_dim: int, tokens: int, seed: int = 0
) -> QuantizationError:
    """Attends from 64 queries per head over ``tokens`` keys, each query to all of them."""
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((4, 16, heads, head_dim), np.float32)
    key, value = rng.standard_normal((2, 4, tokens, kv_heads, head_dim), np.float32)
    shifted = key.copy()
    shifted[..., :_OFFSET_CHANNELS] += _OFFSET_SIGMAS
    center = quantization.key_center(jnp.asarray(shifted))
    return QuantizationError(
        dtype,
        kv_heads,
        head_dim,
        tokens,
        gaussian=_error(dtype, query, key, value, None),
        offset=_error(dtype, query, shifted, value, None),
        centered=_error(dtype, query, shifted, value, center),
    )


def _error(dtype, query, key, value, center) -> float:
    batch, tokens, kv_heads, head_dim = key.shape
    cache = DenseCache.create(batch, tokens, kv_heads, head_dim, dtype=dtype, key_center=center)
    stored = cache.dtype if cache.stores_floats else jnp.float32
    out = _attend(cache, query, jnp.asarray(key, stored), jnp.asarray(value, stored))
    wanted = reference(query, key, value)
    return float(np.linalg.norm(np.asarray(out, np.float64) - wanted) / np.linalg.norm(wanted))


@jax.jit
def _attend(cache, query, key, value):
    return cache.append(key, value).attend(query, is_causal=False)


def reference(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Attention to all keys in float64: query [B, T, N, H], key and value [B, S, K, H]."""
    batch, length, heads, head_dim = query.shape
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    # Query head n reads key/value head n // (N / K).
    query = query.reshape(batch, length, key.shape[2], -1, head_dim)
    scores = np.einsum("btkgh,bskh->bkgts", query, key) / np.sqrt(head_dim)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bkgts,bskh->btkgh", weights, value).reshape(batch, length, heads, -1)
