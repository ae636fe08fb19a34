"""One product per distinct input, the same numbers as one per kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn._layers.fused_projections import project_fused

E, H = 6, 4
RNG = np.random.default_rng(0)
KERNELS = [RNG.normal(size=(E, n, H)).astype(np.float32) for n in (4, 2, 1)]
BIASES = [np.linspace(-1.0, 1.0, n * H, dtype=np.float32).reshape(n, H) for n in (4, 2, 1)]


def same(*arrays):
    return arrays


@pytest.mark.parametrize("lead", [(), (2, 3)])
@pytest.mark.parametrize("groups, products", [("aaa", 1), ("abb", 2), ("aba", 2), ("abc", 3)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_numbers_and_products(lead, groups, products, use_bias):
    given = {c: RNG.normal(size=(*lead, 5, E)).astype(np.float32) for c in groups}
    inputs = [given[c] for c in groups]
    calls = []

    def dot_general(*args, **kwargs):
        calls.append(kwargs)
        return jax.lax.dot_general(*args, **kwargs)

    outs = project_fused(
        inputs,
        KERNELS,
        BIASES if use_bias else None,
        promote=same,
        dot_general=dot_general,
        precision="highest",
    )
    assert calls == [{"precision": "highest"}] * products
    for out, x, kernel, bias in zip(outs, inputs, KERNELS, BIASES, strict=True):
        expected = np.einsum("...te,enh->...tnh", x, kernel) + (bias if use_bias else 0)
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_promotion():
    x = jnp.ones((5, E), jnp.float32)

    def promote(*arrays):
        return tuple(None if a is None else a.astype(jnp.bfloat16) for a in arrays)

    outs = project_fused([x, x, x], KERNELS, None, promote=promote)
    assert all(out.dtype == jnp.bfloat16 for out in outs)
