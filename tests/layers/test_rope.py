"""Positions of queries and keys, given and by default."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from axattn._layers.rope import rotate_query_key
from axattn.rotary import RotaryEmbedding

Q, K = (np.ones((2, 5, n, 8), np.float32) for n in (4, 2))
ROPE = RotaryEmbedding()


def test_without_rope_nothing_happens():
    assert rotate_query_key(None, Q, K, None, None) == (Q, K)
    for name, given in (("positions", (Q[0, :, 0, 0], None)), ("kv_positions", (None, Q))):
        with pytest.raises(ValueError, match=f"^{name} has no use in a layer with rope=None"):
            rotate_query_key(None, Q, K, *given)


def test_defaults_count_from_first():
    at = jnp.arange(5) + 7
    expected = ROPE.apply(Q, at), ROPE.apply(K, at)
    for given in ((None, None, 7), (at, None), (at, at), (None, at, jnp.array(7))):
        for out, want in zip(rotate_query_key(ROPE, Q, K, *given), expected, strict=True):
            np.testing.assert_allclose(out, want, atol=1e-6)


def test_lengths_that_differ():
    short = K[:, :3]
    q, k = rotate_query_key(ROPE, Q, short, None, None)
    np.testing.assert_allclose(q, ROPE.apply(Q, jnp.arange(5)), atol=1e-6)
    np.testing.assert_allclose(k, ROPE.apply(short, jnp.arange(3)), atol=1e-6)
    with pytest.raises(ValueError, match="pass kv_positions too for the 3 keys"):
        rotate_query_key(ROPE, Q, short, jnp.arange(5), None)
