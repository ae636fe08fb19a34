from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from axattn import linen
from axattn import nnx as axattn_nnx
from axattn.plotting import _style, plot_attention, sown_weights
from tests.plotting.pictures import check_legible, pixels, rendered

TOKENS = "The quick brown fox jumps over $1 lazy dogs and runs away".split()


def weights(*shape):
    raw = np.exp(3 * np.random.default_rng(0).standard_normal(shape, np.float32))
    return raw / raw.sum(-1, keepdims=True)


def test_pixels_are_the_weights():
    from matplotlib import colormaps

    maps = weights(2, 3, 6, 8)
    figure = plot_attention(maps, row=1, heads=[2, 0])
    image, shown = rendered(figure), maps[1][[2, 0]]
    colors = colormaps[_style.SEQUENTIAL]
    assert [ax.get_title() for ax in figure.axes[:2]] == ["head 2", "head 0"]
    for ax, values in zip(figure.axes, shown, strict=False):
        want = colors(values / shown.max())[..., :3]
        np.testing.assert_allclose(pixels(ax, values.shape, image), want, atol=0.02)


@pytest.mark.ci
@pytest.mark.parametrize(
    "heads, labelled", [(1, True), (3, False), (4, True), (7, True), (7, False), (32, False)]
)
def test_legible(heads, labelled):
    labels = dict(query_labels=TOKENS, key_labels=TOKENS) if labelled else {}
    figure = plot_attention(weights(heads, 12, 12), title="Weights", **labels)
    assert figure.get_figwidth() <= 9
    check_legible(figure)
    shown = [ax for ax in figure.axes if ax.get_title()]
    assert len(shown) == heads


@pytest.mark.ci
@pytest.mark.parametrize("shape", [(4, 1, 300), (2, 200, 16), (64, 64), (1, 1)])
def test_shapes(shape):
    check_legible(plot_attention(weights(*shape)))


def test_labels_of_many_tokens_are_thinned_out():
    names = [f"token{i}" for i in range(100)]
    figure = plot_attention(weights(100, 100), query_labels=names, key_labels=names)
    check_legible(figure)
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown == names[::5]


def test_a_dollar_is_a_dollar():
    figure = plot_attention(weights(12, 12), key_labels=["$a", "b$"] * 6)
    figure.canvas.draw()
    assert figure.axes[0].get_xticklabels()[0].get_text() == r"\$a"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype):
    maps = jnp.asarray(weights(3, 4), dtype)
    shown = plot_attention(maps).axes[0].images[0].get_array()
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(maps, np.float32))


def test_the_scale_is_of_finite_weights():
    maps = np.array([[0.25, 0.5], [np.inf, np.nan]])
    assert plot_attention(maps).axes[0].images[0].get_clim() == (0.0, 0.5)
    assert plot_attention(-np.ones((2, 2))).axes[0].images[0].get_clim() == (0.0, 1.0)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(weights=jnp.ones(3)), r"weights takes .* got shape \(3,\)"),
        (dict(weights=jnp.ones((1, 1, 1, 2, 2))), "weights takes"),
        (dict(weights=jnp.ones((0, 2, 2))), "weights takes"),
        (dict(weights=jnp.full((2, 2), jnp.nan)), "weights takes finite numbers"),
        (dict(row=2), "row takes ints from 0 to 1, got 2"),
        (dict(weights=jnp.ones((2, 2)), row=1), "row takes 0 for weights without rows, got 1"),
        (dict(heads=[0, 3]), "heads takes ints from 0 to 2, got 3"),
        (dict(heads=-1), "heads takes ints from 0 to 2, got -1"),
        (dict(heads=[]), "heads takes an int or several, got none"),
        (dict(query_labels=["a"]), "query_labels takes 4 names, got 1"),
        (dict(key_labels="abc"), "key_labels takes 5 names, got 3"),
    ],
)
def test_errors(options, words):
    options = {"weights": jnp.ones((2, 3, 4, 5))} | options
    with pytest.raises(ValueError, match=words):
        plot_attention(**options)


def test_what_linen_sowed():
    layer = linen.GroupedQueryAttention(num_heads=4, num_kv_heads=2)
    x = jnp.ones((2, 5, 16))

    @jax.jit
    def run(key):
        params = layer.init(key, x)
        return layer.apply(params, x, sow_weights=True, mutable=["intermediates"])[1]

    state = run(jax.random.key(0))
    found = sown_weights(state["intermediates"])
    assert {key: value.shape for key, value in found.items()} == {"attention_weights": (2, 4, 5, 5)}
    np.testing.assert_allclose(found["attention_weights"].sum(-1), 1, rtol=1e-6)
    assert list(sown_weights(state)) == ["intermediates/attention_weights"]


def test_what_nnx_sowed():
    class Model(nnx.Module):
        def __init__(self, rngs):
            options = dict(num_heads=4, in_features=16, decode=False, rngs=rngs)
            self.first = axattn_nnx.MultiHeadAttention(**options)
            self.second = nnx.MultiHeadAttention(**options)

        def __call__(self, x):
            return self.second(self.first(x, sow_weights=True), sow_weights=True)

    run = nnx.capture(Model(nnx.Rngs(0)), nnx.Intermediate)
    found = sown_weights(run(jnp.ones((2, 5, 16)))[1])
    assert {key: value.shape for key, value in found.items()} == {
        "first/attention_weights": (2, 4, 5, 5),
        "second/attention_weights": (2, 4, 5, 5),
    }


def test_calls_of_one_layer_are_numbered():
    tree = {"block": {"attention_weights": (jnp.zeros((1, 2, 2)), jnp.ones((1, 2, 2)))}}
    tree["block"]["other"] = (jnp.zeros(3),)
    found = sown_weights(tree)
    assert list(found) == ["block/attention_weights/0", "block/attention_weights/1"]
    assert found["block/attention_weights/1"].all()


def test_nothing_was_sown():
    with pytest.raises(ValueError, match="got none: call the layer with sow_weights=True"):
        sown_weights({"block": {"other": (jnp.zeros(3),)}})
