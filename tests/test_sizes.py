"""Sizes that are zero, and sizes that are symbolic: the last shard of a data set, `jax.export`."""

from __future__ import annotations

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import axattn
import axattn.linen
import axattn.nnx
from axattn import Mask
from axattn.cache import DenseCache
from axattn.rotary import RotaryEmbedding
from tests import cases, reference
from tests.cases import Shape
from tests.tiers import ci

EMPTY = {
    "nothing": lambda B, T, S: {},
    "structured": lambda B, T, S: dict(
        is_causal=True, local_window_size=(3, 1), logits_soft_cap=2.0, q_offset=2
    ),
    "lengths": lambda B, T, S: dict(key_value_seq_lengths=np.zeros(B, int)),
    "arrays": lambda B, T, S: dict(mask=np.ones((T, S), bool), bias=np.ones((B, 4, T, S), "f4")),
    "segments": lambda B, T, S: dict(
        query_segment_ids=np.zeros((B, T), int), key_value_segment_ids=np.zeros((B, S), int)
    ),
    "dropout": lambda B, T, S: dict(dropout_rate=0.5, dropout_rng=jax.random.key(0)),
    "alibi": lambda B, T, S: dict(alibi_slopes=np.ones(4, "f4"), mask=Mask.prefix(2)),
}


@pytest.mark.parametrize(
    "options", [pytest.param(n, marks=() if n == "arrays" else pytest.mark.ci) for n in EMPTY]
)
@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_empty_arrays(sizes, options):
    batch, q_len, kv_len = sizes
    shape = Shape(B=batch, T=q_len, S=kv_len, N=4, K=2, H=8, h=6)
    q, k, v = cases.arrays(np.random.default_rng(0), shape, jnp.float32).values()

    def attend(*inputs):
        return axattn.dot_product_attention(*inputs, **EMPTY[options](*sizes), return_residual=True)

    (out, lse), pull = jax.vjp(attend, q, k, v)
    assert out.shape == (batch, q_len, 4, 6) and not out.any()
    assert lse.shape == (batch, q_len, 4) and np.isneginf(lse).all()
    for gradient, x in zip(pull((out, lse * 0)), (q, k, v), strict=True):
        assert gradient.shape == x.shape and not gradient.any()


@pytest.mark.parametrize("name", ["xla", "xla_chunked", "mosaic_tpu", "mosaic_gpu", "cudnn"])
def test_empty_arrays_by_name(name):
    """No implementation has anything to do, and so none has a reason to refuse."""
    q, kv = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 0, 2, 8))
    out, lse = axattn.dot_product_attention(
        q, kv, kv, sinks=jnp.arange(4.0), implementation=name, return_residual=True
    )
    assert not out.any()
    np.testing.assert_array_equal(lse, np.broadcast_to(np.arange(4.0), lse.shape))


@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32)], ids=str)
def test_empty_arrays_in_layers(shape):
    x = jnp.ones(shape)
    rope = RotaryEmbedding()
    layer = axattn.linen.MultiHeadAttention(num_heads=4, num_kv_heads=2, rope=rope)
    params = layer.init(jax.random.key(0), jnp.ones((1, 5, 32)))
    assert layer.apply(params, x).shape == shape
    layer = axattn.nnx.MultiHeadAttention(
        4, 32, num_kv_heads=2, rope=rope, decode=False, rngs=nnx.Rngs(0)
    )
    assert layer(x).shape == shape


def test_no_tokens_for_a_cache():
    cache = DenseCache.create(2, 16, num_kv_heads=2, head_dim=8, dtype="int8")
    cache = cache.append(jnp.ones((2, 3, 2, 8)), jnp.ones((2, 3, 2, 8)))
    query, key = jnp.ones((2, 0, 4, 8)), jnp.ones((2, 0, 2, 8))
    out, after = jax.jit(lambda cache: cache.extend(query, key, key))(cache)
    assert out.shape == query.shape
    assert jax.tree.all(jax.tree.map(np.array_equal, cache, after))


# Sizes that a call with symbolic ones is compiled for: one block, whole blocks, and a last one that
# is not whole, of the 128 x 256 that a CPU takes.
SIZES = [(3, 1, 1), (2, 128, 256), (1, 300, 600)]


def symbolic(shape: Shape, sizes: str) -> list[jax.ShapeDtypeStruct]:
    """Query, key and value with the sizes that ``sizes`` names left open."""
    given = dict(b=shape.B, t=shape.T, s=shape.S)
    b, t, s = export.symbolic_shape(
        ", ".join(name if name in sizes else str(size) for name, size in given.items())
    )
    return [
        jax.ShapeDtypeStruct(dims, jnp.float32)
        for dims in (
            (b, t, shape.N, shape.H),
            (b, s, shape.K, shape.H),
            (b, s, shape.K, shape.h),
        )
    ]


@pytest.mark.parametrize(
    ("implementation", "sizes"),
    [
        (None, "bts"),
        *ci((None, "b"), ("xla", "bts"), ("xla_chunked", "ts")),
    ],
)
def test_symbolic_sizes(implementation, sizes):
    def results(q, k, v):
        def attend(q, k, v):
            out, lse = axattn.dot_product_attention(
                q, k, v, is_causal=True, local_window_size=(40, 0), q_offset=3, logits_soft_cap=5.0,
                implementation=implementation, return_residual=True,
            )  # fmt: skip
            return out, lse

        (out, lse), pull = jax.vjp(attend, q, k, v)
        query, key, value = pull((out, lse))
        return {"out": out, "lse": lse, "query": query, "key": key, "value": value}

    base = Shape(B=2, T=5, S=7, N=4, K=2, H=8, h=6)
    exported = export.export(jax.jit(results))(*symbolic(base, sizes))
    for b, t, s in SIZES:
        b, t, s = (
            size if name in sizes else fixed
            for name, size, fixed in zip("bts", (b, t, s), (base.B, base.T, base.S), strict=True)
        )
        rng = np.random.default_rng(0)
        inputs = cases.arrays(rng, Shape(b, t, s, 4, 2, 8, 6), jnp.float32)
        found = exported.call(*inputs.values())
        exact = reference.attend(
            **inputs, is_causal=True, local_window_size=(40, 0), q_offset=3, logits_soft_cap=5.0
        )
        cotangents = np.asarray(found["out"]), np.where(np.isinf(exact.lse), 0, exact.lse)
        wanted = {"out": exact.out, "lse": exact.lse, **exact.gradients(*cotangents)}
        for name, got in found.items():
            np.testing.assert_allclose(got, wanted[name], rtol=2e-5, atol=2e-5, err_msg=name)


MASKS = {
    "segments": lambda b, t: dict(query_segment_ids=jnp.zeros((b, t), jnp.int32)),
    "lengths": lambda b, t: dict(key_value_seq_lengths=jnp.full((b,), 3)),
    "arrays": lambda b, t: dict(mask=jnp.ones((b, 1, t, t), bool), bias=jnp.ones((1, 4, t, t))),
    "dropout": lambda b, t: dict(dropout_rate=0.3, dropout_rng=jax.random.key(3)),
    "alibi": lambda b, t: dict(alibi_slopes=jnp.ones(4), mask=Mask.prefix(2), sinks=jnp.ones(4)),
}


@pytest.mark.ci
@pytest.mark.parametrize(
    ("options", "sizes"), [*((name, ((1, 3), (2, 300))) for name in MASKS), ("segments", ((2, 3),))]
)
def test_symbolic_sizes_of_masks(options, sizes):
    def attend(x):
        return axattn.dot_product_attention(x, x, x, **MASKS[options](*x.shape[:2]))

    # Of few tokens the rows, of which there may be any number, go together.
    b, t = export.symbolic_shape("b, t" if len(sizes) > 1 else f"b, {sizes[0][1]}")
    exported = export.export(jax.jit(attend))(jax.ShapeDtypeStruct((b, t, 4, 8), jnp.float32))
    for b, t in sizes:
        x = jax.random.normal(jax.random.key(t), (b, t, 4, 8))
        np.testing.assert_allclose(exported.call(x), attend(x), rtol=1e-5, atol=1e-5)


@pytest.mark.ci
def test_symbolic_sizes_that_may_be_zero():
    """As of the first rows, or of all tokens but the last: the einsum takes them, blocks do not."""

    def attend(x, **options):
        x = x[1:, 1:].astype(jnp.bfloat16)
        return axattn.dot_product_attention(
            x, x[:, 1:], x[:, 1:], is_causal=True, local_window_size=(9, 0), **options
        )

    b, t = export.symbolic_shape("b, t")
    shape = jax.ShapeDtypeStruct((b, t, 4, 8), jnp.float32)
    exported = export.export(jax.jit(attend))(shape)
    for b, t in ((1, 5), (2, 1), (2, 2), (3, 40)):
        x = jax.random.normal(jax.random.key(t), (b, t, 4, 8))
        np.testing.assert_allclose(
            exported.call(x).astype(float), attend(x).astype(float), atol=2e-2
        )
    with pytest.raises(NotImplementedError, match='"xla_chunked" needs sizes of at least 1, got b'):
        export.export(jax.jit(lambda x: attend(x, implementation="xla_chunked")))(shape)


@pytest.mark.ci
def test_symbolic_sizes_in_layers():
    rope = RotaryEmbedding()
    linen = axattn.linen.MultiHeadAttention(num_heads=4, num_kv_heads=2, rope=rope)
    params = linen.init(jax.random.key(0), jnp.ones((1, 5, 32)))
    other = axattn.nnx.MultiHeadAttention(
        4, 32, num_kv_heads=2, rope=rope, decode=False, rngs=nnx.Rngs(0)
    )
    b, t = export.symbolic_shape("b, t")
    for layer in (
        lambda x: linen.apply(params, x, mask=flax.linen.make_causal_mask(x[..., 0])),
        other,
    ):
        exported = export.export(jax.jit(layer))(jax.ShapeDtypeStruct((b, t, 32), jnp.float32))
        for x in (jnp.ones((2, 3, 32)), jax.random.normal(jax.random.key(0), (1, 260, 32))):
            np.testing.assert_allclose(exported.call(x), layer(x), rtol=1e-5, atol=1e-5)
