"""A layer's attention over a cache that is passed in and returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from axattn._typing import Array, ArrayLike, CacheType, Float, Integer
from axattn.cache import Cache
from axattn.layers.masking import as_given
from axattn.layers.positions import rotate
from axattn.masks import Mask
from axattn.rotary import RotaryEmbedding


def attend_over_cache(
    cache: CacheType,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K h"],
    *,
    rope: RotaryEmbedding | None,
    positions: Integer[Array, "..."] | None,
    lengths: ArrayLike | None,
    mask: Array | Mask | None,
    options: Mapping[str, Any],
    excluded: Mapping[str, bool],
) -> tuple[Float[Array, "B T N h"], CacheType]:
    """One step of a layer: rotate, append to the cache, attend over it.

    Keys and values are cast to the dtype of the cache, which its maker chose.

    Args:
      cache: any of ``axattn.cache``.
      query, key, value: of the new tokens.
      rope, positions: as in the layer; positions are the cache's next ones by default.
      lengths: int [B], the tokens that are real in each row.
      mask: an `axattn.Mask` or an array [..., N, T, capacity]; nonzero: attend.
      options: more for ``cache.extend``.
      excluded: what a layer cannot do over a cache, by name, and whether it was asked for.

    Raises:
      ValueError: something excluded was asked for; and as ``cache.extend``.
      TypeError: ``cache`` is none.
    """
    check_step("inputs_q", cache, query, excluded)
    if rope is None:
        rotate(rope, query, key, positions, None)  # the check
    else:
        where = cache.next_positions(query.shape[1]) if positions is None else positions
        query, key = rotate(rope, query, key, where, None)
    if cache.stores_floats:
        key, value = key.astype(cache.dtype), value.astype(cache.dtype)
    return cache.extend(query, key, value, lengths=lengths, mask=as_given(mask), **options)


def check_step(
    inputs: str, cache: Any, query: Float[Array, "..."], excluded: Mapping[str, bool]
) -> None:
    """Raises what `attend_over_cache` says it raises, but for what the cache itself finds.

    ``inputs`` is the name of what queries are made of.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache takes a cache of axattn.cache, got {type(cache).__name__}")
    for name, asked in excluded.items():
        if asked:
            raise ValueError(f"{name} does not go with cache")
    if query.ndim != 4 or query.shape[0] != cache.batch:
        raise ValueError(
            f"{inputs} takes [B, T, E] with B = {cache.batch} for this cache, got batch dimensions "
            f"{query.shape[:-3]}"
        )


def reads_caches(attention_fn: Callable, own: Callable) -> bool:
    """Whether ``attention_fn`` is the layer's ``own``: another one takes arrays, not caches."""
    return getattr(attention_fn, "func", attention_fn) is own
