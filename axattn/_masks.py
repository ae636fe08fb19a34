"""Attention masks as data: what a query may attend to, without a T x S array.

A :class:`Mask` is a conjunction of parts. Every part can answer two questions:

* elementwise, for the tile of scores at (query slots, key slots) -- `compute_mask_tile`;
* for whole blocks: is (query block, key block) empty, full or partial -- :meth:`Mask.block_map`,
  which is what lets an implementation skip work.

Slots and positions are two things. A *slot* is an index into the array (lengths, segments and
dense arrays speak of slots); a *position* is where the token stands in its sequence (causal,
window and prefix speak of positions). They are the same unless the call gives ``q_offset``,
``q_positions`` or ``kv_positions``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from axattn import _serialization
from axattn._jax_compat import is_known
from axattn._mask_parts import (
    EMPTY,
    FULL,
    PARTIAL,
    BlockLayout,
    Causal,
    Dense,
    Lengths,
    MaskPart,
    Prefix,
    Segments,
    Slots,
    Span,
    Static,
    Window,
    as_column,
)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Mask(_serialization.SerializableValue):
    """What each query may attend to: a conjunction of structured parts, combined with ``&``.

    True means attend. A mask is a pytree (arrays inside it are traced, batched and donated like any
    other) and broadcasts over heads unless it holds a dense array with a head dimension. The
    constructors are the static methods `causal`, `window`, `segments`, `lengths`, `prefix` and
    `dense`; ``Mask()`` allows everything. Equal masks have the same parts in the same order.

    Attributes:
      parts: the conjuncts, as the constructors make them; none allows everything.

    Raises:
      TypeError: by ``&``, for anything but another mask.

    Example:
      >>> from axattn import Mask
      >>> mask = Mask.causal() & Mask.window(2, 0)
      >>> mask.materialize(4, 4)[0, 0].astype(int)
      Array([[1, 0, 0, 0],
             [1, 1, 0, 0],
             [1, 1, 1, 0],
             [0, 1, 1, 1]], dtype=int32)
      >>> mask.block_map(4, 4, 2, 2)[0].tolist()  # 0 is empty, 1 partial, 2 full
      [[1, 0], [1, 1]]
    """

    parts: tuple[MaskPart, ...] = ()

    def tree_flatten(self):
        return (self.parts,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children[0])

    # ---- constructors -------------------------------------------------------------------------

    @staticmethod
    def causal(offset: int | jax.Array = 0) -> Mask:
        """Allow keys at positions up to the query's, plus ``offset``.

        Args:
          offset: int, known while tracing, or an int array ``[]`` or ``[B]``, one per batch row.

        Raises:
          TypeError: ``offset`` is no integer.
          ValueError: numbers that do not fit int32.

        Example:
          >>> from axattn import Mask
          >>> mask = Mask.causal(1)  # one token into the future
          >>> mask.materialize(3, 3)[0, 0].astype(int).tolist()
          [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
        """
        return Mask((Causal(_check_integer("offset", offset)),))

    @staticmethod
    def window(left: int | None, right: int | None) -> Mask:
        """Allow keys from ``left`` positions before the query to ``right`` after it, inclusive.

        The token itself is always inside, and ``window(L, 0)`` never sees the future.

        Args:
          left: int >= 0, or None, which is no bound on that side.
          right: likewise, of later positions.

        Raises:
          ValueError: anything else.

        Example:
          >>> from axattn import Mask
          >>> Mask.window(1, 0).materialize(3, 3)[0, 0].astype(int).tolist()
          [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
        """
        for name, value in (("left", left), ("right", right)):
            if value is not None and (not _is_int(value) or value < 0):
                raise ValueError(f"window {name} takes an int >= 0 or None, got {value!r}")
        return Mask((Window(_make_bound(left), _make_bound(right)),))

    @staticmethod
    def segments(q_ids: jax.Array, kv_ids: jax.Array | None = None) -> Mask:
        """Allow keys with the query's own segment id: packed sequences.

        Args:
          q_ids: int ``[..., T]``.
          kv_ids: int ``[..., S]``; by default ``q_ids``.

        Raises:
          TypeError: ids that are no integers, or a scalar.
          ValueError: ids that do not fit int32.

        Example:
          >>> import jax.numpy as jnp
          >>> from axattn import Mask
          >>> Mask.segments(jnp.array([0, 0, 1])).materialize(3, 3)[0, 0].astype(int).tolist()
          [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
        """
        kv_ids = q_ids if kv_ids is None else kv_ids
        ids = []
        for name, value in (("q_ids", q_ids), ("kv_ids", kv_ids)):
            value = check_int32(name, value, "an integer array [..., length]")
            if value.ndim < 1:
                raise TypeError(f"{name} takes an integer array [..., length], got a scalar")
            ids.append(value)
        return Mask((Segments(*ids),))

    @staticmethod
    def lengths(q: int | jax.Array | None = None, kv: int | jax.Array | None = None) -> Mask:
        """Allow only the first ``q`` query slots and the first ``kv`` key slots.

        Key slots behind them may hold anything, NaN included.

        Args:
          q: None, an int, or an int array ``[B]``, one per batch row.
          kv: None, an int, or an int array ``[B]``, of key slots.

        Raises:
          TypeError: lengths that are no integers.
          ValueError: numbers that do not fit int32.

        Example:
          >>> import jax.numpy as jnp
          >>> from axattn import Mask
          >>> Mask.lengths(q=2, kv=1).materialize(3, 3)[0, 0].astype(int).tolist()
          [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
          >>> ragged = Mask.lengths(kv=jnp.array([1, 3]))  # a batch of two
        """
        return Mask(
            (
                Lengths(
                    None if q is None else _check_integer("q", q),
                    None if kv is None else _check_integer("kv", kv),
                ),
            )
        )

    @staticmethod
    def prefix(length: int | jax.Array) -> Mask:
        """Allow the first ``length`` positions to see each other; the rest is causal (prefix-LM).

        The rule is that of https://arxiv.org/abs/1910.10683, section 3.2.

        Args:
          length: int, known while tracing, or an int array ``[]`` or ``[B]``, one per batch row.

        Raises:
          TypeError: ``length`` is no integer.
          ValueError: numbers that do not fit int32.

        Example:
          >>> from axattn import Mask
          >>> Mask.prefix(2).materialize(3, 3)[0, 0].astype(int).tolist()
          [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
        """
        return Mask((Prefix(_check_integer("length", length)),))

    @staticmethod
    def dense(array: jax.Array) -> Mask:
        """Take any boolean array: a mask without structure, which costs T x S memory.

        Args:
          array: bool, broadcastable to ``[..., N, T, S]``; True means attend.

        Raises:
          TypeError: an array of another dtype.

        Example:
          >>> import jax.numpy as jnp
          >>> from axattn import Mask
          >>> mask = Mask.causal() & Mask.dense(jnp.array([True, False, True]))  # of keys
          >>> mask.materialize(3, 3)[0, 0].astype(int).tolist()
          [[1, 0, 0], [1, 0, 0], [1, 0, 1]]
        """
        array = jnp.asarray(array)
        if array.dtype != jnp.bool_:
            raise TypeError(f"mask takes a boolean array (True = attend), got {array.dtype}")
        return Mask((Dense(array),))

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            raise TypeError(
                f"& takes another Mask, got {type(other).__name__}; Mask.dense makes one of it"
            )
        return Mask(self.parts + other.parts)

    def __eq__(self, other: object) -> bool:
        """Compare parts in order, with equal numbers and arrays (traced: the same ones)."""
        if not isinstance(other, Mask):
            return NotImplemented
        mine, theirs = map(jax.tree.leaves, (self, other))
        structure: Any = jax.tree.structure(self)
        return structure == jax.tree.structure(other) and all(map(_is_same, mine, theirs))

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self))

    # ---- answers ------------------------------------------------------------------------------

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
        """Compute the state of every block of queries and keys, by which kernels skip work.

        Args:
          q_len: T, query slots.
          kv_len: S, key slots.
          block_q: query slots per block.
          block_kv: key slots per block.
          q_positions: int32 ``[T]`` or ``[B, T]``; by default 0, 1, 2...
          kv_positions: int32 ``[S]`` or ``[B, S]``; likewise.

        Returns:
          int8 ``[B or 1, ceil(T / block_q), ceil(S / block_kv)]``. Empty (0) and full (2) are
          promises, partial (1) is "look inside".

        Raises:
          ValueError: a block size below 1; positions, or an array in the mask, that do not fit T
            or S.

        Example:
          >>> from axattn import Mask
          >>> Mask.causal().block_map(6, 6, 2, 2)[0].tolist()
          [[1, 0, 0], [2, 1, 0], [2, 2, 1]]
        """
        if block_q < 1 or block_kv < 1:
            raise ValueError(f"block_q and block_kv take ints >= 1, got {block_q}, {block_kv}")
        layout = BlockLayout(
            q_len,
            kv_len,
            block_q,
            block_kv,
            check_positions("q_positions", q_positions, q_len),
            check_positions("kv_positions", kv_positions, kv_len),
        )
        mask = normalize_mask(self, None, q_len, kv_len)
        rows = jax.vmap(make_block_row_states(mask, layout))(
            jnp.arange(layout.num_q, dtype=jnp.int32)
        )
        return jnp.moveaxis(rows, 0, 1)

    def materialize(
        self,
        q_len: int,
        kv_len: int,
        *,
        q_positions: jax.Array | None = None,
        kv_positions: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the mask as an array, for tests and pictures.

        Args:
          q_len: T, query slots.
          kv_len: S, key slots.
          q_positions: int32 ``[T]`` or ``[B, T]``; by default 0, 1, 2...
          kv_positions: int32 ``[S]`` or ``[B, S]``; likewise.

        Returns:
          bool ``[B or 1, N or 1, T, S]``, True where the query attends to the key.

        Raises:
          ValueError: positions, or an array in the mask, that do not fit T or S.

        Example:
          >>> import jax.numpy as jnp
          >>> from axattn import Mask
          >>> newest = jnp.array([2])  # the query of a decode step, at position 2
          >>> Mask.causal().materialize(1, 4, q_positions=newest)[0, 0].astype(int).tolist()
          [[1, 1, 1, 0]]
        """
        q = Span(0, q_len, check_positions("q_positions", q_positions, q_len))
        kv = Span(0, kv_len, check_positions("kv_positions", kv_positions, kv_len))
        ok = compute_mask_tile(normalize_mask(self, None, q_len, kv_len), q, kv)
        if ok is None:
            ok = jnp.ones((1, 1, 1, 1), bool)
        return jnp.broadcast_to(ok, (*ok.shape[:2], q_len, kv_len))


_serialization.register(Mask, ("parts",))


def compute_mask_tile(mask: Mask, q: Slots, kv: Slots) -> jax.Array | None:
    """Compute the mask of one tile of scores.

    Args:
      q: the ``axattn._mask_parts.Span`` of its query slots.
      kv: that of its key slots.

    Returns:
      bool, broadcastable to ``[B, N, q.size, kv.size]``; None where everything is allowed.
    """
    ok = None
    for part in mask.parts:
        allowed = part.allowed(q, kv)
        ok = allowed if ok is None else ok & allowed
    return ok


def make_block_row_states(mask: Mask, layout: BlockLayout):
    """Return a function from a query block to its row of block states.

    Args:
      layout: the blocks of a call.

    Returns:
      A function of an int, whose row is int8 ``[B or 1, num_kv]`` of ``EMPTY``, ``PARTIAL``,
      ``FULL``: O(S / block) memory, so that nothing of size (T / block) x (S / block) lives on
      the device.
    """
    rows = [part.block_rows(layout) for part in mask.parts]

    def row(i):
        some = every = jnp.ones((1, layout.num_kv), bool)
        for part_row in rows:
            part_some, part_every = part_row(i)
            some, every = some & part_some, every & part_every
        return jnp.where(some, jnp.where(every, FULL, PARTIAL), EMPTY).astype(jnp.int8)

    return row


def normalize_mask(mask: Mask, lead: tuple[int, ...] | None, q_len: int, kv_len: int) -> Mask:
    """Return the mask with every array in canonical form: one batch dimension of B or 1.

    Args:
      lead: the call's leading dimensions; None: not known, take the arrays' own.
      q_len: T, query slots.
      kv_len: S, key slots.

    Raises:
      ValueError: an array that does not broadcast to the call.
    """
    return Mask(tuple(_normalize_part(part, lead, q_len, kv_len) for part in mask.parts))


def take_mask_row(mask: Mask, b: int | jax.Array) -> Mask:
    """Return batch row ``b`` of a normalized mask, as a mask for a batch of one.

    Args:
      b: int, or an int array ``[]``; clipped to the rows that there are.
    """

    def take(part):
        changes = {}
        for name in part.batched_arrays():
            value = getattr(part, name)
            if value is not None and jnp.ndim(value) > 0 and jnp.shape(value)[0] != 1:
                changes[name] = lax.dynamic_slice_in_dim(value, b, 1, 0)
        return dataclasses.replace(part, **changes)

    return Mask(tuple(take(part) for part in mask.parts))


def take_mask_heads(mask: Mask, first: int | jax.Array, count: int) -> Mask:
    """Return query heads ``[first, first + count)`` of a normalized mask."""

    def take(part):
        if not isinstance(part, Dense) or part.array.shape[1] == 1:
            return part
        return Dense(lax.dynamic_slice_in_dim(part.array, first, count, 1))

    return Mask(tuple(take(part) for part in mask.parts))


def varies_by_row(mask: Mask) -> bool:
    """Say whether a normalized mask differs between the rows of the batch."""
    return any(jnp.ndim(leaf) and leaf.shape[0] != 1 for leaf in jax.tree.leaves(mask))


def allows_every_row(mask: Mask, q_len: int, kv_len: int) -> bool:
    """Say whether it is known that each query may attend to some key, where positions are slots."""
    causal = [part for part in mask.parts if isinstance(part, Causal)]
    if any(not isinstance(part.offset, Static) or part.offset < 0 for part in causal):
        return False
    # Every query sees the first key, or its own where a window has a left end.
    windows = any(isinstance(part, Window) for part in mask.parts)
    if windows and not is_known(lambda: q_len <= kv_len, otherwise=False):
        return False
    return all(isinstance(part, (Causal, Window, Prefix)) for part in mask.parts)


def find_kv_lengths(mask: Mask) -> Any:
    """Return how many leading key slots are real: int, int32 ``[B]``, or None for all.

    Slots behind it may hold anything, NaN included: implementations must not let them through.
    """
    return _take_least(part.kv for part in mask.parts if isinstance(part, Lengths))


def find_q_lengths(mask: Mask) -> Any:
    """Return how many leading query slots are real, likewise."""
    return _take_least(part.q for part in mask.parts if isinstance(part, Lengths))


def _is_same(a: Any, b: Any) -> bool:
    traced = isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer)
    return a is b or (not traced and np.array_equal(a, b))


def _take_least(lengths) -> Any:
    least = None
    for length in lengths:
        if length is not None:
            least = length if least is None else jnp.minimum(least, length)
    return least


def check_positions(name: str, positions: jax.Array | None, length: int) -> jax.Array:
    """Return positions as `fill_positions` does. ValueError for a wrong number of them."""
    if positions is not None and jnp.shape(positions)[-1:] != (length,):
        raise ValueError(
            f"{name} takes int [{length}] or [B, {length}], got shape {jnp.shape(positions)}"
        )
    return fill_positions(positions, length)


def fill_positions(positions: jax.Array | None, length: int) -> jax.Array:
    """Return the given positions, or 0, 1, 2..., as int32 ``[B or 1, length]``."""
    if positions is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    positions = jnp.asarray(positions, jnp.int32)
    return positions[None] if positions.ndim == 1 else positions


def zero_unused(array: jax.Array, slots: jax.Array, length) -> jax.Array:
    """Set the slots of ``array [B, n, heads, size]`` at and after ``length`` to zero.

    A slot behind a sequence's length may hold anything; 0 * NaN in a matrix product would let it
    through. ``length`` is None, an int, or int32 ``[B]``.
    """
    if length is None:
        return array
    length = as_column(jnp.asarray(length))
    used = jnp.broadcast_to(
        slots[None] < length, (length.shape[0] if length.ndim else 1, slots.size)
    )
    return jnp.where(used[:, :, None, None], array, jnp.zeros((), array.dtype))


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _make_bound(value: int | None) -> Static | None:
    # No int32 position is that far: it bounds nothing, and sums with it would overflow.
    return None if value is None or value >= _FAR else Static(value)


# No array has an int32 slot or position this large; beyond it, sums of two would overflow.
_FAR = 2**30


def _check_integer(name: str, value: Any) -> Any:
    """Return a Python int (static) or an int32 array; refuse anything else by name."""
    if _is_int(value):
        return Static(max(-_FAR, min(_FAR, int(value))))
    return check_int32(name, value, "an int or an integer array")


def check_int32(name: str, value: Any, takes: str) -> jax.Array:
    """Return ``value`` as an int32 array; refuse by name what is no integer or does not fit."""
    host = np.asarray(value) if isinstance(value, (int, list, tuple, np.ndarray)) else None
    if host is not None and host.dtype.kind in "iu" and host.size:
        least, most = host.min(), host.max()
        if least < -(2**31) or most >= 2**31:
            raise ValueError(f"{name} takes values that fit int32, got {least} to {most}")
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} takes {takes}, got {value!r}") from error
    if not jnp.issubdtype(array.dtype, jnp.integer):
        got = f"{array.dtype} {array.shape}" if array.ndim else f"{value!r} ({array.dtype})"
        raise TypeError(f"{name} takes {takes}, got {got}")
    return array.astype(jnp.int32)


def _normalize_part(
    part: MaskPart, lead: tuple[int, ...] | None, q_len: int, kv_len: int
) -> MaskPart:
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
    """Flatten ``value [lead..., tail...]`` to ``[B or 1, tail...]``, checked against the call."""
    given = value.shape
    value = value.reshape((1,) * (rank - value.ndim) + value.shape)
    own_lead, own_tail = value.shape[: value.ndim - rank], value.shape[value.ndim - rank :]
    for got, want in zip(own_tail, tail, strict=True):
        # Ids are given per slot; only dense arrays may broadcast along an axis.
        if want is not None and got != want and not (rank == 3 and got == 1):
            raise ValueError(f"{label} takes [..., {_join_sizes(tail)}], got shape {given}")
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
    return value.reshape((math.prod(lead), *own_tail))


def _join_sizes(tail: tuple[int | None, ...]) -> str:
    return ", ".join("N" if n is None else str(n) for n in tail)
