"""Key/value caches as values: dense, ring and paged, in any precision.

::

    cache = DenseCache.create(batch, length, num_kv_heads, head_dim, dtype=jnp.int8)
    out, cache = cache.extend(query, key, value)      # append, then attend: prefill and decode

A cache is a pytree that is passed in and returned; donate it to ``jax.jit`` and it is updated in
place. The layers of `axattn.linen` and `axattn.nnx` take any: ``layer(x, cache=cache)``.
"""

from axattn.cache.base import Cache
from axattn.cache.dense import DenseCache
from axattn.cache.fields import bytes_per_token
from axattn.cache.paged import PagedCache
from axattn.cache.pool import PagePool
from axattn.cache.pool_types import PoolExhaustedError, PoolStatistics, UnknownSequenceError
from axattn.cache.prefill import prefill
from axattn.cache.ring import RingCache

__all__ = [
    "Cache",
    "DenseCache",
    "PagePool",
    "PagedCache",
    "PoolExhaustedError",
    "PoolStatistics",
    "RingCache",
    "UnknownSequenceError",
    "bytes_per_token",
    "prefill",
]
