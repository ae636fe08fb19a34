"""A cache striped over the shards of a mesh axis: token p of a row is on shard p % n.

Inside ``shard_map``. Every shard attends to its own tokens, and the results are combined by their
LSE: a step sends outputs, never keys or values. Stripes of one token fill all shards evenly at any
length, so every shard knows from the lengths alone what each of them stores, and in which pages. A
causal mask stays causal: a query at position p sees the slots j of shard r with ``j n + r <= p``,
that is ``j <= (p - r) // n``.
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
from axattn._jax_compat import find_varying_axes, vary_over
from axattn._masks import Mask, fill_positions
from axattn._sharded.combine import add_sinks, combine_shards
from axattn._typing import present
from axattn.cache import Cache, RingCache
from axattn.cache._write import write_tokens
from axattn.parallel._partitioned_cache import PartitionedCache, make_resized_shapes


@functools.partial(_serialization.register_dataclass, data=("cache",), static=("axis",))
@dataclasses.dataclass(frozen=True, eq=False)
class StripedCache(PartitionedCache):
    """One shard's part of a cache, for your own ``jax.shard_map``.

    It has the methods of `axattn.cache.Cache`. All shards pass the same tokens and queries and get
    the same results. ``cache.arrays`` differ from shard to shard, and everything else is the same:
    choose ``out_specs`` accordingly.

    Attributes:
      cache: dense or paged, of any dtype, with an n-th of the slots of each row or page. The block
        table is the same on all shards, and lengths are those of the whole rows.
      axis: the mesh axis.

    Raises:
      ValueError: a ring, which is short enough for one device; by its methods as
        `axattn.cache.Cache`.
      TypeError: by its methods, as `axattn.cache.Cache`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec
      >>> from axattn import parallel
      >>> from axattn.cache import DenseCache
      >>> shards, auto = jax.device_count(), (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((shards,), ("context",), axis_types=auto)
      >>> def prompt(query, key, value):  # all tokens, on every shard
      ...     part = DenseCache.create(1, 8, num_kv_heads=1, head_dim=16, dtype="float32")
      ...     out, cache = parallel.StripedCache(part, "context").extend(query, key, value)
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
        slots = self.cache.arrays.keys.shape[2] * lax.axis_size(self.axis)
        return make_resized_shapes(self.cache, slots=slots)

    @property
    def nbytes(self) -> int:
        """Bytes of this shard's keys, values and scales."""
        return self.cache.nbytes

    def copy_pages(self, sources: Any, targets: Any) -> StripedCache:
        """Copy pages: as `axattn.cache.PagedCache.copy_pages`.

        Args:
          sources: int ``[n]``, pages to copy from; a pair with -1 is skipped.
          targets: int ``[n]``, pages to copy to.

        Raises:
          ValueError: shapes that differ, or pages that the pool does not have.
          TypeError: anything but integers.
        """
        paged: Any = self.cache
        return dataclasses.replace(self, cache=paged.copy_pages(sources, targets))

    def fork(self, rows: Any) -> StripedCache:
        """Return a cache whose row i is row ``rows[i]``: as `axattn.cache.Cache.fork`.

        Args:
          rows: int ``[B']``, rows of this cache; B' is the batch of the new one.

        Raises:
          ValueError: another dtype or shape, or rows that this cache does not have.
          TypeError: ``rows`` is no array.
        """
        return dataclasses.replace(self, cache=self.cache.fork(rows))

    def _append(self, key, value, counts, overflowed):
        cache = append_to_shard(self.cache, self.axis, key, value, counts)
        return dataclasses.replace(self, cache=cache)._replace_in_cache(overflowed=overflowed)

    def _attend(self, call, implementation):
        return attend_shard(self.cache, self.axis, call, implementation)


def count_share(total: Any, shard: Any, shards: int) -> Any:
    """Return how many of ``total`` tokens a shard stores."""
    return (total - shard + shards - 1) // shards


def append_to_shard(
    cache: Cache, axis: str, key: jax.Array, value: jax.Array | None, counts: jax.Array
) -> Cache:
    """Append this shard's stripe of the first ``counts`` tokens of each row, which fit."""
    shard, shards = lax.axis_index(axis), lax.axis_size(axis)
    before, after = (count_share(n, shard, shards) for n in (cache.lengths, cache.lengths + counts))
    first = (shard - cache.lengths) % shards
    key = _select_tokens(key, first, shards)
    value = None if value is None else _select_tokens(value, first, shards)
    local = dataclasses.replace(cache, lengths=before)
    tokens = cache._encode(key, value)
    mapping = local._map_slots(after - before, key.shape[1])
    axes = find_varying_axes(*jax.tree.leaves((cache.arrays, tokens, mapping)))
    arrays = write_tokens(vary_over(cache.arrays, axes), tokens, mapping)
    return dataclasses.replace(cache, arrays=arrays, lengths=cache.lengths + counts)


def _select_tokens(tokens: jax.Array, first: jax.Array, shards: int) -> jax.Array:
    """Select every n-th of the tokens ``[B, T, ...]`` from ``first`` on, int32 ``[B]`` below n."""
    batch, length, *rest = tokens.shape
    if length == 1:
        return tokens  # `append_to_shard` stores it, or counts 0 tokens
    count = -(-length // shards)
    tokens = jnp.pad(tokens, ((0, 0), (0, count * shards - length), *((0, 0) for _ in rest)))
    tokens = tokens.reshape(batch, count, shards, *rest)

    def select_row(tokens, first):
        return lax.dynamic_index_in_dim(tokens, first, 1, keepdims=False)

    return jax.vmap(select_row)(tokens, first)


def attend_shard(
    cache: Cache, axis: str, call: AttentionCall, implementation: tuple[str, ...] | None
) -> tuple[jax.Array, jax.Array]:
    """Return output and LSE of a call over the whole cache, the same on all shards."""
    shard_call = _make_shard_call(call, cache, lax.axis_index(axis), lax.axis_size(axis))
    shard_call = vary_over(shard_call, find_varying_axes(*jax.tree.leaves(shard_call)))
    out, lse = registry.run_plan(shard_call, registry.make_plan(shard_call, implementation))
    out, lse = add_sinks(combine_shards(axis, (out, present(lse))), call.sinks)
    return out.astype(call.query.dtype), lse


def _make_shard_call(
    call: AttentionCall, cache: Cache, shard: jax.Array, shards: int
) -> AttentionCall:
    """Return the call over the slots of one shard, without sinks, which count once."""
    slots = jnp.arange(cache.capacity, dtype=jnp.int32)
    positions = fill_positions(call.q_positions, call.q_len)
    offsets = [part.offset for part in call.mask.parts if isinstance(part, parts.Causal)]
    rest = [part for part in call.mask.parts if not isinstance(part, parts.Causal)]
    changes: dict[str, Any]
    if call.alibi_slopes is not None or _need_positions(rest):
        changes = dict(q_positions=positions, kv_positions=(slots * shards + shard)[None])
        causal = [parts.Causal(offset) for offset in offsets]
    else:
        # Query positions in units of slots: kernels then need no key positions.
        last: Any = functools.reduce(jnp.minimum, offsets) if offsets else 0
        last = positions + (last[:, None] if jnp.ndim(last) else last)
        changes = dict(q_positions=(last - shard) // shards, kv_positions=None)
        causal = [parts.Causal(parts.Static(0))] if offsets else []

    def select_slots(array: jax.Array) -> jax.Array:
        """Select this shard's slots of an array ``[..., S or 1]``."""
        if array.shape[-1] == 1:
            return array
        array = array.reshape(*array.shape[:-1], -1, shards)
        return lax.dynamic_index_in_dim(array, shard, array.ndim - 1, keepdims=False)

    def convert_part(part: parts.MaskPart) -> parts.MaskPart:
        if isinstance(part, parts.Lengths):
            kv = None if part.kv is None else count_share(part.kv, shard, shards)
            return parts.Lengths(part.q, kv)
        if isinstance(part, parts.Segments):
            return parts.Segments(part.q_ids, select_slots(part.kv_ids))
        return parts.Dense(select_slots(part.array)) if isinstance(part, parts.Dense) else part

    return dataclasses.replace(
        call,
        stored=cache.stored(),
        bias=None if call.bias is None else select_slots(call.bias),
        mask=Mask((*causal, *map(convert_part, rest))),
        sinks=None,
        return_residual=True,
        **changes,
    )


def _need_positions(mask_parts: list[parts.MaskPart]) -> bool:
    """Return whether some parts compare positions in a way that slots cannot express."""
    return any(isinstance(part, parts.Window | parts.Prefix) for part in mask_parts)
