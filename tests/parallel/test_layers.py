"""Layers over a mesh: parameters by their logical axes, attention by its own, gradients the same."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import axattn.linen
import axattn.nnx
from axattn import parallel
from axattn._layers.axes import ALL_HEADS_NORM_AXES, LOGICAL_AXES
from axattn.rotary import RotaryEmbedding

AXES = parallel.Axes(batch="data", heads="model", sequence="context")
RULES = (("embed", None), ("heads", "model"), ("kv_heads", "model"), ("head_dim", None))
LATENT_RULES = (*RULES, ("q_lora", None), ("kv_lora", None))
B, T, E, N, K = 4, 16, 32, 4, 2

LAYER = dict(qk_norm="rms", sinks=True, rope=RotaryEmbedding(), use_bias=True, window=(9, 0))
OVER_ALL_HEADS = LOGICAL_AXES | ALL_HEADS_NORM_AXES
LATENT = dict(
    num_heads=N, kv_lora_rank=12, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=8, use_bias=True,
)  # fmt: skip


@pytest.fixture
def inputs():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, T, E)).astype(jnp.float32))


def over(flavour, mesh):
    attend = functools.partial(parallel.attention, axes=AXES, mesh=mesh)
    return functools.partial(flavour.dot_product_attention, attend=attend)


def linen_layer(**options):
    return axattn.linen.GroupedQueryAttention(
        num_heads=N, num_kv_heads=K, qkv_features=E, decode=False, **LAYER, **options
    )


def nnx_layer(**options):
    return axattn.nnx.GroupedQueryAttention(
        N, E, E, num_kv_heads=K, decode=False, rngs=nnx.Rngs(0), **LAYER, **options
    )


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


class TestLinen:
    @pytest.mark.ci
    def test_names(self, inputs):
        """Every parameter has a name for each of its axes, and without the field none is boxed."""
        for layer in (
            linen_layer(logical_axes=True),
            axattn.linen.MultiHeadLatentAttention(**LATENT, logical_axes=True),
        ):
            variables = jax.jit(layer.init)(jax.random.key(0), inputs)
            specs = jax.tree.leaves_with_path(
                nn.get_partition_spec(variables)["params"], is_leaf=lambda x: isinstance(x, P)
            )
            shapes = jax.tree.leaves(jax.tree.map(jnp.shape, nn.meta.unbox(variables["params"])),
                                     is_leaf=lambda x: isinstance(x, tuple))  # fmt: skip
            for (path, spec), shape in zip(specs, shapes, strict=True):
                assert tuple(spec) == LOGICAL_AXES[tuple(key.key for key in path)]
                assert len(spec) == len(shape)
            plain = jax.jit(layer.clone(logical_axes=False).init)(jax.random.key(0), inputs)
            jax.tree.map(np.testing.assert_array_equal, plain, nn.meta.unbox(variables))
            assert not any(isinstance(x, nn.meta.AxisMetadata)
                           for x in jax.tree.leaves(plain, is_leaf=nn.meta.is_axis_metadata))  # fmt: skip

    def test_names_of_norms_over_all_heads(self, inputs):
        layer = linen_layer(logical_axes=True, qk_norm_per_head=False)
        boxed = jax.eval_shape(layer.init, jax.random.key(0), inputs)["params"]
        for path, axes in ALL_HEADS_NORM_AXES.items():
            scale = boxed[path[0]][path[1]]
            assert scale.names == axes and len(scale.unbox().shape) == len(axes)

    @pytest.mark.ci
    def test_a_step(self, mesh_of, inputs):
        mesh = mesh_of(data=2, model=2, context=2)
        one = linen_layer()
        layer = linen_layer(logical_axes=True, attention_fn=over(axattn.linen, mesh))

        def init(key):
            return layer.init(key, inputs, is_causal=True)

        shapes = jax.eval_shape(init, jax.random.key(1))
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(shapes), mesh, RULES)
        params = jax.jit(init, out_shardings=shardings)(jax.random.key(1))
        kernel = params["params"]["key"]["kernel"].unbox()
        assert kernel.sharding.shard_shape(kernel.shape) == (E, K // 2, E // N)
        x = jax.device_put(inputs, NamedSharding(mesh, P("data", "context")))

        def loss(layer, params, x):
            return (layer.apply(params, x, is_causal=True) ** 2).sum()

        got = jax.jit(jax.grad(functools.partial(loss, layer)))(nn.meta.unbox(params), x)
        plain = jax.device_get(nn.meta.unbox(params))
        close(got, jax.jit(jax.grad(functools.partial(loss, one)))(plain, inputs))


class TestNNX:
    def test_names(self):
        latent = axattn.nnx.MultiHeadLatentAttention(
            in_features=E, **LATENT, logical_axes=True, rngs=nnx.Rngs(0)
        )
        over_all_heads = nnx_layer(logical_axes=True, qk_norm_per_head=False)
        for layer, axes in (
            (nnx_layer(logical_axes=True), LOGICAL_AXES),
            (over_all_heads, OVER_ALL_HEADS),
            (latent, LOGICAL_AXES),
        ):
            for path, param in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
                assert param.get_metadata()["out_sharding"] == axes[path]
                assert len(axes[path]) == param[...].ndim
        for _, param in nnx.to_flat_state(nnx.state(nnx_layer(), nnx.Param)):
            assert "out_sharding" not in param.get_metadata()

    @pytest.mark.ci
    def test_a_step(self, mesh_of, inputs):
        mesh = mesh_of(data=2, model=2, context=2)
        one = nnx_layer()
        layer = nnx_layer(logical_axes=True, attention_fn=over(axattn.nnx, mesh))
        with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
            state = nnx.state(layer, nnx.Param)
            nnx.update(layer, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
        kernel = layer.query.kernel[...]
        assert kernel.sharding.shard_shape(kernel.shape) == (E, N // 2, E // N)
        x = jax.device_put(inputs, NamedSharding(mesh, P("data", "context")))

        @nnx.jit
        def gradients(layer, x):
            return nnx.grad(lambda layer: (layer(x, is_causal=True) ** 2).sum())(layer)

        close(nnx.to_pure_dict(gradients(layer, x)), nnx.to_pure_dict(gradients(one, inputs)))


@pytest.mark.ci
def test_explicit_meshes(inputs):
    """The types of the activations say everything: nothing is asked of the layer."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2,
                         devices=jax.devices()[:4])  # fmt: skip
    layer = nnx_layer()
    want = layer(inputs, is_causal=True)
    graph, state = nnx.split(layer)
    with jax.set_mesh(mesh):
        state = jax.device_put(state, NamedSharding(mesh, P()))
        x = jax.device_put(inputs, NamedSharding(mesh, P("x", "y")))
        got = jax.jit(lambda state, x: nnx.merge(graph, state)(x, is_causal=True))(state, x)
        assert jax.typeof(got).sharding.spec == P("x", "y", None)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_hooks_do_not_go_with_attention_over_a_mesh(mesh_of):
    q = jnp.ones((1, 8, 2, 8))
    with pytest.raises(NotImplementedError, match="attend=.* has no place for einsum hooks"):
        over(axattn.linen, mesh_of())(
            q, q, q, qk_attn_weights_einsum=jnp.einsum, attn_weights_value_einsum=jnp.einsum
        )


@pytest.mark.ci
@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_latent_attention(mesh_of, inputs, form):
    """Absorbed, all heads share one key/value head, which every device has whole."""
    mesh = mesh_of(data=2, model=2, context=2)
    attend = functools.partial(parallel.attention, axes=AXES, mesh=mesh, strategy="ring")
    one = axattn.linen.MultiHeadLatentAttention(**LATENT, form=form)
    params = one.init(jax.random.key(0), inputs)

    def gradients(layer):
        return jax.jit(jax.grad(lambda p: (layer.apply(p, inputs, is_causal=True) ** 2).sum()))

    close(gradients(one.clone(attend=attend))(params), gradients(one)(params))

    def output(**options):
        layer = axattn.nnx.MultiHeadLatentAttention(
            in_features=E, **LATENT, form=form, **options, rngs=nnx.Rngs(0)
        )
        return layer(inputs, is_causal=True)

    close(output(attend=attend), output())
