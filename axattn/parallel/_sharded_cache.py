"""Caches that are sharded over a mesh by rows, by heads and by the tokens of a row.

::

    axes = parallel.Axes(batch="data", heads="model", sequence="context")
    cache = ShardedCache.create(
        DenseCache, batch, length, num_kv_heads, head_dim, dtype=jnp.int8, axes=axes, mesh=mesh
    )
    out, cache = cache.extend(query, key, value)

Keys and values never move: in a step every device reads its own part. Where the tokens of a row are
on several devices, the results are combined by their LSE (flash-decoding, as in Megatron's and
Helix's context parallelism).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, Literal, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from axattn import _serialization
from axattn._call import AttentionCall
from axattn._implementations import registry
from axattn._jax_compat import find_varying_axes, reshard, vary_over
from axattn._sharded import kv_heads, specs
from axattn._sharded.axes import Axes, find_mesh, list_axis_names
from axattn._typing import Array, ArrayLike, Float, Float32
from axattn.cache import Cache, DenseCache, PagedCache, RingCache
from axattn.parallel import _striped_cache
from axattn.parallel._partitioned_cache import PartitionedCache, make_resized_shapes

# The arguments of each `create` that say how many rows and slots the arrays have.
_SIZES = {
    DenseCache: ("batch", "length"),
    PagedCache: ("num_pages", "page_size"),
    RingCache: ("batch", None),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("cache",),
    meta_fields=("axes", "mesh", "num_kv_heads"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class ShardedCache(PartitionedCache):
    """A cache whose arrays are sharded over the devices of a mesh.

    It is passed in, returned and donated like any other, and the layers take it as ``cache=``.
    Arguments and results are those of the whole cache, as in `axattn.cache.Cache`. ``axes.batch``
    shards the rows, ``axes.heads`` the key/value heads: where it has more shards than K, each
    device has the one head that its query heads read. ``axes.sequence`` stripes the tokens, token p
    on shard p % n, at any lengths of the rows; queries then go to all shards, and their results are
    combined.

    A paged cache has one pool per shard of the batch, each with pages numbered from 0. Make one
    `axattn.cache.PagePool` for each on the host, of ``num_pages`` pages of ``page_size`` tokens.
    The slots of a page are striped over all shards of the sequence.

    Attributes:
      cache: arrays of all devices. The slots of a row or page are in the order of the shards, and
        heads are repeated where several devices have the same one.
      axes: the axes of the mesh that shard the cache.
      mesh: the ``jax.sharding.Mesh``.
      num_kv_heads: K, key/value heads.

    Raises:
      ValueError, TypeError: by `create` and its methods, as `axattn.cache.Cache`; and sizes that
        the axes do not divide.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn import parallel
      >>> from axattn.cache import DenseCache
      >>> auto = (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((jax.device_count(),), ("context",), axis_types=auto)
      >>> cache = parallel.ShardedCache.create(
      ...     DenseCache, 1, 64, num_kv_heads=1, head_dim=16, dtype="int8",
      ...     axes=parallel.Axes(sequence="context"), mesh=mesh,
      ... )
      >>> query, key = jnp.ones((1, 7, 4, 16)), jnp.ones((1, 7, 1, 16))
      >>> out, cache = cache.extend(query, key, key)
      >>> out.shape, cache.lengths.tolist(), cache.capacity
      ((1, 7, 4, 16), [7], 64)
    """

    cache: Cache
    axes: Axes
    mesh: Any
    num_kv_heads: int

    @staticmethod
    def create(
        kind: type[DenseCache | PagedCache | RingCache],
        *sizes: Any,
        axes: Axes,
        mesh: Any = None,
        abstract: bool = False,
        **options: Any,
    ) -> ShardedCache:
        """Create an empty cache, each part of it on its device.

        Args:
          kind: `axattn.cache.DenseCache`, `axattn.cache.PagedCache` or, where ``axes.sequence`` is
            None, `axattn.cache.RingCache`.
          *sizes: sizes of the whole cache, as ``kind.create`` takes them. ``num_pages`` counts the
            pages of all pools.
          axes: the axes of the mesh that shard the cache.
          mesh: by default that of the context (``jax.set_mesh``).
          abstract: make shapes with shardings in place of arrays, to compile without devices.
          **options: the other arguments of ``kind.create``, likewise of the whole cache.

        Raises:
          ValueError: sizes that the axes do not divide, an axis that the mesh does not have, no
            mesh; and as ``kind.create``.
          TypeError: an unknown ``kind``; and as ``kind.create``.
        """
        if kind not in _SIZES:
            raise TypeError(f"kind takes one of {[k.__name__ for k in _SIZES]}, got {kind!r}")
        mesh = find_mesh(mesh)
        axes.check(mesh)
        jax.eval_shape(lambda: kind.create(*sizes, **options))  # for its checks
        arguments = dict(inspect.signature(kind.create).bind(*sizes, **options).arguments)
        num_kv_heads, center = arguments["num_kv_heads"], arguments.pop("key_center", None)
        stored_heads = _check_sizes(kind, arguments, axes, mesh)
        arguments["num_kv_heads"] = stored_heads
        if center is not None:
            center = jnp.repeat(jnp.asarray(center), stored_heads // num_kv_heads, axis=0)
        create_parts = _make_creator(kind, tuple(arguments.items()), axes, mesh, num_kv_heads)
        shapes = jax.eval_shape(create_parts, center)
        if not abstract:
            return jax.jit(create_parts, out_shardings=shapes.shardings)(center)

        def make_shape(shape, sharding):
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

        return jax.tree.map(make_shape, shapes, shapes.shardings)

    @property
    def shardings(self) -> ShardedCache:
        """The cache with a NamedSharding in place of each array, for ``in_shardings``."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs)

    @property
    def specs(self) -> ShardedCache:
        """The cache with a PartitionSpec in place of each array."""
        return dataclasses.replace(self, cache=_make_cache_specs(self.cache, self.axes))

    @property
    def whole(self) -> Cache:
        """The cache as it would be on one device, with shapes in place of its arrays."""
        rows = self.cache.arrays.keys.shape[0]
        if isinstance(self.cache, PagedCache):
            rows //= self._count_shards("batch")  # a block table names pages of one pool
        return make_resized_shapes(self.cache, rows=rows, heads=self.num_kv_heads)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales; repeated heads count on each device."""
        return self.cache.nbytes

    @overload
    def extend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K h"] | None = ...,
        *,
        lengths: ArrayLike | None = ...,
        return_residual: Literal[False] = ...,
        **options: Any,
    ) -> tuple[Float[Array, "B T N h"], Self]: ...

    @overload
    def extend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K h"] | None = ...,
        *,
        lengths: ArrayLike | None = ...,
        return_residual: Literal[True],
        **options: Any,
    ) -> tuple[tuple[Float[Array, "B T N h"], Float32[Array, "B T N"]], Self]: ...

    @overload
    def extend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K h"] | None = ...,
        *,
        lengths: ArrayLike | None = ...,
        return_residual: bool,
        **options: Any,
    ) -> tuple[
        Float[Array, "B T N h"] | tuple[Float[Array, "B T N h"], Float32[Array, "B T N"]], Self
    ]: ...

    def extend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K h"] | None = None,
        **options: Any,
    ) -> Any:
        """Append tokens, then attend from them: as `axattn.cache.Cache.extend`.

        Args:
          query: ``[B, T, N, H]``, of all heads.
          key: ``[B, T, K, H]``.
          value: ``[B, T, K, h]``; None where values are in the keys.
          **options: as there.

        Returns:
          ``(output, cache)``; output ``[B, T, N, h]``.

        Raises:
          ValueError, TypeError, NotImplementedError: as there.
        """
        kind = RingCache if isinstance(self.cache, RingCache) else Cache
        return kind.extend(self, query, key, value, **options)

    def with_table(self, block_table: ArrayLike, lengths: ArrayLike | None = None) -> ShardedCache:
        """Set the block table: as `axattn.cache.PagedCache.with_table`, with the row's pool.

        Args:
          block_table: int ``[B, pages_per_row]``; -1 means none.
          lengths: int ``[B]`` or int, the tokens that are stored already.

        Raises:
          ValueError: another shape; lengths beyond ``capacity``.
          TypeError: anything but integers.
        """
        changed = super().with_table(block_table, lengths)
        changes = {
            name: jax.device_put(getattr(changed, name), getattr(self.shardings.cache, name))
            for name in ("block_table", "lengths")
        }
        return self._replace_in_cache(**changes)

    def copy_pages(self, sources: ArrayLike, targets: ArrayLike) -> ShardedCache:
        """Copy pages within each pool: as `axattn.cache.PagedCache.copy_pages`.

        Args:
          sources: int ``[n]``; where the batch is sharded ``[pools, n]``, padded with -1.
          targets: likewise int ``[n]`` or ``[pools, n]``.

        Raises:
          ValueError: another shape.
          TypeError: anything but integers.
        """
        pools, pairs = self._count_shards("batch"), [jnp.asarray(x) for x in (sources, targets)]
        for name, x in zip(("sources", "targets"), pairs, strict=True):
            if x.ndim != 1 + (pools > 1) or x.shape != pairs[0].shape or x.shape[0] != pools > 1:
                takes = f"[{pools}, n]" if pools > 1 else "[n]"
                raise ValueError(f"{name} takes int {takes} like the other, got shape {x.shape}")
        pairs = [x.reshape(pools, -1) for x in pairs]
        return dataclasses.replace(self, cache=_copy_pages_on_mesh(self, *pairs))

    def fork(self, rows: ArrayLike) -> ShardedCache:
        """Return a cache whose row i is row ``rows[i]``: as `axattn.cache.Cache.fork`.

        Args:
          rows: int ``[B']``, rows of this cache; B' is the batch of the new one.

        Raises:
          ValueError: another dtype or shape, or rows that this cache does not have.
          TypeError: ``rows`` is no array.
          NotImplementedError: the batch is sharded.
        """
        if self._count_shards("batch") > 1:
            raise NotImplementedError("fork takes a cache whose rows are all on every device")
        return dataclasses.replace(self, cache=self.cache.fork(rows))

    def _count_shards(self, what: str) -> int:
        return self.axes.size(self.mesh, what)

    def _append(self, key, value, counts, overflowed):
        cache = _append_on_mesh(self, key, value, jnp.asarray(counts), overflowed)
        return dataclasses.replace(self, cache=cache)

    def _attend(self, call, implementation):
        size = self._count_shards("heads")
        if call.num_heads % size:
            raise ValueError(
                f"heads takes axes whose size divides the {call.num_heads} query heads, got {size}"
            )
        return _attend_on_mesh(self, call, implementation)


def _list_static_sizes(sharded: ShardedCache) -> dict[str, Any]:
    """Return the sizes that fix the shape of the parts. The devices may be others."""
    names = ("batch", "heads", "sequence")
    shards = {f"{name} shards": sharded._count_shards(name) for name in names}
    return {**shards, "num_kv_heads": sharded.num_kv_heads}


def _encode_static(aux: tuple) -> list:
    axes, mesh, num_kv_heads = aux
    devices = None if isinstance(mesh, AbstractMesh) else [d.id for d in mesh.devices.flat]
    kinds = [kind.name for kind in mesh.axis_types]
    return [
        dataclasses.astuple(axes),
        [mesh.axis_sizes, mesh.axis_names, kinds],
        devices,
        num_kv_heads,
    ]


def _decode_static(plain: list) -> tuple:
    axes, (sizes, names, kinds), ids, num_kv_heads = plain
    options = {"axis_types": tuple(AxisType[kind] for kind in kinds)}
    if ids is None:
        return Axes(*axes), AbstractMesh(tuple(sizes), tuple(names), **options), num_kv_heads
    devices = {device.id: device for device in jax.devices()}
    if not devices.keys() >= set(ids):
        raise ValueError(f"a ShardedCache was exported for devices {ids}, here are {list(devices)}")
    mesh = Mesh(np.array([devices[i] for i in ids]).reshape(sizes), tuple(names), **options)
    return Axes(*axes), mesh, num_kv_heads


_serialization.register(
    ShardedCache, ("cache",), _list_static_sizes, encode=_encode_static, decode=_decode_static
)


@functools.cache
def _make_creator(kind: Any, arguments: tuple, axes: Axes, mesh: Any, num_kv_heads: int):
    """Return the same function for the same sizes: equal layers then share one program."""

    def create_parts(center: jax.Array | None) -> ShardedCache:
        cache = kind.create(**dict(arguments), key_center=center)
        return ShardedCache(cache, axes, mesh, num_kv_heads)

    return create_parts


def _check_sizes(kind: type[Cache], arguments: dict[str, Any], axes: Axes, mesh: Any) -> int:
    """Check that the axes divide the sizes; return the key/value heads of all devices."""
    rows, slots = _SIZES[kind]
    shards = axes.size(mesh, "sequence")
    if shards > 1 and slots is None:
        raise ValueError("axes takes sequence=None for a RingCache, which is short as it is")
    for name, what in (("batch", "batch"), (rows, "batch"), (slots, "sequence")):
        size = axes.size(mesh, what)
        if name is not None and arguments[name] % size:
            raise ValueError(
                f"{name} takes a multiple of {size}, the size of the axes {getattr(axes, what)!r} "
                f"of {what}, got {arguments[name]}"
            )
    shards, num_kv_heads = axes.size(mesh, "heads"), arguments["num_kv_heads"]
    if shards % num_kv_heads and num_kv_heads % shards:
        raise ValueError(
            f"heads takes axes whose size divides the {num_kv_heads} key/value heads or is a "
            f"multiple of them, got {shards}"
        )
    return max(shards, num_kv_heads)


def _make_cache_specs(cache: Cache, axes: Axes) -> Cache:
    """Return the cache with a PartitionSpec in place of each array."""
    row = PartitionSpec(axes.batch)
    stored = axes.batch, axes.heads, axes.sequence, None
    changes: dict[str, Any] = {
        "arrays": jax.tree.map(lambda x: PartitionSpec(*stored[: x.ndim]), cache.arrays),
        "lengths": row,
        "overflowed": row,
    }
    if cache.key_center is not None:
        changes["key_center"] = PartitionSpec(axes.heads, None)
    for name in ("block_table", "positions"):
        if hasattr(cache, name):
            changes[name] = PartitionSpec(axes.batch, None)
    return dataclasses.replace(cache, **changes)


@jax.jit
def _append_on_mesh(
    sharded: ShardedCache,
    key: jax.Array,
    value: jax.Array | None,
    counts: jax.Array,
    overflowed: jax.Array,
) -> Cache:
    axes, mesh, cache = sharded.axes, sharded.mesh, sharded.cache
    stored_heads = cache.arrays.keys.shape[1]
    kv_axes = kv_heads.choose_kv_axes(axes, mesh, stored_heads, sharded.num_kv_heads)
    rest = list_axis_names("heads", axes.heads)[len(kv_axes) :]

    def select_head(x: jax.Array) -> jax.Array:
        """Select this device's head of those that several devices share."""
        index = lax.axis_index(rest) * x.shape[2] // lax.axis_size(rest)
        return lax.dynamic_slice_in_dim(x, index, 1, 2)

    def append_shard(cache, key, value, counts, overflowed):
        if rest:
            key, value = jax.tree.map(select_head, (key, value))
        if axes.sequence is None:
            cache = _append_whole_rows(cache, key, value, counts)
        else:
            cache = _striped_cache.append_to_shard(cache, axes.sequence, key, value, counts)
        return dataclasses.replace(cache, overflowed=overflowed)

    tokens = PartitionSpec(axes.batch, None, kv_axes or None, None)
    row = PartitionSpec(axes.batch)
    arguments = cache, key, value, counts, overflowed
    in_specs = _make_cache_specs(cache, axes), tokens, None if value is None else tokens, row, row
    program = jax.shard_map(append_shard, mesh=mesh, in_specs=in_specs, out_specs=in_specs[0])
    return program(*reshard(arguments, in_specs, mesh))


def _append_whole_rows(cache: Cache, key, value, counts) -> Cache:
    axes = find_varying_axes(*jax.tree.leaves((cache.arrays, key, value, counts)))
    cache = dataclasses.replace(cache, arrays=vary_over(cache.arrays, axes))
    return cache.append(key, value, lengths=counts)


@functools.partial(jax.jit, static_argnames="implementation")
def _attend_on_mesh(
    sharded: ShardedCache, call: AttentionCall, implementation: tuple[str, ...] | None
) -> tuple[jax.Array, jax.Array | None]:
    axes, mesh, cache = sharded.axes, sharded.mesh, sharded.cache
    query_axes = dataclasses.replace(axes, sequence=None)

    def attend_shard(cache, call):
        if axes.sequence is not None:
            return _striped_cache.attend_shard(cache, axes.sequence, call, implementation)
        call = dataclasses.replace(call, stored=cache.stored(), return_residual=True)
        call = vary_over(call, find_varying_axes(*jax.tree.leaves(call)))
        return registry.run_plan(call, registry.make_plan(call, implementation))

    call_specs = specs.make_call_specs(call, query_axes, None)
    call_specs = dataclasses.replace(call_specs, key=None, value=None)
    in_specs = _make_cache_specs(cache, axes), call_specs
    program = jax.shard_map(
        attend_shard, mesh=mesh, in_specs=in_specs, out_specs=specs.make_result_specs(query_axes)
    )
    return program(*reshard((cache, call), in_specs, mesh))


@jax.jit
def _copy_pages_on_mesh(sharded: ShardedCache, sources: jax.Array, targets: jax.Array) -> Cache:
    pool = PartitionSpec(sharded.axes.batch, None)
    cache = _make_cache_specs(sharded.cache, sharded.axes)
    in_specs = cache, pool, pool

    def copy_shard_pages(cache, sources, targets):
        return cache.copy_pages(sources[0], targets[0])

    program = jax.shard_map(copy_shard_pages, mesh=sharded.mesh, in_specs=in_specs, out_specs=cache)
    return program(*reshard((sharded.cache, sources, targets), in_specs, sharded.mesh))
