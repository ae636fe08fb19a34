"""A cache whose tokens are dealt out to the shards of a mesh axis: token p is on shard p % n.

Inside ``shard_map``. Every shard answers for the tokens that it holds, and the answers are merged
by their LSE: a step sends queries' outputs, never keys or values. Dealing tokens out one by one
fills all shards alike, whatever the lengths are, so that all can tell without asking how many each
of them holds, and which pages they are in. And a causal mask stays one: of the slots j of shard r a
query at position p sees those with ``j n + r <= p``, that is ``j <= (p - r) // n``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from axattn import _mask_parts as parts
from axattn import _serialization
from axattn._call import AttentionCall
from axattn._implementations import registry
from axattn._jax_compat import vary_over, varying_axes
from axattn._masks import Mask, positions_or_default
from axattn._sharded.combine import add_sinks, combine_shards
from axattn._typing import present
from axattn.cache import Cache, RingCache
from axattn.cache._write import write
from axattn.parallel._partitioned_cache import HeldCache, resized


@functools.partial(_serialization.register_dataclass, data=("cache",), static=("axis",))
@dataclasses.dataclass(frozen=True, eq=False)
class DealtCache(HeldCache):
    """One shard's part of a cache, inside a ``jax.shard_map`` of one's own.

    It does what an `axattn.cache.Cache` does, with tokens and queries that all shards are given,
    and gives all of them the same results. ``cache.arrays`` are this shard's, and all else is the
    same on all of them: so say ``out_specs``.

    Attributes:
      cache: dense or paged, of any dtype, with an n-th of the slots: of each row, or of each page.
        A block table is the same on all shards. Lengths are those of the whole rows.
      axis: the mesh axis.

    Raises:
      ValueError: a ring, which is short as it is; by its methods as `axattn.cache.Cache`.
      TypeError: by its methods, as `axattn.cache.Cache`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec
      >>> from axattn import parallel
      >>> from axattn.cache import DenseCache
      >>> shards, auto = jax.device_count(), (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((shards,), ("context",), axis_types=auto)
      >>> def prompt(query, key, value):  # all shards are given all tokens
      ...     part = DenseCache.create(1, 8, num_kv_heads=1, head_dim=16, dtype="float32")
      ...     out, cache = parallel.DealtCache(part, "context").extend(query, key, value)
      ...     return out, cache.lengths
      >>> program = jax.shard_map(prompt, mesh=mesh, in_specs=PartitionSpec(),
      ...                         out_specs=PartitionSpec())
      >>> query, key = jnp.ones((1, 7, 4, 16)), jnp.ones((1, 7, 1, 16))
      >>> out, lengths = jax.jit(program)(query, key, key)  # there is room for 8 tokens per shard
      >>> out.shape, lengths.tolist()
      ((1, 7, 4, 16), [7])
    """

    cache: Cache
    axis: str

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.cache, RingCache):
            raise ValueError("cache takes a dense or a paged one: a ring is short as it is")

    @property
    def whole(self) -> Cache:
        """The cache as it would be on one device, with shapes in place of its arrays."""
        return whole(self.cache, lax.axis_size(self.axis))

    @property
    def nbytes(self) -> int:
        """Bytes of this shard's keys, values and scales."""
        return self.cache.nbytes

    def copy_pages(self, sources: Any, targets: Any) -> DealtCache:
        """As `axattn.cache.PagedCache.copy_pages`.

        Args:
          sources: int ``[n]``, pages that are copied; a pair with -1 is left out.
          targets: int ``[n]``, pages that become the copies.

        Raises:
          ValueError: shapes that differ, or pages that the pool does not have.
          TypeError: anything but integers.
        """
        paged: Any = self.cache
        return dataclasses.replace(self, cache=paged.copy_pages(sources, targets))

    def fork(self, rows: Any) -> DealtCache:
        """A cache whose row i is row ``rows[i]`` of this one: as `axattn.cache.Cache.fork`.

        Args:
          rows: int ``[B']``, rows of this cache; B' is the batch of the new one.

        Raises:
          ValueError: another dtype or shape, or rows that this cache does not have.
          TypeError: ``rows`` is no array.
        """
        return dataclasses.replace(self, cache=self.cache.fork(rows))

    def _append(self, key, value, counts, overflowed):
        cache = append(self.cache, self.axis, key, value, counts)
        return dataclasses.replace(self, cache=cache)._with(overflowed=overflowed)

    def _attend(self, call, implementation):
        return attend(self.cache, self.axis, call, implementation)


def whole(cache: Cache, shards: int) -> Cache:
    """The sizes of a shard's ``cache`` on all shards: each has its slots of every row or page."""
    return resized(cache, slots=cache.arrays.keys.shape[2] * shards)


def share(total: Any, shard: Any, shards: int) -> Any:
    """How many of so many tokens a shard holds."""
    return (total - shard + shards - 1) // shards


def append(
    cache: Cache, axis: str, key: jax.Array, value: jax.Array | None, counts: jax.Array
) -> Cache:
    """The shard's ``cache`` with its share of tokens that fit: ``counts`` of those in each row."""
    shard, shards = lax.axis_index(axis), lax.axis_size(axis)
    before, after = (share(n, shard, shards) for n in (cache.lengths, cache.lengths + counts))
    first = (shard - cache.lengths) % shards
    key = _own(key, first, shards)
    value = None if value is None else _own(value, first, shards)
    local = dataclasses.replace(cache, lengths=before)
    tokens = cache._encoded(key, value)
    places = local._places(after - before, key.shape[1])
    axes = varying_axes(*jax.tree.leaves((cache.arrays, tokens, places)))
    arrays = write(vary_over(cache.arrays, axes), tokens, places)
    return dataclasses.replace(cache, arrays=arrays, lengths=cache.lengths + counts)


def _own(tokens: jax.Array, first: jax.Array, shards: int) -> jax.Array:
    """Every n-th of tokens ``[B, T, ...]``, from ``first`` (int32 ``[B]``, below n) on."""
    batch, length, *rest = tokens.shape
    if length == 1:
        return tokens  # this shard's, or of no row
    count = -(-length // shards)
    tokens = jnp.pad(tokens, ((0, 0), (0, count * shards - length), *((0, 0) for _ in rest)))
    tokens = tokens.reshape(batch, count, shards, *rest)

    def row(tokens, first):
        return lax.dynamic_index_in_dim(tokens, first, 1, keepdims=False)

    return jax.vmap(row)(tokens, first)


def attend(
    cache: Cache, axis: str, call: AttentionCall, implementation: tuple[str, ...] | None
) -> tuple[jax.Array, jax.Array]:
    """Output and LSE of a call over the whole cache, on all shards the same."""
    local = _of_shard(call, cache, lax.axis_index(axis), lax.axis_size(axis))
    local = vary_over(local, varying_axes(*jax.tree.leaves(local)))
    out, lse = registry.run_plan(local, registry.make_plan(local, implementation))
    out, lse = add_sinks(combine_shards(axis, (out, present(lse))), call.sinks)
    return out.astype(call.query.dtype), lse


def _of_shard(call: AttentionCall, cache: Cache, shard: jax.Array, shards: int) -> AttentionCall:
    """The call over the slots of one shard. Sinks are left to who merges."""
    slots = jnp.arange(cache.capacity, dtype=jnp.int32)
    positions = positions_or_default(call.q_positions, call.q_len)
    offsets = [part.offset for part in call.mask.parts if isinstance(part, parts.Causal)]
    rest = [part for part in call.mask.parts if not isinstance(part, parts.Causal)]
    known: dict[str, Any]
    if call.alibi_slopes is not None or _speak_of_positions(rest):
        known = dict(q_positions=positions, kv_positions=(slots * shards + shard)[None])
        causal = [parts.Causal(offset) for offset in offsets]
    else:
        # Without positions of keys kernels need not look at any.
        last: Any = functools.reduce(jnp.minimum, offsets) if offsets else 0
        last = positions + (last[:, None] if jnp.ndim(last) else last)
        known = dict(q_positions=(last - shard) // shards, kv_positions=None)
        causal = [parts.Causal(parts.Static(0))] if offsets else []

    def columns(array: jax.Array) -> jax.Array:
        """This shard's slots of an array ``[..., S or 1]``."""
        if array.shape[-1] == 1:
            return array
        array = array.reshape(*array.shape[:-1], -1, shards)
        return lax.dynamic_index_in_dim(array, shard, array.ndim - 1, keepdims=False)

    def part(one: parts.Part) -> parts.Part:
        if isinstance(one, parts.Lengths):
            return parts.Lengths(one.q, None if one.kv is None else share(one.kv, shard, shards))
        if isinstance(one, parts.Segments):
            return parts.Segments(one.q_ids, columns(one.kv_ids))
        return parts.Dense(columns(one.array)) if isinstance(one, parts.Dense) else one

    return dataclasses.replace(
        call,
        stored=cache.stored(),
        bias=None if call.bias is None else columns(call.bias),
        mask=Mask((*causal, *map(part, rest))),
        sinks=None,
        return_residual=True,
        **known,
    )


def _speak_of_positions(some: list[parts.Part]) -> bool:
    return any(isinstance(part, parts.Window | parts.Prefix) for part in some)
