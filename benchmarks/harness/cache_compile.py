"""What a compiler plans for a key/value cache: its memory, and that of appending to it."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax

from axattn import aot
from axattn.cache import DenseCache, PagedCache
from benchmarks.harness.cache_sizes import QUANTIZED, CacheCase


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Bytes of one layer's cache in a compiled program that appends a token to each row.

    Attributes:
      claimed: what ``cache.nbytes`` says.
      aliased: of the donated arrays, those whose memory the result takes over; None where the
        compiler refused.
      tiled: what the arrays come to when their sides are rounded up to the tiles that the
        compiler chose for them; ``claimed`` where it has none.
      temp: temporaries of the program. As large as an array: appending copies it.
      refusal: the compiler's, in a line.
    """

    claimed: int
    aliased: int | None = None
    tiled: int | None = None
    temp: int | None = None
    refusal: str | None = None


def create(case: CacheCase):
    """The empty cache of one layer."""
    if case.kind == "dense":
        return DenseCache.create(
            case.batch, case.tokens, case.kv_heads, case.head_dim, dtype=case.dtype
        )
    return PagedCache.create(
        case.batch,
        case.batch * case.pages_per_row,
        case.page_size,
        case.pages_per_row,
        case.kv_heads,
        case.head_dim,
        dtype=case.dtype,
    )


def compile_append(case: CacheCase, target: str) -> Compiled:
    """Compiles one token more per row for ``target``; nothing is run, nor allocated."""
    cache = jax.eval_shape(functools.partial(create, case))
    new = jax.ShapeDtypeStruct(
        (case.batch, 1, case.kv_heads, case.head_dim),
        "bfloat16" if case.dtype in QUANTIZED else case.dtype,
    )
    rest = dataclasses.replace(cache, arrays=None)
    # The arrays are donated and nothing else is: what is aliased is theirs alone.
    report = aot.analyze(_append, cache.arrays, rest, new, new, target=target, donate_argnums=0)
    if report.refusal is not None:
        return Compiled(cache.nbytes, refusal=str(report.refusal))
    formats = report.compiled.input_formats[0][0]
    sizes = (
        tiled_bytes(array.shape, array.dtype, format.layout)
        for array, format in zip(
            jax.tree.leaves(cache.arrays), jax.tree.leaves(formats), strict=True
        )
    )
    return Compiled(cache.nbytes, report.alias_bytes, sum(sizes), report.temp_bytes)


def _append(arrays, rest, key, value):
    cache = dataclasses.replace(rest, arrays=arrays).append(key, value)
    return cache.arrays, dataclasses.replace(cache, arrays=None)


def tiled_bytes(shape: tuple[int, ...], dtype, layout) -> int:
    """The size of an array in a layout (``jax.experimental.layout.Layout``) with its padding."""
    sides = [shape[axis] for axis in layout.major_to_minor]
    # The first tile is over the minor dimensions; those after it cut it up and add nothing.
    tile = layout.tiling[0] if layout.tiling else ()
    for i, side in enumerate(reversed(tile), 1):
        sides[-i] = -(-sides[-i] // side) * side
    # Where elements are not packed, int4 takes a byte.
    bits = layout.sub_byte_element_size_in_bits or 8 * dtype.itemsize
    return bits * math.prod(sides) // 8
