"""Caches for all layers of the example model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from axattn.cache import Cache, DenseCache, PagedCache, RingCache
from examples.decoder import Config

KINDS = ("dense", "ring", "paged")


def make_caches(
    config: Config,
    kind: str,
    batch: int,
    length: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    page_size: int = 64,
    max_append: int = 64,
) -> tuple[Cache, ...]:
    """Empty caches for texts of up to ``length`` tokens, one per layer.

    Args:
      kind: "dense"; "ring": rings in the local layers, which hold a window whatever the length, and
        dense caches in the others; "paged": a pool per layer, with all pages handed out in order
        (an allocator such as ``axattn.cache.PagePool`` hands them out on demand).
      dtype: of keys and values: float32, bfloat16, float16, int8, float8_e4m3fn or int4.
      page_size: tokens per page.
      max_append: of rings; a longer chunk goes into them in several steps.

    Raises:
      ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind takes one of {', '.join(KINDS)}, got {kind!r}")
    heads = config.kv_heads, config.head_dim

    def cache(window):
        if kind == "ring" and window is not None:
            return RingCache.create(batch, window, *heads, max_append=max_append, dtype=dtype)
        if kind != "paged":
            return DenseCache.create(batch, length, *heads, dtype=dtype)
        pages = -(-length // page_size)
        paged = PagedCache.create(batch, batch * pages, page_size, pages, *heads, dtype=dtype)
        return paged.with_table(jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages))

    return tuple(cache(window) for window in config.windows)
