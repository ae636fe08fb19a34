"""Latent attention at DeepSeek-V3's sizes through the compilers: latents are stored once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

import axattn.linen
from axattn import aot, latent
from axattn.cache import DenseCache
from axattn.rotary import RotaryEmbedding
from tests.aot.compilers import need
from tests.tiers import exhaustive

pytestmark = pytest.mark.aot

BATCH, LENGTH, HIDDEN = 4, 8192, 7168
DEEPSEEK = dict(num_heads=128, q_lora_rank=1536, rope=RotaryEmbedding(interleaved=True))


@functools.cache
def layer_and_params(**fields):
    layer = axattn.linen.MultiHeadLatentAttention(
        **DEEPSEEK, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, **fields
    )
    x = jax.ShapeDtypeStruct((1, 8, HIDDEN), jnp.bfloat16)
    return layer, jax.eval_shape(layer.init, jax.random.key(0), x)


def step(layer):
    def run(variables, cache, x):
        return layer.apply(variables, x, cache=cache)

    return run


def analyze(target, tokens, dtype="bfloat16"):
    layer, variables = layer_and_params()
    cache = jax.eval_shape(
        lambda: DenseCache.create(BATCH, LENGTH, **layer.cache_sizes, dtype=dtype)
    )
    x = jax.ShapeDtypeStruct((BATCH, tokens, HIDDEN), jnp.bfloat16)
    r = aot.analyze(step(layer), variables, cache, x, target=target, donate_argnums=(1,))
    assert r.ok, r
    return r, cache


first = pytest.mark.parametrize("target", ["v5p", *exhaustive("h200")])
second = pytest.mark.parametrize("target", [*exhaustive("v5p"), "h200"])


@first
def test_a_token_takes_1152_bytes(target):
    """And nothing of the size of the cache is beside it in a step of decoding."""
    r, cache = analyze(need(target), 1)
    tokens = BATCH * LENGTH
    assert cache.nbytes == tokens * 1152
    assert tokens * 1152 <= r.alias_bytes < 1.02 * tokens * 1152
    assert r.temp_bytes < 0.6 * cache.nbytes


@first
def test_whole_keys_and_values_take_71_times_as_much(target):
    length = 128
    cache = jax.eval_shape(
        lambda: DenseCache.create(1, length, 128, 192, value_head_dim=128, dtype="bfloat16")
    )
    key, value = (jax.ShapeDtypeStruct((1, 1, 128, n), jnp.bfloat16) for n in (192, 128))
    r = aot.analyze(
        lambda cache, key, value: cache.append(key, value),
        cache, key, value, target=need(target), donate_argnums=(0,),
    )  # fmt: skip
    assert r.ok, r
    # A TPU's tiles have whole lanes: 192 features take the place of 256.
    assert length * 81920 <= r.alias_bytes < 1.25 * length * 81920


@second
def test_many_tokens_do_not_copy_the_cache(target):
    """Both forms are in the program, and neither lays out anew or writes out what is stored."""

    def run(cache, *arrays):
        return latent.extend(cache, *arrays)

    def temporaries(slots):
        cache = jax.eval_shape(
            lambda: DenseCache.create(4, slots, **latent.cache_sizes(512, 64), dtype="bfloat16")
        )
        shapes = (4, 256, 16, 192), (4, 256, 512), (4, 256, 64), (512, 16, 128), (512, 16, 128)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        r = aot.analyze(run, cache, *arrays, target=need(target), donate_argnums=(0,))
        assert r.ok, r
        return r.temp_bytes, cache.nbytes

    (small, _), (large, size) = map(temporaries, (8192, 32768))
    assert large - small < 0.05 * size
