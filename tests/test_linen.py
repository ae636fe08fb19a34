"""What is Linen's own in axattn.linen: scopes, boxes, interceptors, rngs, lifted transforms.

What both packages have in common is in ``tests/layers``.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn.linen
from axattn.linen import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention
from tests.layers.apis import B, E, H, K, Linen, N, T, assert_close, assert_same, inputs, randomized

# Flax calls its own SelfAttention deprecated; ours is not.
pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "name", ["MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"]
)
def test_scopes_are_named_after_the_class(name):
    class Model(nn.Module):
        cls: type

        @nn.compact
        def __call__(self, x):
            return self.cls(N)(self.cls(N)(x))

    ours, flax = (Model(getattr(package, name)) for package in (axattn.linen, nn))
    assert_same(ours.init(KEY, inputs()), flax.init(KEY, inputs()))


def test_layers_are_dataclasses_of_their_own_name():
    for name in axattn.linen.__all__[:-1]:
        cls = getattr(axattn.linen, name)
        assert cls.__name__ == name and dataclasses.is_dataclass(cls)
    assert MultiQueryAttention(N).num_kv_heads == 1


def test_partitioning_metadata():
    fields = dict(
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("e", "h", "k")),
        bias_init=nn.with_partitioning(nn.initializers.zeros, ("heads", "kv")),
    )
    flax, layer = nn.MultiHeadAttention(N, **fields), MultiHeadAttention(N, **fields)
    fused = layer.clone(fused_qkv=True)
    expected = flax.init(KEY, inputs())
    assert_same(layer.init(KEY, inputs()), expected)
    assert_same(fused.init(KEY, inputs()), expected)
    assert_close(fused.apply(expected, inputs()), flax.apply(expected, inputs()), atol=1e-5)


def test_inputs_kv_is_the_former_name():
    x, memory = inputs(), inputs(seed=2)
    layer = Linen(x)
    with pytest.warns(DeprecationWarning, match="inputs_kv"):
        old = layer(x, inputs_kv=memory)
    np.testing.assert_array_equal(old, layer(x, memory))
    with pytest.raises(ValueError, match="`inputs_kv` must be None"):
        layer(x, x, inputs_kv=x)


def test_dropout_keys():
    """Explicit ones go before those of the stream; ``deterministic`` may come with the call."""
    x = inputs()
    layer = Linen(x, dropout_rate=0.5, deterministic=True)
    plain, layer.module = layer(x), layer.module.clone(deterministic=None)
    np.testing.assert_array_equal(layer(x, deterministic=True), plain)
    drop = functools.partial(layer, x, deterministic=False)
    explicit = drop(dropout_rng=jax.random.key(5))
    np.testing.assert_array_equal(explicit, drop(dropout_rng=jax.random.key(5), dropout=2))
    assert not np.allclose(explicit, drop(dropout=2))


def test_custom_function_gets_what_it_names():
    seen = {}

    def plain(query, key, value, mask=None, dtype=None):
        seen.update(mask=mask, dtype=dtype)
        return query

    layer = MultiHeadAttention(N, attention_fn=plain, dtype=jnp.bfloat16)
    mask = nn.make_causal_mask(inputs()[..., 0])
    layer.init_with_output(KEY, inputs(), mask=mask)
    assert seen == {"mask": mask, "dtype": jnp.bfloat16}


def test_einsum_hooks():
    q = inputs(B, T, N, H)
    call = functools.partial(axattn.linen.dot_product_attention, q, q, q)
    with pytest.raises(ValueError, match="given together"):
        call(qk_attn_weights_einsum=jnp.einsum)
    hooks = dict(qk_attn_weights_einsum=jnp.einsum, attn_weights_value_einsum=jnp.einsum)
    with pytest.raises(ValueError, match="exclude precision"):
        call(**hooks, precision="highest")
    with pytest.raises(NotImplementedError, match="einsum hooks"):
        call(**hooks, implementation="xla_chunked")


def test_fused_qkv_stands_back_for_interceptors():
    """Those that change what goes in, what comes out, or nothing; with the layer's dot_general."""
    x, seen = inputs(), []

    def dot_general(*args, **kwargs):
        seen.append(args)
        return jax.lax.dot_general(*args, **kwargs)

    layer = MultiHeadAttention(N, qkv_dot_general=dot_general)
    variables = layer.init(KEY, x)

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
        assert_close(got, run(layer, *factors), atol=1e-6)
        assert (factors == (1, 1)) == (np.abs(got - layer.apply(variables, x)).max() < 1e-5)
    grads = [
        jax.jit(jax.grad(lambda s, m=m: (run(m, 1, s) ** 2).sum()))(0.5) for m in (fused, layer)
    ]
    assert_close(*grads, rtol=1e-5)
    assert abs(grads[0]) > 1


def test_captured_projections():
    """What ``capture_intermediates`` finds is what the projections give, not an empty product."""
    x, layer = inputs(), MultiHeadAttention(N)
    variables = layer.init(KEY, x)
    options = dict(capture_intermediates=True, mutable=["intermediates"])
    found, expected = (
        layer.clone(fused_qkv=fused).apply(variables, x, **options)[1] for fused in (True, False)
    )
    assert found["intermediates"]["key"]["__call__"][0].shape == (B, T, N, H)
    assert_same(found, expected)


def test_captured_methods():
    """What is found of all methods, not of calls only, can leave ``jax.jit``: it is arrays."""
    sizes = dict(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
    capture = dict(capture_intermediates=lambda module, method: True, mutable=True)
    for layer in (
        MultiHeadAttention(N, qk_norm="rms", decode=True),
        axattn.linen.MultiHeadLatentAttention(N, **sizes),
    ):
        variables = layer.init(KEY, inputs())
        out, found = jax.jit(lambda v, x, layer=layer: layer.apply(v, x, **capture))(
            variables, inputs()[:, :1]
        )
        np.testing.assert_array_equal(found["intermediates"]["__call__"][0], out)


@pytest.mark.ci
class TestTransforms:
    FIELDS = dict(num_kv_heads=K, sinks=True, fused_qkv=True)
    EACH = dict(variable_axes={"params": 0}, split_rngs={"params": True})

    def test_remat(self):
        x = inputs()
        layer = Linen(x, cls="GroupedQueryAttention", **self.FIELDS)
        expected = layer.gradients(x)
        layer.module = nn.remat(GroupedQueryAttention)(N, **self.FIELDS)
        assert_close(layer.gradients(x), expected, rtol=1e-4, atol=1e-4)

    def test_scan_over_layers(self):
        layer = GroupedQueryAttention(N, **self.FIELDS)

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + layer.clone(parent=self)(x, is_causal=True), None

        x = inputs()
        scan = nn.scan(Block, **self.EACH, length=3)()
        variables = randomized(jax.eval_shape(scan.init, KEY, x, None))
        (stacked,) = variables["params"].values()
        assert stacked["key"]["kernel"].shape == (3, E, K, H)
        out, expected = jax.jit(scan.apply)(variables, x, None)[0], x
        for i in range(3):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            expected = expected + layer.apply({"params": params}, expected, is_causal=True)
        assert_close(out, expected, rtol=1e-4, atol=1e-4)

    def test_vmap_over_layers(self):
        x = inputs(3, B, T, E)
        layer = GroupedQueryAttention(N, **self.FIELDS)
        many = nn.vmap(GroupedQueryAttention, **self.EACH)(N, **self.FIELDS)
        variables = randomized(jax.eval_shape(many.init, KEY, x))
        out = jax.jit(many.apply)(variables, x)
        for i in range(3):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
            assert_close(out[i], layer.apply(one, x[i]), atol=1e-5)
