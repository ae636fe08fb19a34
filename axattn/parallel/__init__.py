"""Attention on several devices: shared-out batches and heads, and sequences (context parallelism).

::

    axes = parallel.Axes(batch="data", heads="model", sequence="context")
    out = parallel.attention(query, key, value, axes=axes, mesh=mesh, is_causal=True)
    cache = parallel.ShardedCache.create(DenseCache, batch, length, ..., axes=axes, mesh=mesh)

Inside a ``jax.shard_map`` of one's own `axattn.dot_product_attention` works on what a device has;
`local_attention` attends across the shards of a sequence, `DealtCache` over those of a cache.
"""

from axattn._sharded.axes import Axes
from axattn._sharded.costs import Links
from axattn._sharded.layouts import positions
from axattn.parallel._attention import attention, explain, local_attention
from axattn.parallel._sharded_cache import ShardedCache
from axattn.parallel._striped_cache import DealtCache

__all__ = [
    "Axes",
    "DealtCache",
    "Links",
    "ShardedCache",
    "attention",
    "explain",
    "local_attention",
    "positions",
]
