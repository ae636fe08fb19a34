from __future__ import annotations

import functools

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


@pytest.mark.parametrize("backward, products", [(False, 2), (True, 5)])
def test_products_of_the_tiles(backward, products):
    args = [jnp.zeros(shape) for shape in ((1, 6, 4, 8), (1, 12, 2, 8))]
    tiles = np.array([(0, 0, 0), (0, 0, 2), (0, 1, 1)])
    operands = xla_bounds.draw_operands(args, tiles, 3, 4)
    multiply = functools.partial(xla_bounds.multiply, backward=backward)
    # Of two heads.
    assert str(jax.make_jaxpr(multiply)(operands, tiles)).count("dot_general") == 2 * products
    for head, found in enumerate(multiply(operands, tiles)):
        wanted = [0] * len(found)
        for _, i, j in tiles:
            q, do, k, v = (
                x[block, 0, head] for x, block in zip(operands[:4], (i, i, j, j), strict=True)
            )
            scores, dscores = q @ k.T, do @ v.T
            terms = ((dscores @ k).T, dscores.T @ q, scores.T @ do) if backward else (scores @ v,)
            wanted = [total + term for total, term in zip(wanted, terms, strict=True)]
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradients", [False, True])
def test_both_are_measured(gradients):
    args = inputs.attention_inputs(1, 16, 16, 4, 2, 8, "bfloat16")
    found = xla_bounds.measure(args, is_causal=True, gradients=gradients, seconds=0)
    assert found.products > 0 and found.exponentials > 0
    assert found.total == found.products + found.exponentials
