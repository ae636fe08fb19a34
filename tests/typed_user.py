"""A user's module: type checkers find nothing in it but what it says is wrong (see tests/test_typing.py).

It is checked, not run; what it calls runs in other tests.
"""

from __future__ import annotations

from typing import Any, assert_type

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import axattn
import axattn.nnx
from axattn import Mask, aot, checkpoints, latent, linen, parallel, rotary
from axattn.cache import Cache, DenseCache, PagedCache, PagePool, RingCache

# ---- the function ------------------------------------------------------------------------------


def attend(q: jax.Array, k: jax.Array, v: jax.Array, with_lse: bool) -> jax.Array:
    assert_type(axattn.dot_product_attention(q, k, v, is_causal=True), jax.Array)
    out, lse = axattn.dot_product_attention(q, k, v, return_residual=True)
    assert_type(out, jax.Array)
    assert_type(lse, jax.Array)
    either = axattn.dot_product_attention(q, k, v, return_residual=with_lse)
    assert_type(either, jax.Array | tuple[jax.Array, jax.Array])
    learned = jnp.asarray(0.125)
    out += axattn.dot_product_attention(q, k, v, scale=learned, precision="highest")
    out += axattn.dot_product_attention(
        q, k, v, scale=0.5, implementation=("mosaic", "xla"), precision=jax.lax.Precision.HIGH
    )
    host = np.ones((1, 8, 4, 16), np.float32)
    return out + axattn.dot_product_attention(host, host, host, mask=np.ones((8, 8), bool))


def wrong(q: jax.Array) -> jax.Array:
    axattn.dot_product_attention(q, q, q, implementation="flash")  # type: ignore
    axattn.dot_product_attention(q, q, q, precision="exact")  # type: ignore
    axattn.dot_product_attention(q, q, q, scale="half")  # type: ignore
    axattn.dot_product_attention(q, q, q, casual=True)  # type: ignore
    linen.GroupedQueryAttention(4, num_kv_heads=2, qk_norm="batch")  # type: ignore
    return axattn.dot_product_attention(q, q, q, return_residual=True)  # type: ignore


def masks(q: jax.Array) -> jax.Array:
    mask = Mask.causal() & Mask.window(128, 0) & Mask.lengths(kv=jnp.array([3, 4]))
    assert_type(mask, Mask)
    why = axattn.explain_implementations(q, q, q, mask=mask)
    assert_type(why.chosen, str)
    assert_type(why["cudnn"], str | None)
    report = aot.analyze(axattn.dot_product_attention, q, q, q, target="v5p")
    print(why, report.hbm_bytes)

    def loss(q: jax.Array) -> jax.Array:
        return axattn.dot_product_attention(q, q, q, mask=mask).sum()

    gradient: jax.Array = jax.grad(loss)(q)
    return gradient


def rotate(q: jax.Array) -> jax.Array:
    scaling = rotary.YarnScaling(factor=4.0, original_max_position=4096)
    rope = rotary.RotaryEmbedding(base=500_000.0, scaling=scaling)
    return rotary.apply_rotary(rope.apply(q, jnp.arange(8)), jnp.arange(8))


def over_a_mesh(q: jax.Array) -> jax.Array:
    axes = parallel.Axes(sequence="context")
    out = parallel.attention(q, q, q, axes=axes, layout="zigzag", strategy="ring")
    assert_type(out, jax.Array)
    out, lse = parallel.attention(q, q, q, axes=axes, return_residual=True)
    return out + lse


# ---- layers ------------------------------------------------------------------------------------


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: DenseCache | None = None
    ) -> tuple[jax.Array, DenseCache | None]:
        layer = linen.GroupedQueryAttention(
            num_heads=self.heads,
            num_kv_heads=2,
            rope=rotary.RotaryEmbedding(),
            qk_norm="rms",
            implementation="xla",
        )
        if cache is None:
            assert_type(layer(x, is_causal=True), jax.Array)
            return x + linen.SelfAttention(num_heads=4)(x, mask=Mask.causal()), None
        y, cache = layer(x, cache=cache)
        assert_type(y, jax.Array)
        assert_type(cache, DenseCache)
        return x + y, cache


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = axattn.nnx.GroupedQueryAttention(4, 32, num_kv_heads=2, rngs=rngs)
        self.latent = axattn.nnx.MultiHeadLatentAttention(4, 32, kv_lora_rank=16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(x, is_causal=True)
        return x + self.latent(x, is_causal=True)

    def step(
        self, x: jax.Array, ring: RingCache, whole: DenseCache
    ) -> tuple[jax.Array, RingCache, DenseCache]:
        y, ring = self.attention(x, cache=ring)
        z, whole = self.latent(x, cache=whole)
        return x + y + z, ring, whole


def convert(params: dict[str, Any]) -> Any:
    return checkpoints.mha_to_gqa(params, num_kv_heads=2)


# ---- caches ------------------------------------------------------------------------------------


def decode(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    dense = DenseCache.create(1, 16, num_kv_heads=4, head_dim=16, dtype=jnp.bfloat16)
    out, dense = dense.extend(q, k, v)
    assert_type(out, jax.Array)
    assert_type(dense, DenseCache)
    (out, lse), dense = dense.extend(q, k, v, return_residual=True)
    assert_type(lse, jax.Array)
    dense = dense.append(k, v).truncate(4).reset().fork(jnp.array([0, 0]))
    assert_type(dense.explain_implementations(q).chosen, str)

    ring = RingCache.create(1, 8, num_kv_heads=4, head_dim=16, dtype="int8")
    out, ring = ring.extend(q, k, v)
    assert_type(ring, RingCache)

    pool = PagePool(num_pages=8, page_size=4)
    paged = PagedCache.create(1, 8, 4, 4, num_kv_heads=4, head_dim=16, dtype="float8_e4m3fn")
    paged = paged.with_table(pool.block_table([pool.allocate(7)], 4))
    assert_type(paged, PagedCache)
    return out + read(paged, q)


def read(cache: Cache, q: jax.Array) -> jax.Array:
    out, lse = cache.attend(q, return_residual=True)
    assert_type(lse, jax.Array)
    return out + cache.attend(q)


def absorbed(cache: RingCache, q: jax.Array, up: jax.Array) -> tuple[jax.Array, RingCache]:
    return latent.extend(cache, q, q, q, up, up, precision="high")


def sharded(cache: parallel.ShardedCache, layer: linen.SelfAttention, x: jax.Array) -> jax.Array:
    y, cache = layer(x, cache=cache)
    assert_type(cache, parallel.ShardedCache)
    out, cache = cache.extend(x, x, x)
    assert_type(cache, parallel.ShardedCache)
    return y + out
