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
    sizes = calls.asked(lambda call: choose_chunk_sizes(call, "cpu"), *args, is_causal=is_causal)
    tiles = list_tiles(args, sizes.q, sizes.kv, is_causal=is_causal)
    batch, _, heads, head_dim = args[0].shape
    kv_heads = args[1].shape[2]
    blocks = tiles.max(0)[1:] + 1
    group = heads // kv_heads
    shapes = ((blocks[0], group * sizes.q),) * 2 + ((blocks[1], sizes.kv),) * 2
    drawn = inputs.random_like(
        [
            jax.ShapeDtypeStruct((count, batch, kv_heads, rows, head_dim), args[0].dtype)
            for count, rows in shapes
        ]
    )
    operands = Operands(*drawn, *(jnp.swapaxes(x, -1, -2) for x in drawn[:3]))
    scores = jnp.ones((heads, sizes.q, sizes.kv), jnp.float32)
    rounds = jnp.arange((1 + gradients) * len(tiles))
    steps = {
        "products": functools.partial(multiply, operands, tiles, gradients=gradients),
        "exponentials": functools.partial(exponentiate, scores, rounds),
    }
    found = paired.compare(steps, seconds=seconds)
    return Bounds(*map(found.median, steps))


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


@functools.partial(jax.jit, static_argnames="gradients")
def multiply(operands: Operands, tiles, *, gradients: bool):
    """Sums of the products of every tile, from which XLA can leave out or move none.

    In the form that XLA:CPU is fastest at, and attention could have: head by head, nothing
    transposed in the loop. (With gradients, scores are keys by rows, and dQ is transposed.)
    """
    product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    dtype = operands.query.dtype

    def forward(x: Operands):
        return (product(product(x.query, x.key_t).astype(dtype), x.value),)

    def backward(x: Operands):
        weights = product(x.key, x.query_t).astype(dtype)
        dscores = product(x.value, x.dout_t).astype(dtype)
        return product(x.key_t, dscores), product(dscores, x.query), product(weights, x.dout)

    def take(tile, head):
        row, i, j = tile
        at = Operands(i, i, j, j, i, i, j)
        return Operands(*(x[block, row, head] for x, block in zip(operands, at, strict=True)))

    def sweep(multiply_tile):
        def step(sums, tile):
            return jax.tree.map(jnp.add, sums, multiply_heads(tile)), None

        def multiply_heads(tile):
            return [multiply_tile(take(tile, head)) for head in range(operands.key.shape[2])]

        shapes = jax.eval_shape(multiply_heads, tiles[0])
        return lax.scan(step, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), tiles)[0]

    return [sweep(forward), *([sweep(backward)] if gradients else [])]


@jax.jit
def exponentiate(scores, rounds):
    """``exp(-x)`` of the scores of a tile, of what comes out again, and so on: it stays in 0..1."""
    return lax.scan(lambda x, _: (jnp.exp(-x), None), scores, rounds)[0]
