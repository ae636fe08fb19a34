"""Key/value caches as values: dense, ring and paged, in any precision.

::

    cache = DenseCache.create(batch, length, num_kv_heads, head_dim, dtype=jnp.int8)
    out, cache = cache.extend(query, key, value)      # append, then attend: prefill and decode

A cache is a pytree that is passed in and returned; donated to ``jax.jit`` it is updated in place.
The layers of `axattn.linen` and `axattn.nnx` take every kind: ``layer(x, cache=cache)``.
"""

from axattn.cache._base import Cache
from axattn.cache._dense import DenseCache
from axattn.cache._paged import PagedCache
from axattn.cache._pool import PagePool
from axattn.cache._pool_types import PoolExhaustedError, PoolStatistics, UnknownSequenceError
from axattn.cache._prefill import prefill
from axattn.cache._ring import RingCache
from axattn.cache._storage import bytes_per_token

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
