"""Attention on several devices: sharded batches, heads and sequences (context parallelism).

::

    axes = parallel.Axes(batch="data", heads="model", sequence="context")
    out = parallel.attention(query, key, value, axes=axes, mesh=mesh, is_causal=True)
    cache = parallel.ShardedCache.create(DenseCache, batch, length, ..., axes=axes, mesh=mesh)

Inside your own ``jax.shard_map`` `axattn.dot_product_attention` works on the part of one device;
`local_attention` attends across the shards of a sequence, `StripedCache` across those of a cache.
"""

from typing import TYPE_CHECKING

from axattn._sharded.axes import Axes
from axattn._sharded.costs import Links
from axattn._sharded.layouts import positions
from axattn.parallel._attention import attention, explain, local_attention
from axattn.parallel._deprecated import get_deprecated_name as _get_deprecated_name
from axattn.parallel._sharded_cache import ShardedCache
from axattn.parallel._striped_cache import StripedCache

__all__ = [
    "Axes",
    "Links",
    "ShardedCache",
    "StripedCache",
    "attention",
    "explain",
    "local_attention",
    "positions",
]

if not TYPE_CHECKING:  # checkers would take any name of this module
    __getattr__ = _get_deprecated_name
