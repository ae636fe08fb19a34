"""The layers of axattn.linen and axattn.nnx against Flax's: whatever works there works here."""

from __future__ import annotations

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import Mask
from axattn.rotary import RotaryEmbedding
from tests.layers.apis import NNX, B, E, Linen, N, T, assert_close, assert_same, each_api, inputs

CLASSES = [
    (Linen, "MultiHeadDotProductAttention"),
    (Linen, "MultiHeadAttention"),
    (Linen, "SelfAttention"),
    (NNX, "MultiHeadAttention"),
]
each_class = pytest.mark.parametrize("api, cls", CLASSES)
# Flax calls its own SelfAttention deprecated; ours is not.
pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")


def both(api, *like, **fields):
    """The same layer with the same parameters, ours and Flax's."""
    ours, flax = api(*like, **fields), api(*like, **fields, package=api.flax)
    assert_same(ours.params, flax.params)
    return ours, flax


def causal(x, dtype=jnp.float32):
    return nn.make_causal_mask(x[..., 0], dtype=dtype)


class TestSignature:
    def check(self, ours, theirs, attention_fn=None):
        """Flax's parameters first, the names of the others are returned."""
        ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
        for own, flax in zip(ours[: len(theirs)], theirs, strict=True):
            assert (own.name, own.kind) == (flax.name, flax.kind)
            default = attention_fn if own.name == "attention_fn" else flax.default
            assert own.default is default or own.default == default
        added = ours[len(theirs) :]
        assert all(p.kind is p.KEYWORD_ONLY for p in added)
        return {p.name for p in added}

    @each_class
    def test_class(self, api, cls):
        ours, theirs = getattr(api.package, cls), getattr(api.flax, cls)
        assert issubclass(ours, theirs)
        function = api.package.dot_product_attention
        added = self.check(ours.__init__, theirs.__init__, attention_fn=function)
        assert {"rope", "qk_norm", "window", "sinks", "implementation"} <= added
        self.check(ours.__call__, theirs.__call__)

    @each_api
    def test_function(self, api):
        self.check(api.package.dot_product_attention, api.flax.dot_product_attention)


def doubled(*args, **kwargs):
    return 2 * jax.lax.dot_general(*args, **kwargs)


def shifted(subscripts, a, b):
    return jnp.einsum(subscripts, a, b) + 0.1


COMMON = {
    "plain": dict(),
    "no bias": dict(use_bias=False),
    "layer norm": dict(normalize_qk=True),
    "sizes": dict(qkv_features=24, out_features=10),
    "bfloat16": dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
    "precision": dict(precision=jax.lax.Precision.HIGHEST),
    "dot_general": dict(qkv_dot_general=doubled, out_dot_general=doubled),
    "dot_general_cls": dict(
        qkv_dot_general_cls=lambda: doubled, out_dot_general_cls=lambda: doubled
    ),
    "dropout": dict(dropout_rate=0.5, deterministic=True),
}
LINEN_OWN = {
    "mixed": dict(dtype=jnp.bfloat16, force_fp32_for_softmax=True),
    "einsum_cls": dict(
        qk_attn_weights_einsum_cls=lambda: shifted, attn_weights_value_einsum_cls=lambda: shifted
    ),
}
NNX_OWN = {
    "grouped": NNX.grouped,
    "layer norm, one head": dict(normalize_qk=True, num_kv_heads=1),
    "no rngs": dict(dropout_rate=0.5, deterministic=True, keep_rngs=False),
}
FIELDS = {Linen: COMMON | LINEN_OWN, NNX: COMMON | NNX_OWN}
INITIALIZERS = dict(
    kernel_init=nn.initializers.normal(0.3),
    out_kernel_init=nn.initializers.normal(0.1),
    bias_init=nn.initializers.normal(),
    out_bias_init=nn.initializers.ones,
)


@each_api
def test_initial_parameters(api):
    """And what else is in the state: random numbers of dropout."""
    same = [COMMON[name] for name in ("plain", "no bias", "layer norm", "dropout")]
    same += [INITIALIZERS]
    same += NNX_OWN.values() if api is NNX else []
    pairs = [(fields, fields) for fields in same] + [(dict(fused_qkv=True), {})]
    for norm in ("layer",) if api is NNX else ("layer", "rms"):
        pairs += [(dict(qk_norm=norm), dict(normalize_qk=True))]
    for own, fields in pairs:
        layers = (api(inputs(), **own), api(inputs(), **fields, package=api.flax))
        assert_same(*(layer.initial(jax.random.key(0)) for layer in layers))


@each_class
def test_every_class(api, cls):
    ours, flax = both(api, inputs(), cls=cls, normalize_qk=True)
    assert_close(ours(inputs()), flax(inputs()), atol=1e-5)


@pytest.mark.parametrize("api, name", [(api, name) for api in FIELDS for name in FIELDS[api]])
def test_fields(api, name):
    fields = FIELDS[api][name]
    ours, flax = both(api, inputs(), **fields)
    out, expected = ours(inputs()), flax(inputs())
    assert out.dtype == expected.dtype
    tolerance = 1e-5 if fields.get("dtype") is None else 2e-2
    assert_close(out, expected, rtol=tolerance, atol=tolerance)


@each_api
def test_masks_of_any_dtype(api):
    x = inputs()
    ours, flax = both(api, x, **api.grouped)
    expected = flax(x, mask=causal(x))
    masks = [causal(x, dtype) for dtype in (jnp.bool_, jnp.float32, jnp.int32)]
    for given in [*({"mask": m} for m in (*masks, Mask.causal())), {"is_causal": True}]:
        assert_close(ours(x, **given), expected, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (2, 1, 2)])
@each_api
def test_any_number_of_batch_dimensions(api, lead):
    x = inputs(*lead, T, E)
    layers = both(api, inputs())
    outs = jax.jit(lambda x: [layer(x, mask=causal(x)) for layer in layers])(x)
    assert_close(*outs, atol=1e-5)


@each_api
def test_cross_attention(api):
    q, k = inputs(B, 5, 8), inputs(B, T, 6, seed=2)
    v = inputs(B, T, 9 if api is Linen else 6, seed=3)  # NNX: as many features as the keys
    layers = both(api, q, k, v, qkv_features=E)
    mask = np.random.default_rng(4).random((B, 1, 5, T)) < 0.7
    mask[..., 0] = True
    outs = jax.jit(lambda q, k, v: [layer(q, k, v, mask=mask) for layer in layers])(q, k, v)
    assert_close(*outs, atol=1e-5)


@pytest.mark.ci  # test_features.py has gradients of more parameters
@each_api
def test_gradients(api):
    x = inputs()
    fields = dict(normalize_qk=True, **api.grouped)
    layers = api(x, fused_qkv=True, **fields), api(x, package=api.flax, **fields)
    got, expected = (layer.gradients(x, mask=causal(x)) for layer in layers)
    assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("api, lead", [(Linen, (B,)), (NNX, (2, 3))])
def test_decoding(api, lead):
    x = inputs(*lead, T, E)
    padding = np.ones((*lead, 1, 1, T))
    padding[0, ..., 1] = 0
    layers = both(api, x, decode=True, **api.grouped)
    (out, cache), (expected, flax_cache) = (layer.decode(x, mask=padding) for layer in layers)
    assert_close(out, expected, atol=1e-5)
    assert_close(cache, flax_cache, atol=1e-6)
    assert cache["cached_key"].shape == (*lead, T, api.grouped.get("num_kv_heads", N), E // N)
    assert cache["cache_index"] == T


@each_api
def test_sown_weights(api):
    x = inputs()
    layers = both(api, x, **api.grouped)
    (out, weights), (expected, flax_weights) = (
        layer.sown(x, mask=causal(x), sow_weights=True) for layer in layers
    )
    assert_close(out, expected, atol=1e-5)
    assert weights.shape == (B, N, T, T)
    assert_close(weights, flax_weights, atol=1e-5)
    assert layers[0].sown(x, mask=causal(x))[1] is None


class TestDropout:
    @each_api
    def test_streams(self, api):
        x, layer = inputs(), api(inputs(), dropout_rate=0.5, deterministic=False)
        np.testing.assert_array_equal(layer(x, dropout=2), layer(x, dropout=2))
        assert not np.allclose(layer(x, dropout=2), layer(x, dropout=3))
        stays = api(x, dropout_rate=0.5, deterministic=True)
        assert_close(stays(x), api(x)(x), atol=1e-6)
        with pytest.raises(ValueError, match="deterministic"):
            api(x, dropout_rate=0.5)(x)

    @pytest.mark.parametrize("broadcast", [True, False])
    @each_api
    def test_one_pattern_for_all_heads_if_broadcast(self, api, broadcast):
        # Values that name their token show in the output which tokens were dropped.
        q = np.zeros((B, T, N, T), np.float32)
        v = np.broadcast_to(np.eye(T, dtype=np.float32)[:, None], q.shape)
        options = dict(dropout_rng=jax.random.key(0), broadcast_dropout=broadcast)
        out = api.package.dot_product_attention(q, q, v, dropout_rate=0.5, **options)
        kept = np.asarray(out > 0)
        assert 0 < kept.mean() < 1
        assert_close(np.asarray(out)[kept], 2 / T, rtol=1e-5)
        assert (kept == kept[:1, :, :1]).all() == broadcast

    @each_api
    def test_sowing_does_not_change_the_result(self, api):
        x = inputs()
        layer = api(x, dropout_rate=0.5, deterministic=False, broadcast_dropout=False)
        out, weights = layer.sown(x, dropout=2, sow_weights=True)
        np.testing.assert_array_equal(out, layer(x, dropout=2))
        assert weights.shape == (B, N, T, T)


OPTIONS = dict(window=3, scale=1.0, logits_soft_cap=5.0, sinks=True, implementation="xla")


class TestAttentionFn:
    @each_api
    def test_our_function_in_flax_class(self, api):
        x = inputs()
        expected = api(x, package=api.flax, **api.grouped)(x, mask=causal(x))
        ours = api.package.dot_product_attention
        for fn in (ours, functools.partial(ours, implementation="xla")):
            layer = api(x, package=api.flax, attention_fn=fn, **api.grouped)
            assert_close(layer(x, mask=causal(x)), expected, atol=1e-5)

    @pytest.mark.parametrize("field, value", OPTIONS.items())
    @each_api
    def test_options_are_never_dropped(self, api, field, value):
        fields = {"attention_fn": api.flax.dot_product_attention, field: value}
        with pytest.raises(ValueError, match=rf"{field} was asked for.*dot_product_attention"):
            api(inputs(), **fields)(inputs())

    @each_api
    def test_masks_and_caches_work_with_flax_function(self, api):
        def pair(**fields):
            return (
                api(x, **fields, attention_fn=package.dot_product_attention)
                for package in (api.package, api.flax)
            )

        x, mask = inputs(), Mask.causal() & Mask.lengths(kv=np.array([3, 7]))
        assert_close(*(layer(x, mask=mask) for layer in pair()), atol=1e-5)
        x, fields, kwargs = inputs(2, 3, 4, E), dict(window=(2, 0)), {}
        if api is Linen:  # whose first call makes the cache, is no step, and would refuse a window
            fields, kwargs = {}, dict(mask=Mask.window(2, 0))
        got, expected = (layer.decode(x, **kwargs)[0] for layer in pair(decode=True, **fields))
        assert_close(got, expected, atol=1e-5)


class TestErrors:
    FIELDS = {
        "qkv_features must be a multiple of num_heads, got 16 and 3": dict(num_heads=3),
        "num_heads must be a multiple of num_kv_heads": dict(num_kv_heads=3),
        "num_heads must be a positive integer, got 0": dict(num_heads=0),
        "num_kv_heads must be a positive integer, got 0": dict(num_kv_heads=0),
        "qk_norm must be one of .* got 'batch'": dict(qk_norm="batch"),
        "normalize_qk": dict(qk_norm="rms", normalize_qk=True),
        "fused_qkv": dict(fused_qkv=True, qkv_dot_general_cls=object),
        "window": dict(window=-1),
    }

    @pytest.mark.parametrize("match, fields", FIELDS.items())
    @each_api
    def test_fields(self, api, match, fields):
        with pytest.raises(ValueError, match=match):
            api(inputs(), **fields)(inputs())

    @each_api
    def test_inputs(self, api):
        x = inputs()
        layer = api(x)
        with pytest.raises(ValueError, match="`inputs_k` cannot be None"):
            layer(x, inputs_v=x)
        for name in ("positions", "kv_positions"):
            with pytest.raises(ValueError, match=f"^{name} has no use"):
                layer(x, **{name: np.arange(T)})
        rotary = api(x, rope=RotaryEmbedding())
        with pytest.raises(ValueError, match="pass kv_positions too"):
            rotary(x, x[:, :5], positions=np.arange(T))
        with pytest.raises(TypeError, match="rope must be"):
            api(x, rope=10000.0)(x)

    @each_api
    def test_grouped_and_multi_query(self, api):
        with pytest.raises(TypeError, match="num_kv_heads"):
            api(inputs(), cls="GroupedQueryAttention")
        with pytest.raises(ValueError, match="num_kv_heads must be 1"):
            api(inputs(), cls="MultiQueryAttention", num_kv_heads=2)

    @each_api
    def test_decode_takes_one_token(self, api):
        x = inputs()
        layer = api(x, cls="GroupedQueryAttention", num_kv_heads=2, decode=True)
        cache = layer.empty_cache(x.shape)
        assert cache["cached_key"].shape == (B, T, 2, E // N)
        with pytest.raises(ValueError, match=r"expected query shape \(2, 1, 4, 4\) instead got"):
            layer.step(cache, x, x.shape)
        with pytest.raises(ValueError, match=r"expected key shape \(2, 1, 2, 4\) instead got"):
            layer.step(cache, x[:, :1], x.shape, inputs_k=x)
