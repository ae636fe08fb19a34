"""What XLA takes here for the parts of attention that nothing can leave out.

The matrix products alone, and the exponentials alone, over as many scores and in blocks of the size
that the chunked path takes: what is above their sum is loads, maxima, sums, masks and loops.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from axattn._implementations.chunked.block_sizes import choose_chunk_sizes
from benchmarks.harness import calls, inputs, paired


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds."""

    products: float
    exponentials: float

    @property
    def total(self) -> float:
        return self.products + self.exponentials


def measure(args: Any, *, is_causal: bool, gradients: bool, seconds: float) -> Bounds:
    """Times both for the call of query ``[B, T, N, H]``, key and value ``[B, S, K, H]``.

    Two products and one exponential per score; with ``gradients`` five products and an exponential
    more, those of a backward pass that has kept no scores.
    """
    products, exponentials = {}, {}
    for backward in (False, True)[: 1 + gradients]:
        choose = functools.partial(choose_chunk_sizes, platform="cpu", backward=backward)
        sizes = calls.asked(choose, *args, is_causal=is_causal)
        tiles = list_tiles(args, sizes.q, sizes.kv, is_causal=is_causal)
        operands = draw_operands(args, tiles, sizes.q, sizes.kv)
        products[f"products {backward}"] = functools.partial(
            multiply, operands, tiles, backward=backward
        )
        (*_, kv_heads, rows, _), kv = operands.query.shape, sizes.kv
        exponentials[f"exponentials {backward}"] = functools.partial(
            exponentiate, jnp.ones((rows, kv), jnp.float32), jnp.arange(len(tiles) * kv_heads)
        )
    found = paired.compare(products | exponentials, seconds=seconds)
    return Bounds(*(sum(map(found.median, names)) for names in (products, exponentials)))


def list_tiles(args: Any, q: int, kv: int, *, is_causal: bool) -> np.ndarray:
    """(batch row, block of queries, block of keys) of every tile with a score, ``[tiles, 3]``."""
    (batch, q_len, *_), kv_len = args[0].shape, args[1].shape[1]
    found = []
    for b, i in itertools.product(range(batch), range(math.ceil(q_len / q))):
        seen = min((i + 1) * q, q_len, kv_len) if is_causal else kv_len
        found += [(b, i, j) for j in range(math.ceil(seen / kv))]
    return np.array(found)


class Operands(NamedTuple):
    """Blocks ``[blocks, B, K, rows, H]``, and transposed ones ``[blocks, B, K, H, rows]``."""

    query: jax.Array
    dout: jax.Array
    key: jax.Array
    value: jax.Array
    query_t: jax.Array
    dout_t: jax.Array
    key_t: jax.Array


def draw_operands(args: Any, tiles: np.ndarray, q: int, kv: int) -> Operands:
    """Random blocks, as many and as large as the tiles of these arguments need."""
    (batch, _, heads, head_dim), kv_heads = args[0].shape, args[1].shape[2]
    blocks = tiles.max(0)[1:] + 1
    shapes = ((blocks[0], heads // kv_heads * q),) * 2 + ((blocks[1], kv),) * 2
    drawn = inputs.random_like(
        [
            jax.ShapeDtypeStruct((count, batch, kv_heads, rows, head_dim), args[0].dtype)
            for count, rows in shapes
        ]
    )
    return Operands(*drawn, *(jnp.swapaxes(x, -1, -2) for x in drawn[:3]))


@functools.partial(jax.jit, static_argnames="backward")
def multiply(operands: Operands, tiles, *, backward: bool):
    """Sums of the products of every tile in one pass, from which XLA can leave out or move none.

    In the form that XLA:CPU is fastest at, and attention could have: head by head, nothing
    transposed in the loop. (Backward, scores are keys by rows, and dQ is transposed.)
    """
    product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    dtype = operands.query.dtype

    def multiply_forward(x: Operands):
        return (product(product(x.query, x.key_t).astype(dtype), x.value),)

    def multiply_backward(x: Operands):
        weights = product(x.key, x.query_t).astype(dtype)
        dscores = product(x.value, x.dout_t).astype(dtype)
        return product(x.key_t, dscores), product(dscores, x.query), product(weights, x.dout)

    def multiply_heads(tile):
        row, i, j = tile
        at = Operands(i, i, j, j, i, i, j)
        return [
            (multiply_backward if backward else multiply_forward)(
                Operands(*(x[block, row, head] for x, block in zip(operands, at, strict=True)))
            )
            for head in range(operands.key.shape[2])
        ]

    shapes = jax.eval_shape(multiply_heads, tiles[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.scan(
        lambda sums, tile: (jax.tree.map(jnp.add, sums, multiply_heads(tile)), None), zeros, tiles
    )[0]


@jax.jit
def exponentiate(scores, rounds):
    """``exp(-x)`` of the scores of a tile, of what comes out again, and so on: it stays in 0..1."""
    return lax.scan(lambda x, _: (jnp.exp(-x), None), scores, rounds)[0]
