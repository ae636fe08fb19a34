"""A decoding step updates its cache in place and makes no copy of it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from axattn import linen
from axattn._layers import flax_cache
from tests.precision import optimized_jit

BATCH, LENGTH, FEATURES = 4, 4096, 256


def step_memory(layer: nn.Module):
    x = jnp.zeros((BATCH, LENGTH, FEATURES))
    variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))

    def step(cache, params, token):
        y, new = layer.apply({"params": params, "cache": cache}, token, mutable=["cache"])
        return y, new["cache"]

    token = jax.ShapeDtypeStruct((BATCH, 1, FEATURES), jnp.float32)
    lowered = optimized_jit(step, donate_argnums=0).lower(
        variables["cache"], variables["params"], token
    )
    return lowered.compile().memory_analysis()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_no_copy_of_the_cache(kv_heads):
    layer = linen.GroupedQueryAttention(num_heads=4, num_kv_heads=kv_heads, decode=True)
    memory = step_memory(layer)
    one = BATCH * LENGTH * kv_heads * (FEATURES // 4) * 4  # bytes of the keys
    assert memory.alias_size_in_bytes >= 2 * one
    assert memory.temp_size_in_bytes < one


def test_write_token_keeps_the_dtype_and_the_rest():
    cached = jnp.ones((2, 5, 1, 3), jnp.bfloat16)
    got = flax_cache.write_token(cached, jnp.int32(2), jnp.full((2, 1, 1, 3), 7.0))
    assert got.dtype == jnp.bfloat16
    assert (got[:, 2] == 7).all() and (got[:, [0, 1, 3, 4]] == 1).all()
