"""axattn.nnx against Flax's class: same signature, parameters, initial values and outputs."""

from __future__ import annotations

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import axattn.nnx
from axattn.nnx import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention, SelfAttention
from axattn.rotary import RotaryEmbedding

B, T, N, E = 2, 7, 4, 16


def inputs(*shape, seed=1, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape or (B, T, E), dtype)


def both(*args, **kwargs):
    """The same layer, Flax's and ours."""
    kwargs = {"decode": False, **kwargs}
    return tuple(
        cls(*args, rngs=nnx.Rngs(0, dropout=1), **kwargs)
        for cls in (nnx.MultiHeadAttention, MultiHeadAttention)
    )


def assert_states_equal(a, b):
    a, b = nnx.state(a), nnx.state(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def parameters(fn):
    return list(inspect.signature(fn).parameters.values())


class TestSignature:
    def test_constructor_starts_with_flax_arguments(self):
        theirs = parameters(nnx.MultiHeadAttention.__init__)
        ours = parameters(MultiHeadAttention.__init__)
        assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
        for flax_parameter, own in zip(theirs, ours, strict=False):
            assert own.kind is flax_parameter.kind
            if own.name == "attention_fn":
                assert own.default is axattn.nnx.dot_product_attention
            else:
                assert own.default == flax_parameter.default
        added = ours[len(theirs) :]
        assert all(p.kind is p.KEYWORD_ONLY for p in added)
        assert {"rope", "qk_norm", "window", "sinks", "implementation"} <= {p.name for p in added}
        for cls in (SelfAttention, GroupedQueryAttention, MultiQueryAttention):
            assert [p.name for p in parameters(cls.__init__)] == [p.name for p in ours]

    def test_call_starts_with_flax_arguments(self):
        theirs, ours = (
            parameters(nnx.MultiHeadAttention.__call__),
            parameters(MultiHeadAttention.__call__),
        )
        for flax_parameter, own in zip(theirs, ours, strict=False):
            assert (own.name, own.kind, own.default) == (
                flax_parameter.name,
                flax_parameter.kind,
                flax_parameter.default,
            )

    def test_function_starts_with_flax_arguments(self):
        theirs = parameters(nnx.dot_product_attention)
        ours = parameters(axattn.nnx.dot_product_attention)
        for flax_parameter, own in zip(theirs, ours, strict=False):
            assert (own.name, own.kind, own.default) == (
                flax_parameter.name,
                flax_parameter.kind,
                flax_parameter.default,
            )
        assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])

    def test_unknown_argument(self):
        with pytest.raises(TypeError, match="nonsense"):
            MultiHeadAttention(N, E, nonsense=1, rngs=nnx.Rngs(0))


FIELDS = {
    "plain": dict(),
    "grouped": dict(num_kv_heads=2),
    "no bias": dict(use_bias=False),
    "layer norm": dict(normalize_qk=True, num_kv_heads=1),
    "sizes": dict(qkv_features=24, out_features=10),
    "initializers": dict(
        kernel_init=nnx.initializers.normal(0.3),
        out_kernel_init=nnx.initializers.normal(0.1),
        bias_init=nnx.initializers.normal(),
        out_bias_init=nnx.initializers.ones,
    ),
    "bfloat16": dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
    "precision": dict(precision=jax.lax.Precision.HIGHEST),
    "dot_general": dict(
        qkv_dot_general=jax.lax.dot_general, out_dot_general_cls=lambda: jax.lax.dot_general
    ),
    "dropout": dict(dropout_rate=0.5, deterministic=True),
    "no rngs": dict(dropout_rate=0.5, deterministic=True, keep_rngs=False),
}


class TestAgainstFlax:
    @pytest.mark.parametrize(
        "fields, mask",
        [
            *((fields, None) for fields in FIELDS.values()),
            *((FIELDS["grouped"], mask) for mask in (jnp.bool_, jnp.float32, "is_causal")),
        ],
        ids=[*FIELDS, "boolean mask", "float mask", "causal"],
    )
    def test_parameters_and_output(self, fields, mask):
        x = inputs()
        flax_layer, layer = both(N, E, **fields)
        assert_states_equal(layer, flax_layer)
        kwargs = {}
        if mask == "is_causal":
            kwargs["is_causal"] = True
        elif mask is not None:
            kwargs["mask"] = nn.make_causal_mask(x[..., 0], dtype=mask)
        out, expected = layer(x, **kwargs), flax_layer(x, **kwargs)
        assert out.dtype == expected.dtype
        tolerance = 1e-5 if fields.get("dtype") is None else 2e-2
        np.testing.assert_allclose(
            out.astype(np.float32), expected.astype(np.float32), atol=tolerance, rtol=tolerance
        )

    def test_self_attention(self):
        x = inputs()
        layer = SelfAttention(N, E, decode=False, rngs=nnx.Rngs(0, dropout=1))
        np.testing.assert_array_equal(layer(x, is_causal=True), both(N, E)[1](x, is_causal=True))
        with pytest.raises(TypeError):
            layer(x, x)

    @pytest.mark.parametrize("lead", [(), (3,), (3, 2)])
    def test_any_number_of_batch_dimensions(self, lead):
        x = inputs(*lead, T, E)
        flax_layer, layer = both(N, E)
        mask = nn.make_causal_mask(x[..., 0])
        np.testing.assert_allclose(layer(x, mask=mask), flax_layer(x, mask=mask), atol=1e-5)

    def test_cross_attention(self):
        q, k, v = inputs(B, 5, 8), inputs(B, T, 6, seed=2), inputs(B, T, 6, seed=3)
        flax_layer, layer = both(N, 8, 16, in_kv_features=6)
        np.testing.assert_allclose(layer(q, k, v), flax_layer(q, k, v), atol=1e-5)
        np.testing.assert_allclose(layer(q, k), flax_layer(q, k), atol=1e-5)

    def test_gradients(self):
        x = inputs()
        grads = [
            nnx.grad(lambda m: (m(x, is_causal=True) ** 2).sum())(layer)
            for layer in both(N, E, num_kv_heads=2, normalize_qk=True)
        ]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *grads)

    @pytest.mark.parametrize("lead", [(B,), (2, 3)])
    def test_decode_steps(self, lead):
        x = inputs(*lead, T, E)
        layers = both(N, E, num_kv_heads=2, decode=True)
        for layer in layers:
            layer.init_cache(x.shape)
        assert layers[1].cached_key.shape == (*lead, T, 2, E // N)
        for t in range(T):
            outs = [layer(x[..., t : t + 1, :]) for layer in layers]
            np.testing.assert_allclose(*outs, atol=1e-5)
        assert_close_caches(*layers)
        assert layers[1].cache_index[...] == T

    def test_sow_weights(self):
        x = inputs()
        results = []
        for layer in both(N, E, num_kv_heads=2):
            run = nnx.capture(layer, nnx.Intermediate)
            results.append(run(x, sow_weights=True, is_causal=True))
            assert not run(x)[1]
        (expected, flax_sown), (out, sown) = results
        np.testing.assert_allclose(out, expected, atol=1e-5)
        weights = jax.tree.leaves(sown)[0]
        assert weights.shape == (B, N, T, T)
        np.testing.assert_allclose(weights, jax.tree.leaves(flax_sown)[0], atol=1e-5)

    def test_metadata(self):
        metadata = dict(
            kernel_metadata={"tag": ("embed", "heads", "kv")},
            out_kernel_metadata={"tag": "out"},
            bias_metadata={"tag": "bias"},
            query_ln_scale_metadata={"tag": "scale"},
        )
        flax_layer, layer = both(N, E, normalize_qk=True, **metadata)
        for path, variable in nnx.to_flat_state(nnx.state(flax_layer, nnx.Param)):
            own = functools.reduce(getattr, path, layer)
            assert own.get_metadata() == variable.get_metadata(), path
        rms = MultiHeadAttention(N, E, qk_norm="rms", rngs=nnx.Rngs(0), **metadata)
        assert rms.query_ln.scale.get_metadata()["tag"] == "scale"

    def test_views_and_attributes(self):
        flax_layer, layer = both(N, E, dropout_rate=0.5, decode=None)
        for m in (flax_layer, layer):
            m.set_attributes(deterministic=True, decode=False)
        np.testing.assert_allclose(layer(inputs()), flax_layer(inputs()), atol=1e-5)
        for m in (flax_layer, layer):
            m.set_view(deterministic=False)
        assert layer.deterministic is False

    def test_flax_checkpoint_loads(self):
        flax_layer, layer = both(N, E)
        flax_layer.query.bias[...] = inputs(N, E // N)
        nnx.update(layer, nnx.state(flax_layer))
        np.testing.assert_allclose(layer(inputs()), flax_layer(inputs()), atol=1e-5)

    def test_our_function_in_flax_class(self):
        x = inputs()
        flax_layer, _ = both(N, E, num_kv_heads=2)
        expected = flax_layer(x, is_causal=True)
        for options in ({}, {"implementation": "xla"}):
            flax_layer.attention_fn = functools.partial(axattn.nnx.dot_product_attention, **options)
            np.testing.assert_allclose(flax_layer(x, is_causal=True), expected, atol=1e-5)


def assert_close_caches(a, b):
    for name in ("cached_key", "cached_value", "cache_index"):
        np.testing.assert_allclose(getattr(a, name)[...], getattr(b, name)[...], atol=1e-6)


class TestDropout:
    def test_streams(self):
        x = inputs()
        layer = MultiHeadAttention(
            N, E, dropout_rate=0.5, deterministic=False, decode=False, rngs=nnx.Rngs(0)
        )
        assert not np.allclose(layer(x), layer(x))
        again = [layer(x, rngs=nnx.Rngs(dropout=3)) for _ in range(2)]
        np.testing.assert_array_equal(*again)
        plain = MultiHeadAttention(N, E, decode=False, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(layer(x, deterministic=True), plain(x), atol=1e-6)

    def test_what_is_missing_is_said(self):
        x = inputs()
        layer = MultiHeadAttention(
            N, E, dropout_rate=0.5, keep_rngs=False, decode=False, rngs=nnx.Rngs(0)
        )
        with pytest.raises(ValueError, match="deterministic"):
            layer(x)
        with pytest.raises(ValueError, match="rngs"):
            layer(x, deterministic=False)
        with pytest.raises(ValueError, match="decode"):
            MultiHeadAttention(N, E, rngs=nnx.Rngs(0))(x)


class TestAttentionFn:
    def test_custom_function_gets_everything(self):
        seen = {}

        def plain(query, key, value, **kwargs):
            seen.update(kwargs)
            return query

        layer = MultiHeadAttention(
            N, E, attention_fn=plain, decode=False, window=3, rngs=nnx.Rngs(0)
        )
        layer(inputs())
        assert seen["local_window_size"] == 3
        assert {"mask", "dropout_rng", "deterministic", "module", "is_causal"} <= set(seen)
        assert "scale" not in seen and "sinks" not in seen

    @pytest.mark.parametrize(
        "field, value",
        [
            ("window", 3),
            ("scale", 1.0),
            ("logits_soft_cap", 5.0),
            ("sinks", True),
            ("implementation", "xla"),
        ],
    )
    def test_options_are_never_dropped(self, field, value):
        layer = MultiHeadAttention(
            N,
            E,
            attention_fn=nnx.dot_product_attention,
            decode=False,
            rngs=nnx.Rngs(0),
            **{field: value},
        )
        with pytest.raises(ValueError, match=rf"{field} was asked for.*dot_product_attention"):
            layer(inputs())

    def test_windowed_decoding_with_flax_function(self):
        x = inputs()
        outs = []
        for fn in (axattn.nnx.dot_product_attention, nnx.dot_product_attention):
            layer = MultiHeadAttention(
                N, E, attention_fn=fn, decode=True, window=(2, 0), rngs=nnx.Rngs(0)
            )
            layer.init_cache(x.shape)
            outs.append(jnp.concatenate([layer(x[:, t : t + 1]) for t in range(T)], axis=1))
        np.testing.assert_allclose(*outs, atol=1e-5)

    @pytest.mark.skipif(not hasattr(nnx, "RoPE"), reason="Flax has RoPE since 0.12.9")
    def test_flax_rope(self):
        x, positions = inputs(), jnp.arange(T) + 3
        fn = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE())
        flax_layer, layer = both(N, E, attention_fn=fn)
        np.testing.assert_allclose(layer(x), flax_layer(x), atol=1e-5)
        own = MultiHeadAttention(
            N, E, rope=RotaryEmbedding(), decode=False, rngs=nnx.Rngs(0, dropout=1)
        )
        np.testing.assert_allclose(own(x), flax_layer(x), atol=1e-5)
        np.testing.assert_allclose(
            own(x, input_positions=positions), own(x, positions=positions), atol=1e-6
        )


class TestErrors:
    @pytest.mark.parametrize(
        "fields, match",
        [
            (dict(num_heads=3), "qkv_features must be a multiple of num_heads, got 16 and 3"),
            (dict(num_heads=4, num_kv_heads=3), "num_heads must be a multiple of num_kv_heads"),
            (dict(num_heads=4, num_kv_heads=0), "num_kv_heads must be a positive integer, got 0"),
            (dict(num_heads=4, qk_norm="batch"), "qk_norm must be one of .* got 'batch'"),
            (dict(num_heads=4, qk_norm="rms", normalize_qk=True), "normalize_qk"),
            (dict(num_heads=4, fused_qkv=True, qkv_dot_general_cls=object), "fused_qkv"),
        ],
    )
    def test_fields(self, fields, match):
        with pytest.raises(ValueError, match=match):
            MultiHeadAttention(**fields, in_features=E, rngs=nnx.Rngs(0))

    def test_grouped_and_multi_query(self):
        with pytest.raises(TypeError, match="num_kv_heads"):
            GroupedQueryAttention(N, E, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="num_kv_heads must be 1"):
            MultiQueryAttention(N, E, num_kv_heads=2, rngs=nnx.Rngs(0))
        assert MultiQueryAttention(N, E, rngs=nnx.Rngs(0)).key.kernel.shape == (E, 1, E // N)
        layer = GroupedQueryAttention(N, E, None, None, 2, rngs=nnx.Rngs(0))
        assert layer.value.kernel.shape == (E, 2, E // N)

    def test_inputs(self):
        x = inputs()
        layer = MultiHeadAttention(N, E, decode=False, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="`inputs_k` cannot be None"):
            layer(x, inputs_v=x)
        with pytest.raises(ValueError, match="Incompatible input dimension, got 3"):
            layer(inputs(B, T, 3))
        with pytest.raises(ValueError, match="inputs_k"):
            layer(x, inputs(B, T, 3))
        with pytest.raises(ValueError, match="positions has no use"):
            layer(x, positions=jnp.arange(T))
        rotary = MultiHeadAttention(N, E, decode=False, rope=RotaryEmbedding(), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="input_positions"):
            rotary(x, positions=jnp.arange(T), input_positions=jnp.arange(T))

    def test_cache(self):
        x = inputs()
        layer = GroupedQueryAttention(N, E, num_kv_heads=2, decode=True, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="init_cache"):
            layer(x[:, :1])
        layer.init_cache(x.shape)
        with pytest.raises(ValueError, match=r"expected query shape \(2, 1, 4, 4\) instead got"):
            layer(x)
