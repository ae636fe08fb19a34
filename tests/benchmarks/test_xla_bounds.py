from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import inputs, xla_bounds


def test_tiles_are_those_with_a_score():
    args = [jnp.zeros((2, length, heads, 8)) for length, heads in ((10, 4), (12, 2))]
    count = {
        causal: len(xla_bounds.list_tiles(args, 4, 3, is_causal=causal)) for causal in (True, False)
    }
    # Rows 0..3 see keys 0..3, in two blocks; rows 4..7 three; rows 8 and 9 four.
    assert count == {True: 2 * (2 + 3 + 4), False: 2 * 3 * 4}


@pytest.mark.parametrize("gradients, products", [(False, 2), (True, 7)])
def test_products_of_the_tiles(gradients, products):
    blocks = [inputs.random_like(jax.ShapeDtypeStruct(shape, "float32")) for shape in
              ((2, 1, 2, 6, 8), (2, 1, 2, 6, 8), (3, 1, 2, 4, 8), (3, 1, 2, 4, 8))]  # fmt: skip
    operands = xla_bounds.Operands(*blocks, *(x.swapaxes(-1, -2) for x in blocks[:3]))
    tiles = np.array([(0, 0, 0), (0, 0, 2), (0, 1, 1)])
    text = str(jax.make_jaxpr(lambda *a: xla_bounds.multiply(*a, gradients=gradients))(
        operands, tiles))  # fmt: skip
    assert text.count("dot_general") == 2 * products  # of two heads
    q, do, k, v = (x[:, 0] for x in blocks)
    out = xla_bounds.multiply(operands, tiles, gradients=gradients)
    forward = [
        sum(q[i, head] @ k[j, head].T @ v[j, head] for _, i, j in tiles) for head in range(2)
    ]
    np.testing.assert_allclose([head[0] for head in out[0]], forward, rtol=1e-4, atol=1e-4)
    if gradients:
        for head, (dq, dk, dv) in enumerate(out[1]):
            tile = [(q[i, head], do[i, head], k[j, head], v[j, head]) for _, i, j in tiles]
            wanted = (
                sum((do @ v.T @ k).T for q, do, k, v in tile),
                sum((do @ v.T).T @ q for q, do, k, v in tile),
                sum((q @ k.T).T @ do for q, do, k, v in tile),
            )
            for got, want in zip((dq, dk, dv), wanted, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_both_are_measured():
    args = inputs.attention_inputs(1, 16, 16, 4, 2, 8, "bfloat16")
    found = xla_bounds.measure(args, is_causal=True, gradients=False, seconds=0)
    assert found.products > 0 and found.exponentials > 0
    assert found.total == found.products + found.exponentials
