"""Attention on several devices: shared-out batches and heads, and sequences (context parallelism).

::

    axes = parallel.Axes(batch="data", heads="model", sequence="context")
    out = parallel.attention(query, key, value, axes=axes, mesh=mesh, is_causal=True)
    cache = parallel.ShardedCache.create(DenseCache, batch, length, ..., axes=axes, mesh=mesh)

Inside a ``jax.shard_map`` of one's own `axattn.dot_product_attention` works on what a device has;
`local_attention` attends across the shards of a sequence, `DealtCache` over those of a cache.
"""

from axattn.parallel.attention import attention, explain, local_attention
from axattn.parallel.caches import ShardedCache
from axattn.parallel.dealt import DealtCache
from axattn.sharded.axes import Axes
from axattn.sharded.costs import Links
from axattn.sharded.layouts import positions

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
