"""Attention masks as data: what a query may attend to, without a T x S array.

A :class:`Mask` is a conjunction of parts. Every part can answer two questions:

* elementwise, for the tile of scores at (query slots, key slots) -- :meth:`Mask.tile`;
* for whole blocks: is (query block, key block) empty, full or partial -- :meth:`Mask.block_map`,
  which is what lets an implementation skip work.

Slots and positions are two things. A *slot* is an index into the array (lengths, segments and
dense arrays speak of slots); a *position* is where the token stands in its sequence (causal,
window and prefix speak of positions). They are the same unless the call gives ``q_offset``,
``q_positions`` or ``kv_positions``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EMPTY, PARTIAL, FULL = 0, 1, 2

_INT_MIN, _INT_MAX = np.iinfo(np.int32).min, np.iinfo(np.int32).max


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
        """This span of ``array`` along ``axis``; a broadcast axis (size 1) stays as it is."""
        if array.shape[axis] == 1 or array.shape[axis] == self.size:
            return array
        return lax.dynamic_slice_in_dim(array, self.start, self.size, axis)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one call is cut into blocks; positions are int32 ``[B or 1, T]`` and ``[B or 1, S]``."""

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
        """Least and greatest of ``values [B or 1, T]`` per query block: ``[B or 1, num_q]``."""
        return _range_per_block(values, self.block_q)

    def kv_range(self, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _range_per_block(values, self.block_kv)


def _range_per_block(values: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    rows, length = values.shape
    count = -(-length // block)
    # The last value fills the last block up, which changes neither extreme.
    values = jnp.pad(values, ((0, 0), (0, count * block - length)), mode="edge")
    values = values.reshape(rows, count, block)
    return values.min(-1), values.max(-1)


def _column(per_row: Any) -> Any:
    """A scalar, or one number per batch row as ``[B, 1]``, to compare with ``[B or 1, n]``."""
    return per_row if jnp.ndim(per_row) == 0 else jnp.asarray(per_row)[:, None]


def _at(array: jax.Array, i: int | jax.Array) -> jax.Array:
    """Column ``i`` of ``[B or 1, n]``, kept as ``[B or 1, 1]``."""
    return lax.dynamic_slice_in_dim(array, i, 1, axis=1)


class Static(int):
    """A number known while tracing: part of a mask's structure, where arrays are its leaves.

    A type of its own, so that a tree of plain ints (``in_axes``, say) still has leaves there.
    """


class _Part:
    """One conjunct. As a pytree, ``Static`` fields are its structure and the others children."""

    def __init_subclass__(cls) -> None:
        names = tuple(cls.__annotations__)

        def flatten(part):
            values = [getattr(part, name) for name in names]
            static = tuple(v if isinstance(v, Static) else _Leaf for v in values)
            return [v for v, s in zip(values, static, strict=True) if s is _Leaf], static

        def unflatten(static, leaves):
            leaves = iter(leaves)
            part = object.__new__(cls)
            for name, value in zip(names, static, strict=True):
                object.__setattr__(part, name, next(leaves) if value is _Leaf else value)
            return part

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)

    def allowed(self, q: Span, kv: Span) -> jax.Array:
        """Boolean tile, broadcastable to ``[B, N, q.size, kv.size]``."""
        raise NotImplementedError

    def block_rows(self, layout: Layout):
        """A function of a query block index giving ``(some, every)``, bool ``[B or 1, num_kv]``.

        ``some`` False: no pair of the block is allowed. ``every`` True: all pairs are. When it is
        not known, ``some=True, every=False`` is always a safe answer.
        """
        raise NotImplementedError

    def batched_arrays(self) -> dict[str, int]:
        """Rank without the batch dimension of each array field, for broadcasting over batches."""
        raise NotImplementedError


class _Leaf:
    """Stands for an array in a part's static structure."""


def _pairwise(q: jax.Array, kv: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``[B, q]`` and ``[B, kv]`` as ``[B, 1, q, 1]`` and ``[B, 1, 1, kv]``."""
    return q[:, None, :, None], kv[:, None, None, :]


def _tile_scalar(per_row: Any) -> Any:
    return per_row if jnp.ndim(per_row) == 0 else jnp.asarray(per_row)[:, None, None, None]


@dataclasses.dataclass(frozen=True)
class Causal(_Part):
    offset: Any  # int, or int32 [B]

    def allowed(self, q, kv):
        qp, kp = _pairwise(q.positions, kv.positions)
        return qp + _tile_scalar(self.offset) >= kp

    def block_rows(self, layout):
        q_min, q_max = layout.q_range(layout.q_positions)
        k_min, k_max = layout.kv_range(layout.kv_positions)
        offset = _column(self.offset)
        return lambda i: (_at(q_max, i) + offset >= k_min, _at(q_min, i) + offset >= k_max)

    def batched_arrays(self):
        return {"offset": 0}


@dataclasses.dataclass(frozen=True)
class Window(_Part):
    left: int | None
    right: int | None

    def allowed(self, q, kv):
        qp, kp = _pairwise(q.positions, kv.positions)
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
                some &= k_max >= _at(q_min, i) - self.left
                every &= k_min >= _at(q_max, i) - self.left
            if self.right is not None:
                some = some & (k_min <= _at(q_max, i) + self.right)
                every = every & (k_max <= _at(q_min, i) + self.right)
            return some, every

        return row

    def batched_arrays(self):
        return {}


@dataclasses.dataclass(frozen=True)
class Prefix(_Part):
    length: Any  # int, or int32 [B]

    def allowed(self, q, kv):
        qp, kp = _pairwise(q.positions, kv.positions)
        return (kp < _tile_scalar(self.length)) | (qp >= kp)

    def block_rows(self, layout):
        q_min, q_max = layout.q_range(layout.q_positions)
        k_min, k_max = layout.kv_range(layout.kv_positions)
        n = _column(self.length)
        return lambda i: (
            (k_min < n) | (_at(q_max, i) >= k_min),
            (k_max < n) | (_at(q_min, i) >= k_max),
        )

    def batched_arrays(self):
        return {"length": 0}


@dataclasses.dataclass(frozen=True)
class Lengths(_Part):
    q: Any  # None, int, or int32 [B]
    kv: Any  # None, int, or int32 [B]

    def allowed(self, q, kv):
        ok = jnp.ones((1, 1, 1, 1), bool)
        q_slots, kv_slots = _pairwise(q.slots[None], kv.slots[None])
        if self.q is not None:
            ok = ok & (q_slots < _tile_scalar(self.q))
        if self.kv is not None:
            ok = ok & (kv_slots < _tile_scalar(self.kv))
        return ok

    def block_rows(self, layout):
        kv_first = jnp.arange(layout.num_kv)[None] * layout.block_kv
        kv_last = jnp.minimum(kv_first + layout.block_kv, layout.kv_len) - 1

        def row(i):
            some = jnp.ones((1, layout.num_kv), bool)
            every = some
            if self.q is not None:
                q_first = i * layout.block_q
                q_last = jnp.minimum(q_first + layout.block_q, layout.q_len) - 1
                some = some & (q_first < _column(self.q))
                every = every & (q_last < _column(self.q))
            if self.kv is not None:
                some = some & (kv_first < _column(self.kv))
                every = every & (kv_last < _column(self.kv))
            return some, every

        return row

    def batched_arrays(self):
        return {"q": 0, "kv": 0}


@dataclasses.dataclass(frozen=True)
class Segments(_Part):
    q_ids: jax.Array  # int32 [B or 1, T]
    kv_ids: jax.Array  # int32 [B or 1, S]

    def allowed(self, q, kv):
        q_ids, kv_ids = _pairwise(q.take(self.q_ids, 1), kv.take(self.kv_ids, 1))
        return q_ids == kv_ids

    def block_rows(self, layout):
        # Ids need not be sorted: disjoint ranges prove a block empty, one single id proves it full,
        # and whatever is between counts as partial.
        q_min, q_max = layout.q_range(jnp.broadcast_to(self.q_ids, (len(self.q_ids), layout.q_len)))
        k_min, k_max = layout.kv_range(
            jnp.broadcast_to(self.kv_ids, (len(self.kv_ids), layout.kv_len))
        )

        def row(i):
            lo, hi = _at(q_min, i), _at(q_max, i)
            some = (lo <= k_max) & (hi >= k_min)
            every = (lo == hi) & (k_min == k_max) & (lo == k_min)
            return some, every

        return row

    def batched_arrays(self):
        return {"q_ids": 1, "kv_ids": 1}


@dataclasses.dataclass(frozen=True)
class Dense(_Part):
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
                _range_per_block(some, layout.block_kv)[1],
                _range_per_block(every, layout.block_kv)[0],
            )

        return row

    def batched_arrays(self):
        return {"array": 3}


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Mask:
    """What each query may attend to: a conjunction of structured parts, combined with ``&``.

    True means attend. A mask is a pytree (arrays inside it are traced, batched and donated like any
    other) and broadcasts over heads unless it holds a dense array with a head dimension.

    >>> mask = Mask.causal() & Mask.window(2, 0)
    >>> mask.materialize(4, 4)[0, 0].astype(int)
    Array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [0, 1, 1, 1]], dtype=int32)

    The constructors are the static methods below; ``Mask()`` allows everything.
    """

    parts: tuple[_Part, ...] = ()

    def tree_flatten(self):
        return (self.parts,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children[0])

    # ---- constructors -------------------------------------------------------------------------

    @staticmethod
    def causal(offset: int | jax.Array = 0) -> Mask:
        """Key position <= query position + ``offset`` (int, or int array, one per batch row)."""
        return Mask((Causal(_integer("offset", offset)),))

    @staticmethod
    def window(left: int | None, right: int | None) -> Mask:
        """Keys from ``left`` positions before the query to ``right`` after it, both inclusive.

        ``None`` is no bound on that side. ``window(L, 0)`` never sees the future.
        """
        for name, value in (("left", left), ("right", right)):
            if value is not None and (not _is_int(value) or value < 0):
                raise ValueError(f"window {name} takes an int >= 0 or None, got {value!r}")
        return Mask((Window(_bound(left), _bound(right)),))

    @staticmethod
    def segments(q_ids: jax.Array, kv_ids: jax.Array | None = None) -> Mask:
        """Packed sequences: a query attends to keys with its own segment id.

        ``q_ids`` int ``[..., T]``; ``kv_ids`` int ``[..., S]``, by default ``q_ids``.
        """
        kv_ids = q_ids if kv_ids is None else kv_ids
        ids = []
        for name, value in (("q_ids", q_ids), ("kv_ids", kv_ids)):
            value = jnp.asarray(value)
            if not jnp.issubdtype(value.dtype, jnp.integer) or value.ndim < 1:
                raise TypeError(
                    f"{name} takes an integer array [..., length], got {value.dtype} {value.shape}"
                )
            ids.append(value.astype(jnp.int32))
        return Mask((Segments(*ids),))

    @staticmethod
    def lengths(q: int | jax.Array | None = None, kv: int | jax.Array | None = None) -> Mask:
        """Only the first ``q`` query slots and the first ``kv`` key slots are real.

        Each is ``None``, an int, or an int array with one length per batch row.
        """
        return Mask(
            (
                Lengths(
                    None if q is None else _integer("q", q),
                    None if kv is None else _integer("kv", kv),
                ),
            )
        )

    @staticmethod
    def prefix(length: int | jax.Array) -> Mask:
        """Prefix-LM: the first ``length`` positions see each other, the rest is causal."""
        return Mask((Prefix(_integer("length", length)),))

    @staticmethod
    def dense(array: jax.Array) -> Mask:
        """Any boolean array that broadcasts to ``[..., N, T, S]``."""
        array = jnp.asarray(array)
        if array.dtype != jnp.bool_:
            raise TypeError(f"mask takes a boolean array (True = attend), got {array.dtype}")
        return Mask((Dense(array),))

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(self.parts + other.parts)

    # ---- answers ------------------------------------------------------------------------------

    def tile(self, q: Span, kv: Span) -> jax.Array | None:
        """Boolean scores mask of one tile, broadcastable to ``[B, N, q.size, kv.size]``."""
        ok = None
        for part in self.parts:
            allowed = part.allowed(q, kv)
            ok = allowed if ok is None else ok & allowed
        return ok

    def block_rows(self, layout: Layout):
        """A function of a query block index giving its row of block states.

        The row is int8 ``[B or 1, num_kv]`` of ``EMPTY``, ``PARTIAL``, ``FULL``: O(S / block)
        memory, so that nothing of size (T / block) x (S / block) lives on the device.
        """
        rows = [part.block_rows(layout) for part in self.parts]

        def row(i):
            some = every = jnp.ones((1, layout.num_kv), bool)
            for part_row in rows:
                part_some, part_every = part_row(i)
                some, every = some & part_some, every & part_every
            return jnp.where(some, jnp.where(every, FULL, PARTIAL), EMPTY).astype(jnp.int8)

        return row

    def block_map(
        self,
        q_len: int,
        kv_len: int,
        block_q: int,
        block_kv: int,
        *,
        q_positions: jax.Array | None = None,
        kv_positions: jax.Array | None = None,
    ) -> jax.Array:
        """State of every block, int8 ``[B or 1, ceil(T / block_q), ceil(S / block_kv)]``.

        ``EMPTY`` (0) and ``FULL`` (2) are promises, ``PARTIAL`` (1) is "look inside". Positions are
        int32 ``[T]`` or ``[B, T]`` (``[S]``, ``[B, S]``), by default 0, 1, 2...
        """
        layout = Layout(
            q_len,
            kv_len,
            block_q,
            block_kv,
            positions_or_default(q_positions, q_len),
            positions_or_default(kv_positions, kv_len),
        )
        mask = self.normalized(None, q_len, kv_len)
        rows = jax.vmap(mask.block_rows(layout))(jnp.arange(layout.num_q))
        return jnp.moveaxis(rows, 0, 1)

    def materialize(
        self,
        q_len: int,
        kv_len: int,
        *,
        q_positions: jax.Array | None = None,
        kv_positions: jax.Array | None = None,
    ) -> jax.Array:
        """The mask as a boolean array ``[B or 1, N or 1, T, S]``, for tests and pictures."""
        q = Span(0, q_len, positions_or_default(q_positions, q_len))
        kv = Span(0, kv_len, positions_or_default(kv_positions, kv_len))
        ok = self.normalized(None, q_len, kv_len).tile(q, kv)
        if ok is None:
            ok = jnp.ones((1, 1, 1, 1), bool)
        return jnp.broadcast_to(ok, (*ok.shape[:2], q_len, kv_len))

    # ---- batches ------------------------------------------------------------------------------

    def normalized(self, lead: tuple[int, ...] | None, q_len: int, kv_len: int) -> Mask:
        """The same mask with every array in canonical form: one batch dimension of B or 1.

        ``lead`` are the call's leading dimensions (``None``: not known, take the arrays' own).
        Raises ``ValueError`` where an array does not broadcast to the call.
        """
        return Mask(tuple(_normalize_part(part, lead, q_len, kv_len) for part in self.parts))

    def row(self, b: int | jax.Array) -> Mask:
        """Batch row ``b`` of a normalized mask, as a mask for a batch of one."""

        def take(part):
            changes = {}
            for name in part.batched_arrays():
                value = getattr(part, name)
                if value is not None and jnp.ndim(value) > 0 and jnp.shape(value)[0] > 1:
                    changes[name] = lax.dynamic_slice_in_dim(value, b, 1, 0)
            return dataclasses.replace(part, **changes)

        return Mask(tuple(take(part) for part in self.parts))

    @property
    def varies_by_row(self) -> bool:
        """Whether a normalized mask differs between the rows of the batch."""
        return any(jnp.ndim(leaf) and leaf.shape[0] > 1 for leaf in jax.tree.leaves(self))

    def kv_lengths(self) -> Any:
        """Number of leading key slots that are real (int or int32 ``[B]``), or None for all.

        Slots behind it may hold anything, NaN included: implementations must not let them through.
        """
        return _least(part.kv for part in self.parts if isinstance(part, Lengths))

    def q_lengths(self) -> Any:
        """Likewise for the query slots."""
        return _least(part.q for part in self.parts if isinstance(part, Lengths))


def _least(lengths) -> Any:
    least = None
    for length in lengths:
        if length is not None:
            least = length if least is None else jnp.minimum(least, length)
    return least


def positions_or_default(positions: jax.Array | None, length: int) -> jax.Array:
    """int32 ``[B or 1, length]``: the given positions, or 0, 1, 2..."""
    if positions is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    positions = jnp.asarray(positions, jnp.int32)
    return positions[None] if positions.ndim == 1 else positions


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _bound(value: int | None) -> Static | None:
    # Farther than any int32 position reaches is no bound, and would overflow as one.
    return None if value is None or value >= 2**30 else Static(value)


def _integer(name: str, value: Any) -> Any:
    """A Python int (static), or an int32 array; anything else is refused by name."""
    if _is_int(value):
        return Static(value)
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} takes an int or an integer array, got {value!r}") from error
    if not jnp.issubdtype(array.dtype, jnp.integer):
        got = f"{array.dtype} {array.shape}" if array.ndim else f"{value!r}"
        raise TypeError(f"{name} takes an int or an integer array, got {got}")
    return array.astype(jnp.int32)


def _normalize_part(part: _Part, lead: tuple[int, ...] | None, q_len: int, kv_len: int) -> _Part:
    tails = {
        "q_ids": (q_len,),
        "kv_ids": (kv_len,),
        "array": (None, q_len, kv_len),
    }
    changes = {}
    for name, rank in part.batched_arrays().items():
        value = getattr(part, name)
        if value is None:
            continue
        if jnp.ndim(value) == 0:
            # A scalar serves every row, static or traced; a 0-d boolean array serves every pair.
            if rank:
                changes[name] = jnp.broadcast_to(value, (1,) * (rank + 1))
            continue
        label = f"mask ({type(part).__name__.lower()} {name})"
        changes[name] = flatten_lead(label, jnp.asarray(value), lead, rank, tails.get(name, ()))
    return dataclasses.replace(part, **changes) if changes else part


def flatten_lead(
    label: str,
    value: jax.Array,
    lead: tuple[int, ...] | None,
    rank: int,
    tail: tuple[int | None, ...],
) -> jax.Array:
    """``value [lead..., tail...]`` as ``[B or 1, tail...]``, checked against the call's shape."""
    given = value.shape
    value = value.reshape((1,) * (rank - value.ndim) + value.shape)
    own_lead, own_tail = value.shape[: value.ndim - rank], value.shape[value.ndim - rank :]
    for got, want in zip(own_tail, tail, strict=True):
        # Ids are given per slot; only dense arrays may broadcast along an axis.
        if want is not None and got != want and not (rank == 3 and got == 1):
            raise ValueError(f"{label} takes [..., {_dims(tail)}], got shape {given}")
    if lead is None:
        lead = own_lead
    while len(own_lead) > len(lead) and own_lead[0] == 1:
        own_lead = own_lead[1:]
    padded = (1,) * (len(lead) - len(own_lead)) + own_lead
    if len(padded) != len(lead) or any(n not in (1, m) for n, m in zip(padded, lead, strict=True)):
        raise ValueError(
            f"{label} takes batch dimensions that broadcast to {lead}, got shape {given}"
        )
    if all(n == 1 for n in padded):
        return value.reshape((1, *own_tail))
    if padded != tuple(lead):
        value = jnp.broadcast_to(value.reshape(padded + own_tail), tuple(lead) + own_tail)
    return value.reshape((-1, *own_tail))


def _dims(tail: tuple[int | None, ...]) -> str:
    return ", ".join("N" if n is None else str(n) for n in tail)
