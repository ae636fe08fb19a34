"""A ring buffer for sliding-window attention: the window bounds its memory."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self, overload

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from axattn import _jax_compat
from axattn._stored import UNUSED_POSITION
from axattn._typing import Array, ArrayLike, Float, Float32, Integer
from axattn.cache._base import Cache, register_kind
from axattn.cache._checks import check_counts, check_positive, is_concrete, move_to_host
from axattn.cache._storage import make_empty_fields
from axattn.cache._write import SlotMapping, count_runs

# Options that go by slots: in a ring the token of a slot changes.
_SLOT_OPTIONS = ("mask", "bias", "query_segment_ids", "key_value_segment_ids")


@lambda cls: register_kind(cls, data=("positions",), static=("window",))
@dataclasses.dataclass(frozen=True, eq=False)
class RingCache(Cache):
    """A ring buffer for sliding-window attention: the window bounds its memory.

    Token p of a row is in slot p % slots; arrays are ``[B, K, slots, size]``. `create` makes it.
    Methods and the other attributes are those of `Cache`. Options that go by slots (``mask``,
    ``bias``, segment ids) are refused, because the token of a slot changes.

    Attributes:
      positions: int32 ``[B, slots]``, the position of the token in each slot; 2**30 for no token.
      window: tokens to the left that a query sees besides itself.

    Raises:
      ValueError: by `create` and the methods, for wrong sizes, for tokens that do not fit and for
        options that a ring does not support.
      TypeError: by both, for wrong dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn.cache import RingCache
      >>> cache = RingCache.create(1, window=6, num_kv_heads=1, head_dim=4, max_append=2)
      >>> cache.capacity, cache.max_append
      (8, 2)
      >>> key = value = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
      >>> for _ in range(5):
      ...     cache = cache.append(key, value)
      >>> cache.lengths.tolist(), cache.positions[0].tolist()  # ten tokens, the last eight of them
      ([10], [8, 9, 2, 3, 4, 5, 6, 7])
    """

    positions: Integer[Array, "B S"]
    window: int

    @staticmethod
    def create(
        batch: int,
        window: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_append: int = 1,
        value_head_dim: int | None = None,
        values_in_keys: bool = False,
        dtype: DTypeLike = jnp.bfloat16,
        key_center: ArrayLike | None = None,
    ) -> RingCache:
        """Create an empty cache of ``window + max_append`` slots per row, a multiple of 8.

        Args:
          batch, num_kv_heads, head_dim: B, K and H.
          window: tokens to the left that a query sees besides itself, as in
            ``local_window_size=(window, 0)``.
          max_append: maximum number of tokens of one `append`, whose first one still needs the
            window before it. `extend` takes any number, in steps of this many. `truncate` can
            remove this many of the newest tokens. Rounding the slots up can make it larger.
          value_head_dim, values_in_keys, dtype: as in `DenseCache.create`.
          key_center: float ``[K, H]``, as in `DenseCache.create`.

        Raises:
          ValueError: sizes that are not positive integers (``window`` can be 0), or that contradict
            each other.
          TypeError: another ``dtype``, or a ``key_center`` that is not floating point.
        """
        check_positive("max_append", max_append)
        if isinstance(window, bool) or not isinstance(window, (int, np.integer)) or window < 0:
            raise ValueError(f"window takes an int >= 0, got {window!r}")
        # GPU kernels copy groups of 8 slots.
        slots = -(-(int(window) + max_append) // 8) * 8
        fields = make_empty_fields(
            batch,
            batch,
            slots,
            num_kv_heads,
            head_dim,
            value_head_dim=value_head_dim,
            values_in_keys=values_in_keys,
            dtype=dtype,
            key_center=key_center,
        )
        positions = jnp.full((batch, slots), UNUSED_POSITION, jnp.int32)
        return RingCache(**fields, positions=positions, window=int(window))

    @property
    def capacity(self) -> int:
        """Slots per row. The number of tokens of a row is not limited."""
        return self.positions.shape[1]

    @property
    def max_append(self) -> int:
        """Maximum number of tokens of one `append`."""
        return self.capacity - self.window

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
        *,
        lengths: ArrayLike | None = None,
        **options: Any,
    ) -> Any:
        """Append tokens, then attend from them, in steps of at most ``max_append`` tokens.

        Args:
          query: ``[B, T, N, H]``, floating point; N a multiple of K.
          key: ``[B, T, K, H]``.
          value: ``[B, T, K, h]``; None where values are in the keys.
          lengths: int ``[B]`` or int: how many of the T tokens are real in each row.
          **options: as in `Cache.attend`. With more than ``max_append`` tokens
            ``return_residual`` and ``q_positions`` are refused.

        Returns:
          ``(output, cache)``; output ``[B, T, N, h]``.

        Raises:
          ValueError: as `Cache.extend`; an option that is refused with so many tokens.
          TypeError: as `Cache.extend`.
        """
        step, length = self.max_append, (*jnp.shape(key), 0, 0)[1]
        if length <= step or jnp.shape(query)[1] != length:
            return Cache.extend(self, query, key, value, lengths=lengths, **options)
        if options.get("return_residual") or options.get("q_positions") is not None:
            raise ValueError(
                f"extend takes return_residual and q_positions for at most max_append = {step} "
                f"tokens, got {length}"
            )
        key, value, counts = self._check_tokens(key, value, lengths)
        chunks = -(-length // step)

        def split_chunks(x):
            x = jnp.pad(x, ((0, 0), (0, chunks * step - length), (0, 0), (0, 0)))
            return jnp.moveaxis(x.reshape(x.shape[0], chunks, step, *x.shape[2:]), 1, 0)

        def extend_chunk(cache, chunk):
            i, *tokens = chunk
            chunk_counts = jnp.clip(counts - i * step, 0, step)
            out, cache = Cache.extend(cache, *tokens, lengths=chunk_counts, **options)
            return cache, out

        tokens = (query, key) if value is None else (query, key, value)
        cache, out = lax.scan(extend_chunk, self, (jnp.arange(chunks), *map(split_chunks, tokens)))
        out = jnp.moveaxis(out, 0, 1)
        return out.reshape(out.shape[0], chunks * step, *out.shape[3:])[:, :length], cache

    def truncate(self, lengths: ArrayLike) -> RingCache:
        """Keep the first ``lengths`` tokens of each row.

        Args:
          lengths: int or int ``[B]``: tokens that each row keeps.

        Raises:
          ValueError: tokens of the window before the new end were overwritten. At most
            ``max_append`` tokens can be removed (any number if ``window`` is 0). Under ``jit`` the
            row does not change and its ``overflowed`` is set. Negative lengths, or another shape.
          TypeError: lengths that are no integers.
        """
        lengths = check_counts("lengths", lengths, self.batch)
        current, positions, new = move_to_host(self.lengths, self.positions, lengths)
        new = (np if is_concrete(current) else jnp).minimum(current, new)
        # The next query, at position new, sees new - window to new - 1: nothing, if the window or
        # new is 0.
        oldest = positions.min(1)
        has_window = (oldest <= new - self.window) | (oldest == 0) | (new == current)
        has_window |= (new == 0) | (self.window == 0)
        message = f"tokens of the window before lengths {new} are no longer in the ring"
        if is_concrete(has_window):
            if not has_window.all():
                raise ValueError(message)
        else:
            _jax_compat.check_in_debug(
                has_window.all(), "truncate: the ring no longer has the window"
            )
        new = jnp.where(has_window, new, current).astype(jnp.int32)
        return dataclasses.replace(
            self,
            lengths=new,
            positions=jnp.where(self.positions < new[:, None], self.positions, UNUSED_POSITION),
            overflowed=self.overflowed | ~jnp.asarray(has_window),
        )

    def reset(self, rows: ArrayLike | None = None) -> RingCache:
        cache = super().reset(rows)
        positions = jnp.where(
            self.positions < cache.lengths[:, None], self.positions, UNUSED_POSITION
        )
        return dataclasses.replace(cache, positions=positions)

    def _check_positions(self, q_positions):
        """Raise ValueError for a query whose window was overwritten, where this can be known."""
        if q_positions is None or not is_concrete(q_positions, self.positions):
            return
        oldest, first = np.asarray(self.positions).min(1), np.asarray(q_positions).min(-1)
        if not (
            (oldest == 0) | (oldest == UNUSED_POSITION) | (first - self.window >= oldest)
        ).all():
            raise ValueError(
                f"q_positions takes positions whose window of {self.window} is still in the ring, "
                f"got {first.tolist()} and later; the oldest there are {oldest.tolist()}"
            )

    def _list_row_fields(self):
        return (*super()._list_row_fields(), "positions")

    def _append(self, key, value, counts):
        length = key.shape[1]
        if length > self.max_append:
            raise ValueError(
                f"key takes at most max_append = {self.max_append} tokens at a time in this ring, "
                f"got {length}; extend takes any number"
            )
        cache = super()._append(key, value, counts)
        # The newest token of each slot; the slot was written if that is one of the new tokens.
        slots = jnp.arange(self.capacity, dtype=jnp.int32)[None]
        last = cache.lengths[:, None] - 1
        newest = last - (last - slots) % self.capacity
        fresh = newest >= self.lengths[:, None]
        return dataclasses.replace(cache, positions=jnp.where(fresh, newest, self.positions))

    def _check_room(self, counts):
        # UNUSED_POSITION marks empty slots: positions have to stay below it.
        lengths, counts = move_to_host(self.lengths, counts)
        return (
            lengths + counts < UNUSED_POSITION,
            f"a row takes fewer than {UNUSED_POSITION} tokens",
        )

    def _map_slots(self, counts, length):
        rows = jnp.arange(self.batch, dtype=jnp.int32)[:, None]
        rows = jnp.tile(rows, (1, count_runs(length, self.capacity)))
        return SlotMapping(self.lengths, counts, rows)

    def _make_mask_options(self):
        return {"kv_positions": self.positions, "local_window_size": (self.window, 0)}

    def _check_options(self, options, length, q_positions, is_causal):
        super()._check_options(options, length, q_positions, is_causal)
        if length > self.max_append:
            raise ValueError(
                f"query takes at most max_append = {self.max_append} of the newest tokens in this "
                f"ring, got {length}: what older ones saw is overwritten"
            )
        self._check_positions(q_positions)
        if not is_causal:
            raise ValueError("is_causal takes True: a ring holds the window before each query")
        for name in _SLOT_OPTIONS:
            if options.get(name) is not None:
                raise ValueError(f"{name} speaks of slots, which a ring uses again; it takes None")
        window = options.get("local_window_size")
        if window is None:
            options.pop("local_window_size", None)
            return
        left = window[0] if isinstance(window, (tuple, list)) else window
        if left is None or left > self.window:
            raise ValueError(
                f"local_window_size takes at most (window, 0) = ({self.window}, 0) in this ring, "
                f"got {window!r}"
            )
