"""The kernels as what a shard of a sequence does: partial keys, merged and ringed."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import axattn
from axattn import parallel
from tests.kernels.tpu.test_calls import arrays, close, gradients


@pytest.mark.ci
def test_a_ring(interpreted):
    """Two devices whose tokens are in zigzag order: positions say where they are."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    q, k, v = arrays(T=64, S=64, N=2, K=1)
    order = parallel.positions("zigzag", 2, 64)

    def attend(q, k, v, **options):
        return parallel.attention(
            q, k, v, axes=parallel.Axes(sequence="x"), mesh=mesh, strategy="ring",
            layout="zigzag", implementation="mosaic_tpu", **options,
        )  # fmt: skip

    def plain(q, k, v, **options):
        return axattn.dot_product_attention(q, k, v, implementation="xla", **options)

    got = jax.jit(gradients(attend, is_causal=True))(*(x[:, order] for x in (q, k, v)))
    want = jax.jit(gradients(plain, is_causal=True))(q, k, v)
    close(got, [x[:, order] for x in want], 1e-4)
