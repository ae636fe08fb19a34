"""axattn.linen against Flax's classes: same signature, parameters, initial values and outputs."""

from __future__ import annotations

import dataclasses
import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
import axattn.linen
from axattn import Mask

B, T, N, E = 2, 7, 4, 16
PAIRS = {
    name: (getattr(nn, name), getattr(axattn.linen, name))
    for name in ("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention")
}
# Flax calls its own SelfAttention deprecated; ours is not.
pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")


def inputs(*shape, seed=1, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape or (B, T, E), dtype)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def both(pair, *args, **kwargs):
    return tuple(cls(*args, **kwargs) for cls in pair)


class TestSignature:
    def test_fields_start_with_flax_fields(self, pair):
        flax_fields, ours = (list(inspect.signature(cls).parameters.values()) for cls in pair)
        assert len(ours) > len(flax_fields)
        for theirs, own in zip(flax_fields, ours, strict=False):
            assert (own.name, own.kind) == (theirs.name, theirs.kind)
            if own.name == "attention_fn":
                assert own.default is axattn.linen.dot_product_attention
            else:
                assert own.default is theirs.default or own.default == theirs.default
        assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(flax_fields) :])

    def test_call_starts_with_flax_arguments(self, pair):
        flax_args, ours = (
            list(inspect.signature(inspect.unwrap(cls.__call__)).parameters.values())
            for cls in pair
        )
        for theirs, own in zip(flax_args, ours, strict=False):
            assert (own.name, own.kind, own.default) == (theirs.name, theirs.kind, theirs.default)
        assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(flax_args) :])

    def test_function_starts_with_flax_arguments(self):
        flax_args = inspect.signature(nn.dot_product_attention).parameters.values()
        ours = list(inspect.signature(axattn.linen.dot_product_attention).parameters.values())
        for theirs, own in zip(flax_args, ours, strict=False):
            assert (own.name, own.kind, own.default) == (theirs.name, theirs.kind, theirs.default)
        assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(flax_args) :])

    def test_is_instance_of_flax_class(self, pair):
        assert issubclass(pair[1], pair[0])


FIELDS = {
    "plain": dict(),
    "no bias": dict(use_bias=False),
    "layer norm": dict(normalize_qk=True),
    "sizes": dict(qkv_features=24, out_features=10),
    "initializers": dict(
        kernel_init=nn.initializers.normal(0.3),
        out_kernel_init=nn.initializers.normal(0.1),
        bias_init=nn.initializers.normal(),
        out_bias_init=nn.initializers.ones,
    ),
    "bfloat16": dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
    "mixed": dict(dtype=jnp.bfloat16, force_fp32_for_softmax=True),
    "precision": dict(precision=jax.lax.Precision.HIGHEST),
    "dot_general": dict(qkv_dot_general=jax.lax.dot_general, out_dot_general=jax.lax.dot_general),
    "dot_general_cls": dict(
        qkv_dot_general_cls=lambda: jax.lax.dot_general,
        out_dot_general_cls=lambda: jax.lax.dot_general,
    ),
    "einsum_cls": dict(
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    ),
    "deterministic": dict(dropout_rate=0.5, deterministic=True),
}


def test_all_classes_are_one_layer(pair):
    x = inputs()
    flax_layer, layer = both(pair, N, normalize_qk=True)
    expected, variables = flax_layer.init_with_output(jax.random.key(0), x)
    assert_trees_equal(layer.init(jax.random.key(0), x), variables)
    np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-5)


class TestAgainstFlax:
    @pytest.fixture
    def pair(self):
        return PAIRS["MultiHeadDotProductAttention"]

    @pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
    def test_parameters_and_output(self, pair, fields):
        x = inputs()
        flax_layer, layer = both(pair, N, **fields)
        expected, flax_variables = flax_layer.init_with_output(jax.random.key(0), x)
        variables = layer.init(jax.random.key(0), x)
        assert_trees_equal(variables, flax_variables)
        out = layer.apply(flax_variables, x)
        assert out.dtype == expected.dtype
        tolerance = 1e-5 if fields.get("dtype") is None else 2e-2
        np.testing.assert_allclose(
            out.astype(np.float32), expected.astype(np.float32), rtol=tolerance, atol=tolerance
        )

    @pytest.mark.parametrize("dtype", [jnp.bool_, jnp.float32, jnp.int32])
    def test_masks_of_any_dtype(self, pair, dtype):
        x = inputs()
        flax_layer, layer = both(pair, N)
        variables = flax_layer.init(jax.random.key(0), x)
        mask = nn.make_causal_mask(x[..., 0], dtype=dtype)
        expected = flax_layer.apply(variables, x, mask=mask)
        np.testing.assert_allclose(layer.apply(variables, x, mask=mask), expected, atol=1e-5)
        np.testing.assert_allclose(layer.apply(variables, x, is_causal=True), expected, atol=1e-5)
        np.testing.assert_allclose(
            layer.apply(variables, x, mask=Mask.causal()), expected, atol=1e-5
        )

    @pytest.mark.parametrize("lead", [(), (3,), (3, 2), (2, 1, 2)])
    def test_any_number_of_batch_dimensions(self, pair, lead):
        x = inputs(*lead, T, E)
        flax_layer, layer = both(pair, N)
        variables = flax_layer.init(jax.random.key(0), x)
        mask = nn.make_causal_mask(x[..., 0])
        np.testing.assert_allclose(
            layer.apply(variables, x, mask=mask),
            flax_layer.apply(variables, x, mask=mask),
            atol=1e-5,
        )

    def test_cross_attention(self):
        q, k, v = inputs(B, 5, 8), inputs(B, T, 6, seed=2), inputs(B, T, 9, seed=3)
        flax_layer, layer = both(PAIRS["MultiHeadAttention"], N, qkv_features=16)
        variables = flax_layer.init(jax.random.key(0), q, k, v)
        mask = jax.random.bernoulli(jax.random.key(4), 0.7, (B, 1, 5, T)).at[..., 0].set(True)
        np.testing.assert_allclose(
            layer.apply(variables, q, k, v, mask=mask),
            flax_layer.apply(variables, q, k, v, mask=mask),
            atol=1e-5,
        )
        with pytest.warns(DeprecationWarning, match="inputs_kv"):
            old = layer.init_with_output(jax.random.key(0), q, inputs_kv=k)[0]
        np.testing.assert_array_equal(old, layer.init_with_output(jax.random.key(0), q, k)[0])

    def test_gradients(self, pair):
        x = inputs()
        flax_layer, layer = both(pair, N, normalize_qk=True)
        variables = flax_layer.init(jax.random.key(0), x)

        def loss(layer):
            return jax.grad(
                lambda v, x: (layer.apply(v, x, mask=nn.make_causal_mask(x[..., 0])) ** 2).sum(),
                (0, 1),
            )(variables, x)

        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            loss(layer),
            loss(flax_layer),
        )

    def test_decode_steps(self, pair):
        x = inputs()
        layers = both(pair, N, decode=True)
        variables = [layer.init(jax.random.key(0), x) for layer in layers]
        assert_trees_equal(*variables)
        padding = jnp.ones((B, 1, 1, T)).at[0, ..., 1].set(0)
        for t in range(T):
            outs = []
            for i, layer in enumerate(layers):
                step = jax.jit(functools.partial(layer.apply, mutable=["cache"]))
                out, cache = step(variables[i], x[:, t : t + 1], mask=padding)
                variables[i] = {**variables[i], **cache}
                outs.append(out)
            np.testing.assert_allclose(*outs, atol=1e-5)
            jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *variables)
        assert variables[1]["cache"]["cache_index"] == T

    def test_sow_weights(self, pair):
        x = inputs()
        flax_layer, layer = both(pair, N)
        variables = flax_layer.init(jax.random.key(0), x)

        def run(layer, **kwargs):
            return layer.apply(
                variables,
                x,
                mask=nn.make_causal_mask(x[..., 0]),
                mutable=["intermediates"],
                **kwargs,
            )

        (out, sown), (expected, flax_sown) = (run(m, sow_weights=True) for m in (layer, flax_layer))
        np.testing.assert_allclose(out, expected, atol=1e-5)
        weights = sown["intermediates"]["attention_weights"][0]
        assert weights.shape == (B, N, T, T)
        np.testing.assert_allclose(
            weights, flax_sown["intermediates"]["attention_weights"][0], atol=1e-5
        )
        assert "intermediates" not in run(layer)[1]

    def test_partitioning_metadata(self, pair):
        fields = dict(
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), ("embed", "heads", "kv")
            ),
            bias_init=nn.with_partitioning(nn.initializers.zeros, ("heads", "kv")),
        )
        flax_layer, layer = both(pair, N, **fields)
        expected = flax_layer.init(jax.random.key(0), inputs())
        assert_trees_equal(layer.init(jax.random.key(0), inputs()), expected)
        fused = layer.clone(fused_qkv=True).init(jax.random.key(0), inputs())
        assert_trees_equal(fused, expected)
        np.testing.assert_allclose(
            layer.clone(fused_qkv=True).apply(expected, inputs()),
            flax_layer.apply(expected, inputs()),
            atol=1e-5,
        )

    @pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
    def test_scopes_are_named_after_the_class(self, pair):
        class Model(nn.Module):
            cls: type

            @nn.compact
            def __call__(self, x):
                return self.cls(N)(self.cls(N)(x))

        flax_model, model = (Model(cls) for cls in pair)
        variables = flax_model.init(jax.random.key(0), inputs())
        assert_trees_equal(model.init(jax.random.key(0), inputs()), variables)

    def test_our_function_in_flax_class(self, pair):
        x = inputs()
        flax_layer = pair[0](N)
        variables = flax_layer.init(jax.random.key(0), x)
        for options in ({}, {"implementation": "xla"}):
            fn = functools.partial(axattn.linen.dot_product_attention, **options)
            np.testing.assert_allclose(
                pair[0](N, attention_fn=fn).apply(variables, x),
                flax_layer.apply(variables, x),
                atol=1e-5,
            )


class TestDropout:
    def layer(self, **fields):
        return axattn.linen.MultiHeadAttention(N, **{"dropout_rate": 0.5, **fields})

    def test_streams_and_explicit_keys(self):
        x = inputs()
        layer = self.layer(deterministic=False)
        variables = layer.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

        def run(key):
            return layer.apply(variables, x, rngs={"dropout": jax.random.key(key)})

        np.testing.assert_array_equal(run(2), run(2))
        assert not np.allclose(run(2), run(3))
        explicit = layer.apply(variables, x, dropout_rng=jax.random.key(5))
        again = layer.apply(
            variables, x, dropout_rng=jax.random.key(5), rngs={"dropout": jax.random.key(2)}
        )
        np.testing.assert_array_equal(explicit, again)
        np.testing.assert_allclose(
            layer.clone(deterministic=None).apply(variables, x, deterministic=True),
            self.layer(dropout_rate=0.0).apply(variables, x),
            atol=1e-6,
        )

    def test_deterministic_has_to_be_said(self):
        with pytest.raises(ValueError, match="deterministic"):
            self.layer().init(jax.random.key(0), inputs())

    @pytest.mark.parametrize("broadcast", [True, False])
    def test_one_pattern_for_all_heads_if_broadcast(self, broadcast):
        # Values that name their token show in the output which tokens were dropped.
        q = jnp.zeros((B, T, N, T))
        v = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, N, T))
        out = axattn.linen.dot_product_attention(
            q, q, v, dropout_rate=0.5, dropout_rng=jax.random.key(0), broadcast_dropout=broadcast
        )
        kept = out > 0
        assert 0 < kept.mean() < 1
        np.testing.assert_allclose(out[kept], 2 / T, rtol=1e-5)
        assert (kept == kept[:1, :, :1]).all() == broadcast

    def test_sowing_does_not_change_the_result(self):
        x = inputs()
        layer = self.layer(deterministic=False)
        variables = layer.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
        rngs = {"dropout": jax.random.key(2)}
        sown, _ = layer.apply(variables, x, rngs=rngs, sow_weights=True, mutable=["intermediates"])
        np.testing.assert_array_equal(sown, layer.apply(variables, x, rngs=rngs))


class TestAttentionFn:
    def test_custom_function_gets_what_it_names(self):
        seen = {}

        def plain(query, key, value, mask=None, dtype=None):
            seen.update(mask=mask, dtype=dtype)
            return query

        layer = axattn.linen.MultiHeadAttention(N, attention_fn=plain, dtype=jnp.bfloat16)
        mask = nn.make_causal_mask(inputs()[..., 0])
        layer.init_with_output(jax.random.key(0), inputs(), mask=mask)
        assert seen == {"mask": mask, "dtype": jnp.bfloat16}

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
        layer = axattn.linen.MultiHeadAttention(
            N, attention_fn=nn.dot_product_attention, **{field: value}
        )
        with pytest.raises(ValueError, match=rf"{field} was asked for.*dot_product_attention"):
            layer.init(jax.random.key(0), inputs())

    def test_masks_and_caches_work_with_flax_function(self):
        x = inputs()
        layer = axattn.linen.MultiHeadAttention(N)
        other = layer.clone(attention_fn=nn.dot_product_attention)
        variables = layer.init(jax.random.key(0), x)
        mask = Mask.causal() & Mask.lengths(kv=jnp.array([3, 7]))
        np.testing.assert_allclose(
            other.apply(variables, x, mask=mask), layer.apply(variables, x, mask=mask), atol=1e-5
        )
        x = inputs(2, 3, T, E)
        mask = Mask.window(2, 0)
        layer, other = (m.clone(decode=True) for m in (layer, other))
        caches = [m.init(jax.random.key(0), x)["cache"] for m in (layer, other)]
        for t in range(4):
            outs = []
            for i, m in enumerate((layer, other)):
                out, state = m.apply(
                    {**variables, "cache": caches[i]},
                    x[..., t : t + 1, :],
                    mask=mask,
                    mutable=["cache"],
                )
                caches[i] = state["cache"]
                outs.append(out)
            np.testing.assert_allclose(*outs, atol=1e-5)


class TestErrors:
    @pytest.mark.parametrize(
        "fields, match",
        [
            (dict(num_heads=3), "qkv_features must be a multiple of num_heads, got 16 and 3"),
            (dict(num_heads=4, num_kv_heads=3), "num_heads must be a multiple of num_kv_heads"),
            (dict(num_heads=0), "num_heads must be a positive integer, got 0"),
            (dict(num_heads=4, num_kv_heads=0), "num_kv_heads must be a positive integer, got 0"),
            (dict(num_heads=4, qk_norm="batch"), "qk_norm must be one of .* got 'batch'"),
            (dict(num_heads=4, qk_norm="rms", normalize_qk=True), "normalize_qk"),
            (dict(num_heads=4, fused_qkv=True, qkv_dot_general_cls=object), "fused_qkv"),
            (dict(num_heads=4, window=-1), "window"),
        ],
    )
    def test_fields(self, fields, match):
        with pytest.raises(ValueError, match=match):
            axattn.linen.MultiHeadAttention(**fields).init(jax.random.key(0), inputs())

    def test_inputs(self):
        layer = axattn.linen.MultiHeadAttention(N)
        x = inputs()
        with pytest.raises(ValueError, match="`inputs_k` cannot be None"):
            layer.init(jax.random.key(0), x, inputs_v=x)
        with pytest.raises(ValueError, match="`inputs_kv` must be None"):
            layer.init(jax.random.key(0), x, x, inputs_kv=x)
        with pytest.raises(ValueError, match="positions has no use"):
            layer.init(jax.random.key(0), x, positions=jnp.arange(T))
        with pytest.raises(TypeError, match="rope must be"):
            layer.clone(rope=10000.0).init(jax.random.key(0), x)

    def test_grouped_and_multi_query(self):
        with pytest.raises(TypeError, match="num_kv_heads"):
            axattn.linen.GroupedQueryAttention(N)
        with pytest.raises(ValueError, match="num_kv_heads must be 1"):
            axattn.linen.MultiQueryAttention(N, num_kv_heads=2)
        assert axattn.linen.MultiQueryAttention(N).num_kv_heads == 1

    def test_decode_takes_one_token(self):
        layer = axattn.linen.GroupedQueryAttention(N, num_kv_heads=2, decode=True)
        variables = layer.init(jax.random.key(0), inputs())
        assert variables["cache"]["cached_key"].shape == (B, T, 2, E // N)
        with pytest.raises(ValueError, match=r"expected query shape \(2, 1, 4, 4\) instead got"):
            layer.apply(variables, inputs(), mutable=["cache"])
        with pytest.raises(ValueError, match=r"expected key shape \(2, 1, 2, 4\) instead got"):
            layer.apply(variables, inputs()[:, :1], inputs(), mutable=["cache"])

    def test_einsum_hooks(self):
        q = inputs(B, T, N, 8)
        call = functools.partial(axattn.linen.dot_product_attention, q, q, q)
        with pytest.raises(ValueError, match="given together"):
            call(qk_attn_weights_einsum=jnp.einsum)
        hooks = dict(qk_attn_weights_einsum=jnp.einsum, attn_weights_value_einsum=jnp.einsum)
        with pytest.raises(ValueError, match="exclude precision"):
            call(**hooks, precision="highest")
        with pytest.raises(NotImplementedError, match="einsum hooks"):
            call(**hooks, implementation="xla_chunked")


def test_layers_are_dataclasses_of_their_own_name():
    for name in axattn.linen.__all__[:-1]:
        cls = getattr(axattn.linen, name)
        assert cls.__name__ == name and dataclasses.is_dataclass(cls)
