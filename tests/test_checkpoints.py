"""axattn.checkpoints: multi-head parameters become grouped-query ones by mean-pooling."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import axattn.linen
import axattn.nnx
from axattn.cache import DenseCache
from axattn.checkpoints import mha_to_gqa, mha_to_mqa, stack_layers, unstack_layers
from axattn.rotary import RotaryEmbedding

N, E = 8, 32


def x(seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, 5, E)).astype(jnp.float32))


def made(module, *rest):
    """Variables as ``init`` has them, with other numbers, and without compiling it."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x(), *rest)
    return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), s.dtype), shapes)


class Model(nn.Module):
    """Attention at several depths, beside things that merely look like it."""

    cls: type = nn.MultiHeadDotProductAttention
    fields: dict | None = None

    @nn.compact
    def __call__(self, x):
        x = self.cls(N, name="first", bias_init=nn.initializers.normal(), **(self.fields or {}))(x)
        x = nn.Dense(E, name="key")(x)
        return nn.Sequential([nn.Dense(E, name="value"), self.cls(N, **(self.fields or {}))])(x)


def test_heads_are_means_of_consecutive_heads():
    variables = made(Model())
    pooled = mha_to_gqa(variables, 2)
    old, new = (tree["params"]["first"]["key"] for tree in (variables, pooled))
    assert new["kernel"].shape == (E, 2, E // N) and new["bias"].shape == (2, E // N)
    for j in range(2):
        for name in ("kernel", "bias"):
            np.testing.assert_allclose(
                new[name][..., j, :], old[name][..., 4 * j : 4 * j + 4, :].mean(-2), atol=1e-6
            )
    for name in ("query", "out"):
        jax.tree.map(
            np.testing.assert_array_equal,
            pooled["params"]["first"][name],
            variables["params"]["first"][name],
        )
    np.testing.assert_array_equal(
        pooled["params"]["key"]["kernel"], variables["params"]["key"]["kernel"]
    )
    shapes = jax.eval_shape(
        Model(axattn.linen.MultiHeadDotProductAttention, dict(num_kv_heads=2)).init,
        jax.random.key(0),
        x(),
    )
    assert jax.tree.map(jnp.shape, pooled) == jax.tree.map(lambda s: s.shape, shapes)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_exact_where_heads_of_a_group_agree(kv_heads):
    variables = made(Model())

    def same_in_group(path, leaf):
        if path[-2].key not in ("key", "value") or leaf.ndim < 2 or leaf.shape[-2] != N:
            return leaf
        return jnp.repeat(leaf[..., :: N // kv_heads, :], N // kv_heads, axis=-2)

    variables = jax.tree_util.tree_map_with_path(same_in_group, variables)
    model = Model(axattn.linen.MultiHeadDotProductAttention, dict(num_kv_heads=kv_heads))
    got, want = (
        jax.jit(m.apply)(v, x())
        for m, v in ((model, mha_to_gqa(variables, kv_heads)), (Model(), variables))
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_containers_and_boxes_are_kept():
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "heads", "kv"))
    variables = made(nn.MultiHeadAttention(N, kernel_init=init))
    kernel = mha_to_mqa(variables)["params"]["value"]["kernel"]
    assert isinstance(kernel, nn.LogicallyPartitioned)
    assert kernel.names == ("embed", "heads", "kv") and kernel.value.shape == (E, 1, E // N)
    assert type(mha_to_mqa(freeze(variables))) is type(freeze(variables))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("on_host", [True, False])
def test_dtype_is_kept_and_the_mean_is_float32(dtype, on_host):
    variables = made(nn.MultiHeadAttention(N, param_dtype=dtype))
    if on_host:
        variables = jax.tree.map(np.asarray, variables)
    new = mha_to_gqa(variables, 2)["params"]["key"]["kernel"]
    old = variables["params"]["key"]["kernel"].astype(np.float32)
    assert new.dtype == dtype and isinstance(new, np.ndarray) == on_host
    expected = old.reshape(E, 2, 4, E // N).mean(2).astype(dtype)
    np.testing.assert_array_equal(np.asarray(new), np.asarray(expected))


def test_nnx_state():
    mha = nnx.MultiHeadAttention(N, E, decode=False, rngs=nnx.Rngs(0), kernel_metadata={"tag": 1})
    gqa = axattn.nnx.GroupedQueryAttention(
        N, E, num_kv_heads=2, decode=False, rngs=nnx.Rngs(1), kernel_metadata={"tag": 1}
    )
    state = mha_to_gqa(nnx.state(mha, nnx.Param), 2)
    assert isinstance(state, nnx.State) and state["key"]["kernel"].get_metadata()["tag"] == 1
    nnx.update(gqa, state)
    np.testing.assert_array_equal(gqa.query.kernel[...], mha.query.kernel[...])
    np.testing.assert_allclose(
        gqa.value.kernel[...], mha.value.kernel[...].reshape(E, 2, 4, E // N).mean(2), atol=1e-6
    )


def test_layers_stacked_by_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.MultiHeadAttention(N)(x), None

    scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    variables = made(scanned, None)
    stacked = mha_to_gqa(variables, 2)
    assert stacked["params"]["MultiHeadAttention_0"]["key"]["kernel"].shape == (3, E, 2, E // N)
    one = mha_to_gqa(jax.tree.map(lambda leaf: leaf[1], variables), 2)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf: leaf[1], stacked), one)


def test_twice_is_once():
    variables = made(nn.MultiHeadAttention(N))
    once, twice = mha_to_mqa(variables), mha_to_mqa(mha_to_gqa(variables, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), once, twice)


def test_errors_name_the_layer():
    variables = made(Model())
    with pytest.raises(ValueError, match=r"params/\w+/key/bias has 8 heads .*num_kv_heads=3"):
        mha_to_gqa(variables, 3)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        mha_to_gqa(variables, 0)
    with pytest.raises(TypeError, match="must be an integer, got 2.5"):
        mha_to_gqa(variables, 2.5)
    with pytest.raises(ValueError, match="no attention layer"):
        mha_to_gqa({"params": {"dense": {"kernel": jnp.ones((2, 2))}}}, 1)
    with pytest.raises(TypeError, match=r"params/\w+/key/bias must be floating-point, got int32"):
        mha_to_gqa(jax.tree.map(lambda leaf: leaf.astype(jnp.int32), variables), 2)


class LinenBlock(nn.Module):
    logical_axes: bool = False

    @nn.compact
    def __call__(self, x, cache=None):
        layer = axattn.linen.GroupedQueryAttention(
            N, num_kv_heads=2, rope=RotaryEmbedding(), logical_axes=self.logical_axes
        )
        y = layer(nn.LayerNorm()(x), is_causal=True, cache=cache)
        y, cache = (y, None) if cache is None else y
        return x + y, cache


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(E, rngs=rngs)
        self.attention = axattn.nnx.GroupedQueryAttention(
            N, E, num_kv_heads=2, rope=RotaryEmbedding(), decode=False, rngs=rngs, logical_axes=True
        )

    def __call__(self, x, cache=None):
        y = self.attention(self.norm(x), is_causal=True, cache=cache)
        y, cache = (y, None) if cache is None else y
        return x + y, cache


DEPTH = 3


@functools.cache
def scanned_linen():
    scan = nn.scan(
        LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH
    )
    variables = made(scan(), None)
    want, _ = jax.jit(scan().apply)(variables, x(), None)

    @jax.jit
    def step(params, x, cache):
        return LinenBlock().apply({"params": params}, x, cache)

    return variables["params"], want, step


@functools.cache
def scanned_nnx():
    @nnx.split_rngs(splits=DEPTH)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def create(rngs):
        return NNXBlock(rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(block, x):
        return block(x)[0]

    stacked = create(nnx.Rngs(0))
    return stacked, run(stacked, x()), nnx.jit(lambda block, x, cache: block(x, cache))


@pytest.mark.ci
@pytest.mark.parametrize("scanned", [scanned_linen, scanned_nnx])
def test_scanned_layers_generate_apart(scanned):
    params, want, step = scanned()
    layers = unstack_layers(params)
    assert len(layers) == DEPTH
    caches = [DenseCache.create(2, 5, 2, E // N, dtype="float32") for _ in layers]
    outs = []
    for at in range(5):
        y = x()[:, at : at + 1]
        for i, layer in enumerate(layers):
            y, caches[i] = step(layer, y, caches[i])
        outs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=1e-5)
    again = stack_layers(layers, axis_name="layers")
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_names_of_axes_of_layers():
    """Those of a layer that was never stacked; and stacked, those that Flax's transforms give."""
    scan = nn.scan(
        LinenBlock,
        variable_axes={"params": 1},
        split_rngs={"params": True},
        length=DEPTH,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    stacked = made(scan(True), None)["params"]
    layer = jax.eval_shape(LinenBlock(True).init, jax.random.key(0), x())["params"]
    layers = unstack_layers(stacked, axis=1)
    assert jax.tree.structure(layers[0]) == jax.tree.structure(layer)
    again = stack_layers(layers, axis=1, axis_name="layers")
    assert jax.tree.structure(again) == jax.tree.structure(stacked)

    module = scanned_nnx()[0]
    first = unstack_layers(module)[0]
    kernels = [m.attention.key.kernel for m in (module, first)]
    assert [k.get_metadata()["out_sharding"] for k in kernels] == [
        ("layers", "embed", "kv_heads", "head_dim"),
        ("embed", "kv_heads", "head_dim"),
    ]
    state = nnx.state(module)
    states = unstack_layers(state)
    nnx.update(first, states[1])
    np.testing.assert_array_equal(first.attention.key.kernel[...], kernels[0][...][1])
    assert jax.tree.structure(stack_layers(states, axis_name="layers")) == jax.tree.structure(state)


def test_layers_on_the_host_and_along_other_axes():
    tree = {"a": np.arange(24).reshape(2, 3, 4), "b": jnp.arange(6).reshape(2, 3)}
    layers = unstack_layers(tree, axis=1)
    assert [layer["a"].shape for layer in layers] == [(2, 4)] * 3
    assert isinstance(layers[2]["a"], np.ndarray) and np.shares_memory(layers[2]["a"], tree["a"])
    np.testing.assert_array_equal(layers[2]["b"], [2, 5])
    jax.tree.map(np.testing.assert_array_equal, stack_layers(layers, 1), tree)
    np.testing.assert_array_equal(stack_layers(unstack_layers(tree["a"], -1), -1), tree["a"])


@pytest.mark.parametrize(
    "error, match, call",
    [
        (
            ValueError,
            "got 3 in a/k and 2 in b",
            lambda: unstack_layers({"a": {"k": np.ones(3)}, "b": np.ones((2, 3))}),
        ),
        (
            ValueError,
            r"b takes an axis 0 of layers, got shape \(\)",
            lambda: unstack_layers({"a": np.ones(3), "b": 1.0}),
        ),
        (ValueError, "got no arrays", lambda: unstack_layers({})),
        (TypeError, "axis takes an integer, got 'x'", lambda: unstack_layers({}, "x")),
        (ValueError, "layers takes at least one", lambda: stack_layers([])),
        (
            ValueError,
            "one structure, got in layer 1",
            lambda: stack_layers([{"a": np.ones(3)}, {}]),
        ),
        (
            ValueError,
            "one shape and dtype, got in layer 1 .*3.* for a",
            lambda: stack_layers([{"a": np.ones(2)}, {"a": np.ones(3)}]),
        ),
        (ValueError, "axis=2 is none of a", lambda: stack_layers([{"a": np.ones(2)}], 2)),
    ],
)
def test_errors_of_layers(error, match, call):
    with pytest.raises(error, match=match):
        call()
