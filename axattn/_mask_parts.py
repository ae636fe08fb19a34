"""The parts of masks. Each gives the mask of a tile of scores, and the states of blocks."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from axattn import _serialization

# States of a block of scores. EMPTY and FULL are promises; PARTIAL means "look inside".
EMPTY, PARTIAL, FULL = 0, 1, 2


class Slots(Protocol):
    """Slots of one axis, and the positions of their tokens: a `Span`, or some of its slots."""

    @property
    def slots(self) -> jax.Array: ...

    @property
    def positions(self) -> jax.Array: ...

    def take(self, array: jax.Array, axis: int) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive slots ``[start, start + size)`` of one axis, and the positions of their tokens.

    ``start`` may be traced; ``size`` is static; ``positions`` is int32 ``[B or 1, size]``.
    """

    start: int | jax.Array
    size: int
    positions: jax.Array

    @property
    def slots(self) -> jax.Array:
        return self.start + jnp.arange(self.size, dtype=jnp.int32)

    def take(self, array: jax.Array, axis: int) -> jax.Array:
        """Slice this span of ``array`` along ``axis``; a broadcast axis (size 1) stays as it is."""
        if array.shape[axis] == 1 or array.shape[axis] == self.size:
            return array
        return lax.dynamic_slice_in_dim(array, self.start, self.size, axis)


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """The blocks of one call; positions are int32 ``[B or 1, T]`` and ``[B or 1, S]``."""

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    q_positions: jax.Array
    kv_positions: jax.Array

    @property
    def num_q(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def num_kv(self) -> int:
        return -(-self.kv_len // self.block_kv)

    def q_range(self, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return min and max of ``values [B or 1, T]`` per query block, ``[B or 1, num_q]``."""
        return _find_block_ranges(values, self.block_q)

    def kv_range(self, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _find_block_ranges(values, self.block_kv)


def _find_block_ranges(values: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    rows, length = values.shape
    count = -(-length // block)
    # Padding by the last value changes neither extreme.
    values = jnp.pad(values, ((0, 0), (0, count * block - length)), mode="edge")
    values = values.reshape(rows, count, block)
    return values.min(-1), values.max(-1)


def as_column(per_row: Any) -> Any:
    """Shape a scalar, or ``[B]`` as ``[B, 1]``, to compare with ``[B or 1, n]``."""
    return per_row if jnp.ndim(per_row) == 0 else jnp.asarray(per_row)[:, None]


def _take_column(array: jax.Array, i: int | jax.Array) -> jax.Array:
    """Take column ``i`` of ``[B or 1, n]``, kept as ``[B or 1, 1]``."""
    return lax.dynamic_slice_in_dim(array, i, 1, axis=1)


class Static(int):
    """A number known while tracing. It belongs to a mask's structure; arrays are leaves.

    It is no plain int, so that a tree of ints (such as ``in_axes``) still has leaves there.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class MaskPart:
    """One conjunct of a mask. As a pytree, ``Static`` fields are structure, others children."""

    def __init_subclass__(cls) -> None:
        names = tuple(cls.__annotations__)

        def flatten(part):
            values = [getattr(part, name) for name in names]
            static = tuple(v if isinstance(v, Static) else _LeafMarker for v in values)
            return [v for v, s in zip(values, static, strict=True) if s is _LeafMarker], static

        def unflatten(static, leaves):
            leaves = iter(leaves)
            part = object.__new__(cls)
            for name, value in zip(names, static, strict=True):
                object.__setattr__(part, name, next(leaves) if value is _LeafMarker else value)
            return part

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)
        _serialization.register(
            cls,
            names,
            encode=lambda static: [None if v is _LeafMarker else int(v) for v in static],
            decode=lambda plain: tuple(_LeafMarker if v is None else Static(v) for v in plain),
        )

    def allowed(self, q: Slots, kv: Slots) -> jax.Array:
        """Compute the mask of a tile, bool, broadcastable to ``[B, N, q.size, kv.size]``."""
        raise NotImplementedError

    def block_rows(self, layout: BlockLayout):
        """Return a function from a query block to ``(some, every)``, bool ``[B or 1, num_kv]``.

        ``some`` False: no pair of the block is allowed. ``every`` True: all pairs are. Where
        this is not known, ``some=True, every=False`` is safe.
        """
        raise NotImplementedError

    def batched_arrays(self) -> dict[str, int]:
        """Return the rank without the batch dimension of each array field."""
        raise NotImplementedError


class _LeafMarker:
    """Stands for an array in a part's static structure."""


def _pair_axes(q: jax.Array, kv: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Shape ``[B, q]`` and ``[B, kv]`` as ``[B, 1, q, 1]`` and ``[B, 1, 1, kv]``."""
    return q[:, None, :, None], kv[:, None, None, :]


def _as_tile_scalar(per_row: Any) -> Any:
    return per_row if jnp.ndim(per_row) == 0 else jnp.asarray(per_row)[:, None, None, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Causal(MaskPart):
    offset: Any  # int, or int32 [B]

    def allowed(self, q, kv):
        qp, kp = _pair_axes(q.positions, kv.positions)
        return qp + _as_tile_scalar(self.offset) >= kp

    def block_rows(self, layout):
        q_min, q_max = layout.q_range(layout.q_positions)
        k_min, k_max = layout.kv_range(layout.kv_positions)
        offset = as_column(self.offset)
        return lambda i: (
            _take_column(q_max, i) + offset >= k_min,
            _take_column(q_min, i) + offset >= k_max,
        )

    def batched_arrays(self):
        return {"offset": 0}


@dataclasses.dataclass(frozen=True, eq=False)
class Window(MaskPart):
    left: int | None
    right: int | None

    def allowed(self, q, kv):
        qp, kp = _pair_axes(q.positions, kv.positions)
        ok = None
        if self.left is not None:
            ok = kp >= qp - self.left
        if self.right is not None:
            right = kp <= qp + self.right
            ok = right if ok is None else ok & right
        return jnp.ones((1, 1, 1, 1), bool) if ok is None else ok

    def block_rows(self, layout):
        q_min, q_max = layout.q_range(layout.q_positions)
        k_min, k_max = layout.kv_range(layout.kv_positions)

        def row(i):
            some = jnp.ones_like(k_min, bool)
            every = some
            if self.left is not None:
                some &= k_max >= _take_column(q_min, i) - self.left
                every &= k_min >= _take_column(q_max, i) - self.left
            if self.right is not None:
                some = some & (k_min <= _take_column(q_max, i) + self.right)
                every = every & (k_max <= _take_column(q_min, i) + self.right)
            return some, every

        return row

    def batched_arrays(self):
        return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix(MaskPart):
    length: Any  # int, or int32 [B]

    def allowed(self, q, kv):
        qp, kp = _pair_axes(q.positions, kv.positions)
        return (kp < _as_tile_scalar(self.length)) | (qp >= kp)

    def block_rows(self, layout):
        q_min, q_max = layout.q_range(layout.q_positions)
        k_min, k_max = layout.kv_range(layout.kv_positions)
        n = as_column(self.length)
        return lambda i: (
            (k_min < n) | (_take_column(q_max, i) >= k_min),
            (k_max < n) | (_take_column(q_min, i) >= k_max),
        )

    def batched_arrays(self):
        return {"length": 0}


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths(MaskPart):
    q: Any  # None, int, or int32 [B]
    kv: Any  # None, int, or int32 [B]

    def allowed(self, q, kv):
        ok = jnp.ones((1, 1, 1, 1), bool)
        q_slots, kv_slots = _pair_axes(q.slots[None], kv.slots[None])
        if self.q is not None:
            ok = ok & (q_slots < _as_tile_scalar(self.q))
        if self.kv is not None:
            ok = ok & (kv_slots < _as_tile_scalar(self.kv))
        return ok

    def block_rows(self, layout):
        kv_first = jnp.arange(layout.num_kv, dtype=jnp.int32)[None] * layout.block_kv
        kv_last = jnp.minimum(kv_first + layout.block_kv, layout.kv_len) - 1

        def row(i):
            some = jnp.ones((1, layout.num_kv), bool)
            every = some
            if self.q is not None:
                q_first = i * layout.block_q
                q_last = jnp.minimum(q_first + layout.block_q, layout.q_len) - 1
                some = some & (q_first < as_column(self.q))
                every = every & (q_last < as_column(self.q))
            if self.kv is not None:
                some = some & (kv_first < as_column(self.kv))
                every = every & (kv_last < as_column(self.kv))
            return some, every

        return row

    def batched_arrays(self):
        return {"q": 0, "kv": 0}


@dataclasses.dataclass(frozen=True, eq=False)
class Segments(MaskPart):
    q_ids: jax.Array  # int32 [B or 1, T]
    kv_ids: jax.Array  # int32 [B or 1, S]

    def allowed(self, q, kv):
        q_ids, kv_ids = _pair_axes(q.take(self.q_ids, 1), kv.take(self.kv_ids, 1))
        return q_ids == kv_ids

    def block_rows(self, layout):
        # Ids need not be sorted. Disjoint ranges prove a block empty, one common id proves it full,
        # all else counts as partial.
        q_min, q_max = layout.q_range(
            jnp.broadcast_to(self.q_ids, (self.q_ids.shape[0], layout.q_len))
        )
        k_min, k_max = layout.kv_range(
            jnp.broadcast_to(self.kv_ids, (self.kv_ids.shape[0], layout.kv_len))
        )

        def row(i):
            lo, hi = _take_column(q_min, i), _take_column(q_max, i)
            some = (lo <= k_max) & (hi >= k_min)
            every = (lo == hi) & (k_min == k_max) & (lo == k_min)
            return some, every

        return row

    def batched_arrays(self):
        return {"q_ids": 1, "kv_ids": 1}


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(MaskPart):
    array: jax.Array  # bool [B or 1, N or 1, T or 1, S or 1]

    def allowed(self, q, kv):
        return kv.take(q.take(self.array, 2), 3)

    def block_rows(self, layout):
        batch = self.array.shape[0]

        def row(i):
            rows = self.array
            if rows.shape[2] != 1:
                # Slots past the end repeat the last row: they change neither any() nor all().
                slots = jnp.minimum(
                    i * layout.block_q + jnp.arange(layout.block_q), layout.q_len - 1
                )
                rows = jnp.take(rows, slots, axis=2)
            some = rows.any((1, 2))
            every = rows.all((1, 2))
            if rows.shape[3] == 1:
                shape = (batch, layout.num_kv)
                return jnp.broadcast_to(some, shape), jnp.broadcast_to(every, shape)
            return (
                _find_block_ranges(some, layout.block_kv)[1],
                _find_block_ranges(every, layout.block_kv)[0],
            )

        return row

    def batched_arrays(self):
        return {"array": 3}
