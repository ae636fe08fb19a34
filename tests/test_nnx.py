"""What is NNX's own in axattn.nnx: metadata, views, rngs, capture, changed modules, transforms.

What both packages have in common is in ``tests/layers``.
"""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from axattn.nnx import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention, SelfAttention
from axattn.rotary import RotaryEmbedding
from tests.layers.apis import NNX, B, E, H, K, N, T, assert_close, inputs

EVERYTHING = dict(
    rope=RotaryEmbedding(), qk_norm="rms", window=(4, 0), scale=0.7, sinks=True, fused_qkv=True
)


def both(decode=False, **fields):
    """The same layer, Flax's and ours."""
    classes = nnx.MultiHeadAttention, MultiHeadAttention
    return [cls(N, E, rngs=nnx.Rngs(0, dropout=1), decode=decode, **fields) for cls in classes]


def made(**fields):
    layer = NNX(inputs(), cls="GroupedQueryAttention", num_kv_heads=K, **fields)
    return layer.module(jax.tree.map(jnp.asarray, layer.params))


def test_constructor_arguments():
    ours = inspect.signature(MultiHeadAttention.__init__).parameters
    for cls in (SelfAttention, GroupedQueryAttention, MultiQueryAttention):
        assert list(inspect.signature(cls.__init__).parameters) == list(ours)
    with pytest.raises(TypeError, match="nonsense"):
        MultiHeadAttention(N, E, nonsense=1, rngs=nnx.Rngs(0))
    assert MultiQueryAttention(N, E, rngs=nnx.Rngs(0)).key.kernel.shape == (E, 1, H)
    layer = GroupedQueryAttention(N, E, None, None, 2, rngs=nnx.Rngs(0))
    assert layer.value.kernel.shape == (E, 2, H)


def test_self_attention():
    x = inputs()
    layer = SelfAttention(N, E, decode=False, rngs=nnx.Rngs(0, dropout=1))
    np.testing.assert_array_equal(layer(x), both()[1](x))
    with pytest.raises(TypeError):
        layer(x, x)


def test_metadata():
    metadata = dict(
        kernel_metadata={"tag": ("embed", "heads", "kv")},
        out_kernel_metadata={"tag": "out"},
        bias_metadata={"tag": "bias"},
        query_ln_scale_metadata={"tag": "scale"},
    )
    flax_layer, layer = both(normalize_qk=True, **metadata)
    for path, variable in nnx.to_flat_state(nnx.state(flax_layer, nnx.Param)):
        own = functools.reduce(getattr, path, layer)
        assert own.get_metadata() == variable.get_metadata(), path
    rms = MultiHeadAttention(N, E, qk_norm="rms", rngs=nnx.Rngs(0), **metadata)
    assert isinstance(rms.query_ln, nnx.RMSNorm)
    assert rms.query_ln.scale.get_metadata()["tag"] == "scale"


def test_views_and_attributes():
    flax_layer, layer = both(dropout_rate=0.5, decode=None)
    for m in (flax_layer, layer):
        m.set_attributes(deterministic=True, decode=False)
    assert_close(layer(inputs()), flax_layer(inputs()), atol=1e-5)
    for m in (flax_layer, layer):
        m.set_view(deterministic=False)
    assert layer.deterministic is False


def test_kept_rngs():
    x, layer = inputs(), both(dropout_rate=0.5, deterministic=False)[1]
    assert not np.allclose(layer(x), layer(x))
    again = [layer(x, rngs=nnx.Rngs(dropout=3)) for _ in range(2)]
    np.testing.assert_array_equal(*again)
    assert_close(layer(x, deterministic=True), both()[1](x), atol=1e-6)


def test_what_is_missing_is_said():
    x, layer = inputs(), both(dropout_rate=0.5, keep_rngs=False)[1]
    with pytest.raises(ValueError, match="deterministic"):
        layer(x)
    with pytest.raises(ValueError, match="rngs"):
        layer(x, deterministic=False)
    with pytest.raises(ValueError, match="decode"):
        both(decode=None)[1](x)
    with pytest.raises(ValueError, match="init_cache"):
        both(decode=True)[1](x[:, :1])


def test_sizes_of_inputs():
    x, layer = inputs(), both()[1]
    for args, match in (
        ((x[..., :3],), "Incompatible input dimension, got 3"),
        ((x, x[..., :3]), "inputs_k"),
        ((x, x, x[..., :3]), "inputs_v"),
    ):
        with pytest.raises(ValueError, match=match):
            layer(*args)


def test_custom_function_gets_everything():
    seen = {}

    def plain(query, key, value, **kwargs):
        seen.update(kwargs)
        return query

    layer = MultiHeadAttention(N, E, attention_fn=plain, decode=False, window=3, rngs=nnx.Rngs(0))
    layer(inputs())
    assert seen["local_window_size"] == 3
    assert {"mask", "dropout_rng", "deterministic", "module", "is_causal"} <= set(seen)
    assert "scale" not in seen and "sinks" not in seen


def test_input_positions():
    x, positions = inputs(), np.arange(T) * 2  # RoPE does not see a shift
    layer = both()[1]
    layer.rope = RotaryEmbedding()
    assert_close(layer(x, input_positions=positions), layer(x, positions=positions), atol=1e-6)
    with pytest.raises(ValueError, match="input_positions"):
        layer(x, positions=positions, input_positions=positions)


@pytest.mark.ci
@pytest.mark.skipif(not hasattr(nnx, "RoPE"), reason="Flax has RoPE since 0.12.9")
def test_flax_rope():
    x = inputs()
    fn = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE())
    flax_layer, layer = both(attention_fn=fn)
    assert_close(layer(x), flax_layer(x), atol=1e-5)
    own = SelfAttention(N, E, rope=RotaryEmbedding(), decode=False, rngs=nnx.Rngs(0, dropout=1))
    assert_close(own(x), flax_layer(x), atol=1e-5)


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
    assert_close(fused(inputs()), apart(inputs()), atol=1e-5)
    assert np.abs(fused(inputs()) - plain).max() > 1e-3
    if change == "adapter":
        grads = nnx.grad(lambda layer: (layer(inputs()) ** 2).sum())(fused)
        assert abs(grads["query"]["scale"][...]) > 1e-2


def test_decoding_changes_the_layer():
    x, layer = inputs(), made(rope=RotaryEmbedding())
    expected = layer(x, is_causal=True)
    layer.init_cache(x.shape)
    step = nnx.jit(lambda m, token: m(token, decode=True))
    outs = [step(layer, x[:, t : t + 1]) for t in range(T)]
    assert_close(jnp.concatenate(outs, axis=1), expected, atol=1e-5)
    assert layer.cache_index[...] == T


def test_cache_of_another_dtype():
    x = jnp.asarray(inputs(), jnp.bfloat16)
    layer = made(dtype=jnp.bfloat16)
    layer.init_cache(x.shape)  # float32, as in Flax
    out = layer(x[:, :1], decode=True)
    assert out.dtype == jnp.bfloat16 and layer.cached_key.dtype == jnp.float32


def test_split_merge_and_jit():
    x = inputs()
    layer = made(**EVERYTHING, implementation=["xla"], dropout_rate=0.1, deterministic=True)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    assert hash(graphdef) == hash(nnx.split(layer, nnx.Param, ...)[0])
    np.testing.assert_array_equal(nnx.merge(graphdef, params, rest)(x), layer(x))
    assert_close(nnx.jit(lambda m, x: m(x))(layer, x), layer(x), atol=1e-5)


def test_capture():
    """Of a layer that drops and fuses: weights are sown, the result is the same."""
    x = inputs()
    layer = made(**EVERYTHING, dropout_rate=0.5, deterministic=False)
    run = nnx.capture(layer, nnx.Intermediate)
    out, sown = run(x, sow_weights=True, rngs=nnx.Rngs(dropout=0))
    np.testing.assert_array_equal(out, layer(x, rngs=nnx.Rngs(dropout=0)))
    assert jax.tree.leaves(sown)[0].shape == (B, N, T, T)


@pytest.mark.ci
class TestTransforms:
    def test_remat(self):
        x, layer = inputs(), NNX(inputs(), num_kv_heads=K, sinks=True, fused_qkv=True)
        remat = nnx.remat(lambda m, x: m(x))
        got = layer.gradients(x, call=lambda m: functools.partial(remat, m))
        assert_close(got, layer.gradients(x), rtol=1e-4, atol=1e-4)

    def test_scan_over_layers(self):
        x = inputs()

        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key):
            return MultiQueryAttention(N, E, decode=False, rngs=nnx.Rngs(key), **EVERYTHING)

        layers = make(jax.random.split(jax.random.key(0), 3))
        assert layers.key.kernel.shape == (3, E, 1, H)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return x + layer(x)

        graphdef, state = nnx.split(layers)
        expected = x
        for i in range(3):
            layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))
            expected = expected + layer(expected)
        assert_close(forward(x, layers), expected, atol=1e-5)
