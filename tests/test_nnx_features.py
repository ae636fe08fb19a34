"""What axattn.nnx adds to Flax: RoPE, norms, windows, sinks, fusion; and NNX's transforms."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import axattn
import axattn.linen
from axattn.nnx import GroupedQueryAttention, MultiHeadAttention
from axattn.rotary import RotaryEmbedding

B, T, N, K, E = 2, 9, 8, 2, 32
H = E // N

EVERYTHING = dict(
    rope=RotaryEmbedding(),
    qk_norm="rms",
    window=(4, 0),
    logits_soft_cap=5.0,
    scale=0.7,
    sinks=True,
    fused_qkv=True,
)


def inputs(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape or (B, T, E))


def made(seed=7, **fields):
    """A layer whose parameters are all random, zeros and ones of the beginning included."""
    layer = GroupedQueryAttention(
        N, E, num_kv_heads=K, **{"decode": False, **fields}, rngs=nnx.Rngs(0)
    )
    state = nnx.state(layer, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    nnx.update(layer, jax.tree.unflatten(tree, leaves))
    return layer


CASES = {
    "plain": dict(),
    "rope": dict(rope=RotaryEmbedding()),
    "layer norm": dict(qk_norm="layer"),
    "rms norm": dict(qk_norm="rms"),
    "epsilon": dict(qk_norm="rms", qk_norm_epsilon=0.5),
    "layer norm over all heads": dict(qk_norm="layer", qk_norm_per_head=False),
    "rms norm over all heads": dict(qk_norm="rms", qk_norm_per_head=False),
    "no bias of the output": dict(out_use_bias=False),
    "no other bias": dict(use_bias=False, out_use_bias=True),
    "window": dict(window=3),
    "soft cap": dict(logits_soft_cap=0.5),
    "scale": dict(scale=0.9),
    "sinks": dict(sinks=True),
    "fused": dict(fused_qkv=True),
    "fused, no bias": dict(fused_qkv=True, use_bias=False),
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_equals_the_linen_layer(fields):
    """The Linen layer is tested against the function; the two dialects are one layer."""
    x = inputs()
    layer = made(**fields)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    linen_layer = axattn.linen.GroupedQueryAttention(N, num_kv_heads=K, **fields)
    kwargs = dict(is_causal=True, segment_ids=jnp.array([0] * 4 + [1] * 5))
    if "rope" in fields:
        kwargs["positions"] = jnp.arange(T) * 2
    np.testing.assert_allclose(
        layer(x, **kwargs), linen_layer.apply({"params": params}, x, **kwargs), atol=1e-5
    )


@pytest.mark.parametrize("which", ["self", "shared kv", "all different"])
def test_fused_qkv_gives_the_same_numbers(which):
    x = inputs()
    args = {
        "self": (x,),
        "shared kv": (x, inputs(seed=2)),
        "all different": (x, inputs(seed=2), inputs(seed=3)),
    }[which]
    seen = []

    def dot_general(*args, **kwargs):
        seen.append(args)
        return jax.lax.dot_general(*args, **kwargs)

    fused = made(fused_qkv=True, qkv_dot_general=dot_general)
    np.testing.assert_allclose(fused(*args), made()(*args), atol=1e-5)
    assert len(seen) == len(args)


class Doubled(nnx.LinearGeneral):
    """A subclass with its own call."""

    def __call__(self, x, out_sharding=None):
        return 2 * super().__call__(x, out_sharding=out_sharding)


class Scaled(nnx.Module):
    """An adapter that has a kernel, and a parameter of its own."""

    def __init__(self, base):
        self.base, self.scale = base, nnx.Param(jnp.full((), 0.5))
        self.kernel, self.bias = base.kernel, base.bias

    def __call__(self, x):
        return self.scale[...] * self.base(x)


def doubled(layer):
    kernel, bias = layer.value.kernel, layer.value.bias
    layer.value = Doubled(E, (K, H), rngs=nnx.Rngs(0))
    layer.value.kernel, layer.value.bias = kernel, bias


CHANGES = {
    "adapter": lambda layer: setattr(layer, "query", Scaled(layer.query)),
    "subclass": doubled,
    "dot_general": lambda layer: setattr(
        layer.key, "dot_general", lambda *args, **kwargs: 3 * jax.lax.dot_general(*args, **kwargs)
    ),
    "no bias": lambda layer: setattr(layer.value, "bias", None),
    "dtype": lambda layer: setattr(layer.query, "dtype", jnp.bfloat16),
    "method": lambda layer: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_projections_are_called_where_qkv_is_fused(change, monkeypatch):
    fused, apart = made(fused_qkv=True), made()
    plain = apart(inputs())
    if change == "method":  # as nnx.capture has it
        call = nnx.LinearGeneral.__call__
        monkeypatch.setattr(
            nnx.LinearGeneral, "__call__", lambda self, *args, **kw: 2 * call(self, *args, **kw)
        )
    for layer in (fused, apart):
        CHANGES[change](layer)
    np.testing.assert_allclose(fused(inputs()), apart(inputs()), atol=1e-5)
    assert np.abs(fused(inputs()) - plain).max() > 1e-3
    if change == "adapter":
        grads = nnx.grad(lambda layer: (layer(inputs()) ** 2).sum())(fused)
        assert abs(grads["query"]["scale"][...]) > 1e-2


def test_rms_norm_parameters():
    layer = made(qk_norm="rms")
    assert isinstance(layer.query_ln, nnx.RMSNorm)
    assert layer.key_ln.scale.shape == (H,)


def test_sinks_are_zeros_at_first():
    layer = MultiHeadAttention(N, E, sinks=True, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    assert layer.sinks.shape == (N,) and layer.sinks.dtype == jnp.bfloat16
    assert not layer.sinks[...].any()


@pytest.mark.parametrize(
    "fields, lead",
    [(dict(window=3), (2,)), (EVERYTHING, (2,)), (EVERYTHING, ()), (EVERYTHING, (2, 3))],
    ids=["window", "everything", "no batch", "two batch dimensions"],
)
def test_decoding_equals_the_causal_pass(fields, lead):
    x = inputs(*lead, T, E)
    layer = made(**fields)
    expected = layer(x, is_causal=True)
    layer.init_cache(x.shape)
    step = nnx.jit(lambda m, token: m(token, decode=True, is_causal=True))
    outs = [step(layer, x[..., t : t + 1, :]) for t in range(T)]
    np.testing.assert_allclose(jnp.concatenate(outs, axis=-2), expected, atol=1e-5)


def test_cache_of_another_dtype():
    x = inputs(B, T, E).astype(jnp.bfloat16)
    layer = made(dtype=jnp.bfloat16)
    layer.init_cache(x.shape)  # float32, as in Flax
    out = layer(x[:, :1], decode=True)
    assert out.dtype == jnp.bfloat16 and layer.cached_key.dtype == jnp.float32


def test_gradients_reach_all_parameters():
    x = inputs()
    grads = nnx.grad(lambda m: (m(x, is_causal=True) ** 2).sum())(made(**EVERYTHING))
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    assert len(leaves) == 11
    for path, g in leaves:
        assert jnp.isfinite(g).all() and (g != 0).any(), path


class TestTransforms:
    def test_split_and_merge(self):
        x = inputs()
        layer = made(**EVERYTHING, dropout_rate=0.1, deterministic=True)
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
        assert hash(graphdef) == hash(nnx.split(layer, nnx.Param, ...)[0])
        np.testing.assert_array_equal(nnx.merge(graphdef, params, rest)(x), layer(x))

    def test_jit(self):
        x = inputs()
        layer = made(**EVERYTHING, implementation=["xla"])
        np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, x), layer(x), atol=1e-5)

    def test_remat(self):
        x = inputs()
        layer = made(**EVERYTHING)

        def loss(call):
            return nnx.grad(lambda m: (call(m, x) ** 2).sum())(layer)

        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            loss(nnx.remat(lambda m, x: m(x))),
            loss(lambda m, x: m(x)),
        )

    def test_scan_over_layers(self):
        x = inputs()

        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key):
            return GroupedQueryAttention(
                N, E, num_kv_heads=K, decode=False, rngs=nnx.Rngs(key), **EVERYTHING
            )

        layers = make(jax.random.split(jax.random.key(0), 3))
        assert layers.key.kernel.shape == (3, E, K, H)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return x + layer(x)

        graphdef, state = nnx.split(layers)
        expected = x
        for i in range(3):
            layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))
            expected += layer(expected)
        np.testing.assert_allclose(forward(x, layers), expected, atol=1e-5)

    def test_sowing_does_not_change_the_result(self):
        x = inputs()
        layer = made(**EVERYTHING, dropout_rate=0.5, deterministic=False)
        run = nnx.capture(layer, nnx.Intermediate)
        out, sown = run(x, sow_weights=True, rngs=nnx.Rngs(dropout=0))
        np.testing.assert_array_equal(out, layer(x, rngs=nnx.Rngs(dropout=0)))
        assert jax.tree.leaves(sown)[0].shape == (B, N, T, T)
