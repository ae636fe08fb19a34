"""axattn.checkpoints: multi-head parameters become grouped-query ones by mean-pooling."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import axattn.linen
import axattn.nnx
from axattn.checkpoints import mha_to_gqa, mha_to_mqa

N, E = 8, 32


def x(seed=1):
    return jax.random.normal(jax.random.key(seed), (2, 5, E))


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
    variables = Model().init(jax.random.key(0), x())
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


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_exact_where_heads_of_a_group_agree(kv_heads):
    variables = Model().init(jax.random.key(0), x())

    def same_in_group(path, leaf):
        if path[-2].key not in ("key", "value") or leaf.ndim < 2 or leaf.shape[-2] != N:
            return leaf
        return jnp.repeat(leaf[..., :: N // kv_heads, :], N // kv_heads, axis=-2)

    variables = jax.tree_util.tree_map_with_path(same_in_group, variables)
    model = Model(axattn.linen.MultiHeadDotProductAttention, dict(num_kv_heads=kv_heads))
    np.testing.assert_allclose(
        model.apply(mha_to_gqa(variables, kv_heads), x()),
        Model().apply(variables, x()),
        atol=1e-5,
    )


def test_containers_and_boxes_are_kept():
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "heads", "kv"))
    variables = nn.MultiHeadAttention(N, kernel_init=init).init(jax.random.key(0), x())
    kernel = mha_to_mqa(variables)["params"]["value"]["kernel"]
    assert isinstance(kernel, nn.LogicallyPartitioned)
    assert kernel.names == ("embed", "heads", "kv") and kernel.value.shape == (E, 1, E // N)
    assert type(mha_to_mqa(freeze(variables))) is type(freeze(variables))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("on_host", [True, False])
def test_dtype_is_kept_and_the_mean_is_float32(dtype, on_host):
    variables = nn.MultiHeadAttention(N, param_dtype=dtype).init(jax.random.key(0), x())
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
    variables = scanned.init(jax.random.key(0), x(), None)
    stacked = mha_to_gqa(variables, 2)
    assert stacked["params"]["MultiHeadAttention_0"]["key"]["kernel"].shape == (3, E, 2, E // N)
    one = mha_to_gqa(jax.tree.map(lambda leaf: leaf[1], variables), 2)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf: leaf[1], stacked), one)


def test_twice_is_once():
    variables = nn.MultiHeadAttention(N).init(jax.random.key(0), x())
    once, twice = mha_to_mqa(variables), mha_to_mqa(mha_to_gqa(variables, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), once, twice)


def test_errors_name_the_layer():
    variables = Model().init(jax.random.key(0), x())
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
