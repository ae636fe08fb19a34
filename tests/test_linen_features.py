"""What axattn.linen adds to Flax: shared heads, RoPE, norms, windows, sinks, fusion, transforms."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from axattn import Mask
from axattn.linen import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention
from axattn.rotary import LinearScaling, RotaryEmbedding

B, T, N, K, E = 2, 9, 8, 2, 32
H = E // N


def inputs(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape or (B, T, E))


def projected(variables, x):
    """Query, key and value of a layer, by hand."""
    return tuple(
        jnp.einsum("...te,enh->...tnh", x, p["kernel"]) + p["bias"]
        for p in (variables["params"][name] for name in ("query", "key", "value"))
    )


def output(variables, x):
    out = variables["params"]["out"]
    return jnp.einsum("...tnh,nhe->...te", x, out["kernel"]) + out["bias"]


def with_random_biases(variables, seed=7):
    """Zeros at first would hide a bias that is dropped."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def made(layer, *args):
    return with_random_biases(layer.init(jax.random.key(0), *args))


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_query_head_n_reads_kv_head_n_over_g(kv_heads):
    x = inputs()
    layer = MultiHeadAttention(N, num_kv_heads=kv_heads)
    variables = made(layer, x)
    assert variables["params"]["key"]["kernel"].shape == (E, kv_heads, H)
    assert variables["params"]["value"]["bias"].shape == (kv_heads, H)
    repeated = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.repeat(leaf, N // kv_heads, axis=-2) if path[1].key in ("key", "value") else leaf
        ),
        variables,
    )
    mask = nn.make_causal_mask(x[..., 0])
    np.testing.assert_allclose(
        layer.apply(variables, x, mask=mask),
        nn.MultiHeadDotProductAttention(N).apply(repeated, x, mask=mask),
        atol=1e-5,
    )


def test_grouped_and_multi_query_are_multi_head_with_fewer_heads():
    x = inputs()
    for cls, fields, kv_heads in (
        (GroupedQueryAttention, dict(num_kv_heads=2), 2),
        (MultiQueryAttention, dict(), 1),
    ):
        layer = MultiHeadAttention(N, num_kv_heads=kv_heads)
        variables = layer.init(jax.random.key(0), x)
        np.testing.assert_array_equal(
            cls(N, **fields).apply(variables, x), layer.apply(variables, x)
        )


ROPES = {
    "default": RotaryEmbedding(),
    "interleaved": RotaryEmbedding(500.0, interleaved=True, rotary_dim=2),
    "scaled": RotaryEmbedding(scaling=LinearScaling(2.0)),
}


@pytest.mark.parametrize(
    "name, positions",
    [
        ("default", "default"),
        ("default", "per row"),
        ("interleaved", "shifted"),
        ("scaled", "default"),
    ],
)
def test_rope(name, positions):
    rope, x = ROPES[name], inputs()
    layer = GroupedQueryAttention(N, num_kv_heads=K, rope=rope)
    variables = made(layer, x)
    given = {
        "default": None,
        "shifted": jnp.arange(T) + 11,
        "per row": jnp.arange(T) + jnp.array([[3], [40]]),
    }[positions]
    at = jnp.arange(T) if given is None else given
    q, k, v = projected(variables, x)
    expected = axattn.dot_product_attention(rope.apply(q, at), rope.apply(k, at), v, is_causal=True)
    np.testing.assert_allclose(
        layer.apply(variables, x, is_causal=True, positions=given),
        output(variables, expected),
        atol=1e-5,
    )


def test_rope_across_sequences():
    x, memory = inputs(), inputs(B, 5, E, seed=2)
    layer = MultiHeadAttention(N, rope=RotaryEmbedding())
    variables = made(layer, x, memory)
    default = layer.apply(variables, x, memory)
    given = dict(positions=jnp.arange(T) + 4, kv_positions=jnp.arange(5) + 4)
    np.testing.assert_allclose(layer.apply(variables, x, memory, **given), default, atol=1e-5)
    with pytest.raises(ValueError, match="kv_positions"):
        layer.apply(variables, x, memory, positions=jnp.arange(T))


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_qk_norm(kind, per_head):
    x = inputs()
    layer = GroupedQueryAttention(N, num_kv_heads=K, qk_norm=kind, qk_norm_per_head=per_head)
    variables = made(layer, x)
    scales = [variables["params"][name]["scale"] for name in ("query_ln", "key_ln")]
    assert [list(variables["params"][n]) for n in ("query_ln", "key_ln")] == [["scale"]] * 2
    shapes = [(H,), (H,)] if per_head else [(N, H), (K, H)]
    assert [scale.shape for scale in scales] == shapes
    axes = -1 if per_head else (-2, -1)

    def norm(x, scale):
        if kind == "layer":
            x = x - x.mean(axes, keepdims=True)
        return x / jnp.sqrt((x**2).mean(axes, keepdims=True) + 1e-6) * scale

    q, k, v = projected(variables, x)
    expected = axattn.dot_product_attention(norm(q, scales[0]), norm(k, scales[1]), v)
    np.testing.assert_allclose(
        layer.apply(variables, x), output(variables, expected), atol=1e-4, rtol=1e-4
    )


def test_qk_norm_epsilon():
    """Where vectors are short, it is what is left of their length."""
    x = 1e-3 * inputs()
    layer = GroupedQueryAttention(N, num_kv_heads=K, qk_norm="rms", use_bias=False)
    variables = layer.init(jax.random.key(0), x)
    q, k, v = (
        jnp.einsum("...te,enh->...tnh", x, variables["params"][name]["kernel"])
        for name in ("query", "key", "value")
    )
    q, k = (y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-2) for y in (q, k))
    expected = axattn.dot_product_attention(q, k, v)
    expected = jnp.einsum("...tnh,nhe->...te", expected, variables["params"]["out"]["kernel"])
    got = layer.clone(qk_norm_epsilon=1e-2).apply(variables, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-9)
    assert not np.allclose(layer.apply(variables, x), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("use_bias, out_use_bias", [(True, False), (False, True), (True, None)])
def test_the_output_has_a_bias_of_its_own(use_bias, out_use_bias):
    x = inputs()
    layer = GroupedQueryAttention(
        N, num_kv_heads=K, use_bias=use_bias, out_use_bias=out_use_bias, fused_qkv=True
    )
    variables = made(layer, x)
    has = {name: "bias" in params for name, params in variables["params"].items()}
    out = use_bias if out_use_bias is None else out_use_bias
    assert has == dict(query=use_bias, key=use_bias, value=use_bias, out=out)
    # With all four, the missing ones zero, it is the layer that has them.
    zeros = MultiHeadAttention(N, num_kv_heads=K).init(jax.random.key(0), x)
    zeros = jax.tree.map(jnp.zeros_like, zeros["params"])
    whole = {name: {**zeros[name], **params} for name, params in variables["params"].items()}
    q, k, v = projected({"params": whole}, x)
    expected = output({"params": whole}, axattn.dot_product_attention(q, k, v))
    np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-5)


def test_qk_norm_layer_is_flax_normalize_qk():
    x = inputs()
    variables = nn.MultiHeadAttention(N, normalize_qk=True).init(jax.random.key(0), x)
    for fields in (dict(normalize_qk=True), dict(qk_norm="layer"), dict(qk_norm="rms")):
        own = MultiHeadAttention(N, **fields).init(jax.random.key(0), x)
        assert jax.tree.structure(own) == jax.tree.structure(variables)
        jax.tree.map(np.testing.assert_array_equal, own, variables)


OPTIONS = {
    "window": (dict(window=2), dict(local_window_size=2)),
    "left window": (dict(window=(3, 0)), dict(local_window_size=(3, 0))),
    "soft cap": (dict(logits_soft_cap=0.5), dict(logits_soft_cap=0.5)),
    "scale": (dict(scale=0.9), dict(scale=0.9)),
    "implementation": (dict(implementation=("xla_chunked", "xla")), dict()),
}


@pytest.mark.parametrize("fields, arguments", OPTIONS.values(), ids=OPTIONS)
def test_options_are_those_of_the_function(fields, arguments):
    x = inputs()
    layer = GroupedQueryAttention(N, num_kv_heads=K, **fields)
    variables = made(layer, x)
    q, k, v = projected(variables, x)
    expected = axattn.dot_product_attention(q, k, v, **arguments)
    np.testing.assert_allclose(layer.apply(variables, x), output(variables, expected), atol=1e-5)
    _, state = layer.apply(variables, x, sow_weights=True, mutable=["intermediates"])
    weights = state["intermediates"]["attention_weights"][0]
    assert weights.shape == (B, N, T, T)
    by_hand = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, N // K, axis=2))
    np.testing.assert_allclose(by_hand, expected, atol=1e-5)


def test_sinks():
    x = inputs()
    layer = GroupedQueryAttention(N, num_kv_heads=K, sinks=True, param_dtype=jnp.float32)
    fresh = layer.init(jax.random.key(0), x)
    np.testing.assert_array_equal(fresh["params"]["sinks"], np.zeros(N))
    variables = with_random_biases(fresh)
    q, k, v = projected(variables, x)
    expected = axattn.dot_product_attention(q, k, v, sinks=variables["params"]["sinks"])
    np.testing.assert_allclose(layer.apply(variables, x), output(variables, expected), atol=1e-5)


def test_segments():
    x = inputs()
    layer = GroupedQueryAttention(N, num_kv_heads=K, rope=RotaryEmbedding())
    variables = made(layer, x)
    segments = jnp.broadcast_to(jnp.array([0] * 4 + [1] * 5), (B, T))
    positions = jnp.concatenate([jnp.arange(4), jnp.arange(5)])
    packed = layer.apply(variables, x, segment_ids=segments, positions=positions, is_causal=True)
    for part in (slice(0, 4), slice(4, 9)):
        alone = layer.apply(variables, x[:, part], is_causal=True)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)
    cross = layer.apply(
        variables,
        x[:, :3],
        x,
        segment_ids=jnp.ones((B, 3), int),
        kv_segment_ids=segments,
        positions=jnp.arange(3),
        kv_positions=positions,
    )
    alone = layer.apply(variables, x[:, :3], x[:, 4:])
    np.testing.assert_allclose(cross, alone, atol=1e-5)


@pytest.mark.parametrize(
    "which, use_bias, dtype",
    [
        ("self", True, None),
        ("self", False, jnp.bfloat16),
        ("shared kv", True, None),
        ("all different", False, None),
    ],
)
def test_fused_qkv_gives_the_same_numbers(which, use_bias, dtype):
    x = inputs()
    args = {
        "self": (x,),
        "shared kv": (x, inputs(seed=2)),
        "all different": (x, inputs(seed=2), inputs(seed=3)),
    }[which]
    layer = GroupedQueryAttention(N, num_kv_heads=K, use_bias=use_bias, dtype=dtype)
    fused = layer.clone(fused_qkv=True)
    expected, variables = layer.init_with_output(jax.random.key(0), *args)
    own = fused.init(jax.random.key(0), *args)
    jax.tree.map(np.testing.assert_array_equal, own, variables)
    tolerance = 1e-5 if dtype is None else 2e-2
    np.testing.assert_allclose(
        fused.apply(variables, *args).astype(np.float32),
        expected.astype(np.float32),
        atol=tolerance,
        rtol=tolerance,
    )

    if which == "self" and dtype is None:
        grads = [
            jax.jit(jax.grad(lambda v, m=m: (m.apply(v, *args) ** 2).sum()))(variables)
            for m in (fused, layer)
        ]
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), *grads)


@pytest.mark.parametrize("inputs_k, products", [(None, 1), (inputs(seed=2), 2)])
def test_fused_qkv_is_one_product_per_input(inputs_k, products):
    x = inputs()
    seen = []

    def dot_general(*args, **kwargs):
        seen.append(args)
        return jax.lax.dot_general(*args, **kwargs)

    layer = MultiHeadAttention(N, fused_qkv=True, qkv_dot_general=dot_general)
    variables = layer.init(jax.random.key(0), x, inputs_k)
    seen.clear()
    layer.apply(variables, x, inputs_k)
    assert len(seen) == products


def test_fused_qkv_stands_back_for_interceptors():
    """Those that change what goes in, what comes out, or nothing; with the layer's dot_general."""
    x, seen = inputs(), []

    def dot_general(*args, **kwargs):
        seen.append(args)
        return jax.lax.dot_general(*args, **kwargs)

    layer = MultiHeadAttention(N, qkv_dot_general=dot_general)
    variables = layer.init(jax.random.key(0), x)

    def run(layer, before, after):
        def interceptor(call, args, kwargs, context):
            if isinstance(context.module, nn.DenseGeneral):
                return after * call(before * args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(interceptor):
            return layer.apply(variables, x)

    fused = layer.clone(fused_qkv=True)
    for factors in ((0.5, 1), (1, 0.5), (1, 1)):
        seen.clear()
        got = run(fused, *factors)
        assert len(seen) == 3
        np.testing.assert_allclose(got, run(layer, *factors), atol=1e-6)
        assert (factors == (1, 1)) == (np.abs(got - layer.apply(variables, x)).max() < 1e-5)
    grads = [jax.grad(lambda s, m=m: (run(m, 1, s) ** 2).sum())(0.5) for m in (fused, layer)]
    np.testing.assert_allclose(*grads, rtol=1e-5)
    assert abs(grads[0]) > 1


def test_captured_projections():
    """What ``capture_intermediates`` finds is what the projections give, not an empty product."""
    x, layer = inputs(), MultiHeadAttention(N)
    variables = layer.init(jax.random.key(0), x)
    options = dict(capture_intermediates=True, mutable=["intermediates"])
    found, expected = (
        layer.clone(fused_qkv=fused).apply(variables, x, **options)[1] for fused in (True, False)
    )
    assert found["intermediates"]["key"]["__call__"][0].shape == (
        *x.shape[:-1],
        N,
        x.shape[-1] // N,
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


DECODING = {
    "plain": dict(),
    "rope": dict(rope=RotaryEmbedding()),
    "window": dict(window=3),
    "left window": dict(window=(2, 0)),
    "all": dict(
        rope=RotaryEmbedding(),
        window=(4, 0),
        qk_norm="rms",
        logits_soft_cap=3.0,
        sinks=True,
        fused_qkv=True,
    ),
}


@pytest.mark.parametrize(
    "name, lead", [*((name, (2,)) for name in DECODING), ("all", ()), ("all", (2, 3))], ids=str
)
def test_decoding_equals_the_causal_pass(name, lead):
    fields, x = DECODING[name], inputs(*lead, T, E)
    layer = GroupedQueryAttention(N, num_kv_heads=K, decode=True, **fields)
    variables = layer.init(jax.random.key(0), x)
    params, cache = {"params": with_random_biases(variables["params"])}, variables["cache"]
    expected = layer.clone(decode=False).apply(params, x, is_causal=True)

    @jax.jit
    def step(cache, token):
        # is_causal must not turn the one query into position 0.
        out, state = layer.apply(
            {**params, "cache": cache}, token, is_causal=True, mutable=["cache"]
        )
        return state["cache"], out

    outs = []
    for t in range(T):
        cache, out = step(cache, x[..., t : t + 1, :])
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=-2), expected, atol=1e-5)
    assert cache["cached_key"].shape == (*lead, T, K, H)


def test_gradients_reach_all_parameters():
    x = inputs()
    layer = GroupedQueryAttention(
        N,
        num_kv_heads=K,
        rope=RotaryEmbedding(),
        qk_norm="rms",
        window=(4, 0),
        logits_soft_cap=5.0,
        sinks=True,
        fused_qkv=True,
    )
    variables = made(layer, x)

    def loss(v):
        return (layer.apply(v, x, is_causal=True) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(variables)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(g).all() and (g != 0).any(), path


class TestTransforms:
    def layer(self, **fields):
        return GroupedQueryAttention(N, num_kv_heads=K, sinks=True, fused_qkv=True, **fields)

    def test_jit(self):
        x = inputs()
        layer = self.layer()
        variables = made(layer, x)
        np.testing.assert_allclose(
            jax.jit(layer.apply)(variables, x), layer.apply(variables, x), atol=1e-5
        )

    def test_remat(self):
        x = inputs()
        layer = self.layer()
        variables = made(layer, x)
        remat = nn.remat(GroupedQueryAttention)(
            N, num_kv_heads=K, sinks=True, fused_qkv=True, name=None
        )

        def loss(m, v):
            return (m.apply(v, x) ** 2).sum()

        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            jax.jit(jax.grad(loss, 1), static_argnums=0)(remat, variables),
            jax.jit(jax.grad(loss, 1), static_argnums=0)(layer, variables),
        )

    def test_scan_over_layers(self):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                layer = GroupedQueryAttention(N, num_kv_heads=K, sinks=True, fused_qkv=True)
                return x + layer(x, is_causal=True), None

        x = inputs()
        scanned = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )()
        variables = scanned.init(jax.random.key(0), x, None)
        stacked = variables["params"]["GroupedQueryAttention_0"]
        assert stacked["key"]["kernel"].shape == (3, E, K, H)
        out, expected = scanned.apply(variables, x, None)[0], x
        for i in range(3):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            expected += self.layer().apply({"params": params}, expected, is_causal=True)
        np.testing.assert_allclose(out, expected, atol=1e-5)

    def test_vmap_over_layers(self):
        x = inputs(3, B, T, E)
        many = nn.vmap(
            GroupedQueryAttention, variable_axes={"params": 0}, split_rngs={"params": True}
        )(N, num_kv_heads=K, sinks=True, fused_qkv=True)
        variables = many.init(jax.random.key(0), x)
        out = many.apply(variables, x)
        for i in range(3):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
            np.testing.assert_allclose(out[i], self.layer().apply(one, x[i]), atol=1e-5)

    def test_mask_is_a_traced_argument(self):
        x = inputs()
        layer = self.layer()
        variables = made(layer, x)
        run = jax.jit(lambda n: layer.apply(variables, x, mask=Mask.prefix(n)))
        for n in (1, 5):
            np.testing.assert_allclose(
                run(n), layer.apply(variables, x, mask=Mask.prefix(n)), atol=1e-5
            )
