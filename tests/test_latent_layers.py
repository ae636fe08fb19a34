"""MultiHeadLatentAttention of Linen and NNX: what the goldens of DeepSeek's models do not ask."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import axattn.linen
import axattn.nnx
from axattn import Mask
from axattn.cache import DenseCache
from axattn.rotary import RotaryEmbedding, YarnScaling, yarn_softmax_scale
from tests.tiers import ci

E, T, N = 20, 9, 4
SIZES = dict(
    num_heads=N,
    kv_lora_rank=12,
    q_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
)


def inputs(seed=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, T, E)).astype(dtype))


def linen(**fields):
    return axattn.linen.MultiHeadLatentAttention(**{**SIZES, **fields})


@functools.cache
def variables(layer):
    return jax.jit(layer.init)(jax.random.key(0), inputs())


def run(layer, made, x, **call):
    """The call, jitted: of a Linen layer with variables, or of anything else."""
    if made is not None:
        layer = functools.partial(layer.apply, made)
    return jax.jit(lambda x: layer(x, **call))(x)


def nnx_of(layer_variables, **fields):
    layer = axattn.nnx.MultiHeadLatentAttention(
        in_features=E, rngs=nnx.Rngs(0), **{**SIZES, **fields}
    )
    nnx.update(layer, layer_variables["params"])
    return layer


@pytest.mark.ci
def test_views():
    """``nnx.view`` turns dropout off in a model of several kinds of layers."""

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            options = dict(dropout_rate=0.5, rngs=rngs)
            self.latent = axattn.nnx.MultiHeadLatentAttention(in_features=E, **SIZES, **options)
            self.grouped = axattn.nnx.GroupedQueryAttention(
                4, E, num_kv_heads=2, decode=False, **options
            )

    off = nnx.view(Model(), deterministic=True)
    assert off.latent.deterministic is True and off.grouped.deterministic is True
    np.testing.assert_array_equal(off.latent(inputs()), off.latent(inputs()))
    on = nnx.view(off, deterministic=False)
    assert (on.latent(inputs()) != on.latent(inputs())).any()


@pytest.mark.parametrize(
    "fields", [{}, dict(q_lora_rank=None), dict(use_bias=True, out_features=7)]
)
def test_parameters(fields):
    layer = linen(**fields)
    found = jax.eval_shape(layer.init, jax.random.key(0), inputs())["params"]
    found = jax.tree.map(lambda x: x.shape, found)
    want = {
        "kv_down": {"kernel": (E, 16)},
        "kv_norm": {"scale": (12,)},
        "key_up": {"kernel": (12, N, 6)},
        "value_up": {"kernel": (12, N, 5)},
        "out": {"kernel": (N, 5, fields.get("out_features", E))},
    }
    if "q_lora_rank" in fields:
        want["query"] = {"kernel": (E, N, 10)}
    else:
        want["query_down"] = {"kernel": (E, 10)}
        want["query_norm"] = {"scale": (10,)}
        want["query_up"] = {"kernel": (10, N, 10)}
    if "use_bias" in fields:
        for name in ("kv_down", "query_down", "out"):
            want[name]["bias"] = want[name]["kernel"][-1:]
    assert found == want
    make = functools.partial(axattn.nnx.MultiHeadLatentAttention, in_features=E)
    ours = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0), **{**SIZES, **fields}))
    found = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    assert jax.tree.map(lambda x: x.shape, found) == want


def test_first_values_are_those_of_the_products():
    """key_up and value_up are made by the rules of a projection from R features."""
    made = variables(linen(kv_lora_rank=400, qk_nope_head_dim=64, v_head_dim=64))["params"]
    for name in ("key_up", "value_up"):
        np.testing.assert_allclose(np.std(made[name]["kernel"]), 400**-0.5, rtol=0.02)


CALLS = {
    "options": (
        dict(window=(3, 0), logits_soft_cap=1.5, scale=0.3, rope=RotaryEmbedding(interleaved=True)),
        dict(is_causal=True, positions=np.arange(T)[::-1].copy()),
    ),
    "mask": ({}, dict(mask=np.tril(np.ones((T, T), np.float32), 2))),
    "structure": (
        {},
        dict(
            mask=Mask.causal() & Mask.window(4, 0),
            segment_ids=np.repeat([[0, 1]], 2, 0).repeat([4, 5], 1),
        ),
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.ci if i else ()) for i, n in enumerate(reversed(CALLS))],
)
def test_forms_and_flavours_agree(name):
    fields, call = CALLS[name]
    layer, made, x = linen(**fields), variables(linen()), inputs()
    want = run(layer, made, x, **call)
    assert want.shape == (2, T, E)
    for form in ("naive", "absorbed"):
        np.testing.assert_allclose(run(layer.clone(form=form), made, x, **call), want, atol=1e-5)
    np.testing.assert_allclose(run(nnx_of(made, **fields), None, x, **call), want, atol=1e-6)
    assert np.abs(run(linen(), made, x) - want).max() > 1e-3


@pytest.mark.ci
@pytest.mark.parametrize("name", CALLS)
def test_each_option_counts(name):
    fields, call = CALLS[name]
    made, x = variables(linen()), inputs()
    want = run(linen(**fields), made, x, **call)
    for option in {*fields, *call} - {"is_causal"}:  # a window that ends here is causal
        less, fewer = ({n: x for n, x in given.items() if n != option} for given in (fields, call))
        assert np.abs(run(linen(**less), made, x, **fewer) - want).max() > 1e-3, option


def test_only_differences_of_positions_count():
    layer = linen()
    made, x = variables(layer), inputs()
    at = jax.jit(lambda first: layer.apply(made, x, positions=jnp.arange(T) + first))
    here, later = at(0), at(1000)
    np.testing.assert_allclose(here, later, atol=1e-5)


def test_yarn_changes_the_scale():
    scaling = YarnScaling(8.0, 16, mscale=1.0, mscale_all_dim=1.0)
    rope = RotaryEmbedding(scaling=scaling)
    made, x = variables(linen()), inputs()
    by_hand = run(linen(rope=rope, scale=yarn_softmax_scale(10, scaling)), made, x)
    np.testing.assert_array_equal(run(linen(rope=rope), made, x), by_hand)
    assert np.abs(by_hand - run(linen(rope=rope, scale=10**-0.5), made, x)).max() > 1e-3


@pytest.mark.parametrize("form", [None, *ci(("naive",), ("absorbed",))])
def test_caches(form):
    """A layer trained in any form decodes."""
    layer, made, x = linen(form=form), variables(linen()), inputs()
    want = run(layer, made, x, is_causal=True)
    for call in (functools.partial(layer.apply, made), nnx_of(made, form=form)):
        cache = DenseCache.create(2, T, **layer.cache_sizes, dtype="float32")
        step, outs = jax.jit(lambda x, cache: call(x, cache=cache)), []  # noqa: B023
        for at in range(0, T, 3):
            out, cache = step(x[:, at : at + 3], cache)
            outs.append(out)
        np.testing.assert_allclose(np.concatenate(outs, 1), want, atol=1e-5)


class Instead(nnx.Module):
    """What stands in the place of a projection: ``make(base(x), x)``, with the base's kernel."""

    def __init__(self, base, make):
        self.base, self.make = base, make
        self.kernel = base.kernel

    def __call__(self, x):
        return self.make(self.base(x), x)


def with_instead(api, made, makes, **fields):
    """A call of the layer whose ups are replaced: in Linen by an interceptor, in NNX by modules."""
    if api == "nnx":
        layer = nnx_of(made, **fields)
        for name, make in makes.items():
            setattr(layer, name, Instead(getattr(layer, name), make))
        return layer

    def interceptor(call, args, kwargs, context):
        out = call(*args, **kwargs)
        make = makes.get(context.module.name)
        return make(out, *args) if make else out

    def call(*args, **kwargs):
        with nn.intercept_methods(interceptor):
            return linen(**fields).apply(made, *args, **kwargs)

    return call


@pytest.mark.ci
@pytest.mark.parametrize(
    "api, where",
    [("linen", "cache"), ("nnx", "absorbed")]
    + ci(("linen", "naive"), ("nnx", "naive"), ("nnx", "cache")),
)
def test_adapters_of_ups_are_called(api, where):
    """The outputs and gradients are those of kernels with the adapter merged into them."""
    made, x = variables(linen()), inputs()
    ups = ("key_up", "value_up")
    added = {
        name: 0.5 * jax.random.normal(jax.random.key(i), made["params"][name]["kernel"].shape)
        for i, name in enumerate(ups)
    }
    fields = dict(form=None if where == "cache" else where, implementation="xla")
    cache = DenseCache.create(2, T, **linen().cache_sizes, dtype="float32")

    def outputs(call):
        if where != "cache":
            return call(x, is_causal=True)
        first, filled = call(x[:, :5], cache=cache)
        return jnp.concatenate([first, call(x[:, 5:], cache=filled)[0]], 1)

    def adapted(added):
        makes = {n: lambda y, x, n=n: y + jnp.einsum("...r,rnd->...nd", x, added[n]) for n in ups}
        return outputs(with_instead(api, made, makes, **fields))

    def merged(added):
        params = {n: {"kernel": made["params"][n]["kernel"] + added[n]} for n in ups}
        params = {"params": {**made["params"], **params}}
        return outputs(lambda x, **call: linen(**fields).apply(params, x, **call))

    results = []
    for f in (adapted, merged):

        @jax.jit
        def both(added, f=f):
            out, transpose = jax.vjp(f, added)
            return out, *transpose(jnp.cos(jnp.arange(out.size)).reshape(out.shape))

        results.append(both(added))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), *results)
    assert all(np.abs(g).max() > 1e-2 for g in results[0][1].values())


@pytest.mark.ci
@pytest.mark.parametrize("api", ["nnx", *ci(("linen",))])
def test_only_linear_ups_are_absorbed(api):
    made, x = variables(linen()), inputs()
    cache = DenseCache.create(2, T, **linen().cache_sizes, dtype="float32")
    for name, make in (
        ("value_up", lambda y, x: jax.nn.relu(y)),
        ("key_up", lambda y, x: jnp.tanh(y)),
        ("value_up", lambda y, x: y + 1),
        ("key_up", lambda y, x: y * jnp.cumsum(x, -2).sum(-1)[..., None, None]),
    ):
        for call in (dict(), dict(cache=cache)):
            refused = with_instead(api, made, {name: make}, form="absorbed")
            with pytest.raises(ValueError, match=f"{name} is .* linear map"):
                refused(x, **call)
    got = jax.jit(with_instead(api, made, {"value_up": lambda y, x: y + 1}, form="absorbed"))(x)
    assert np.isnan(got).all()
    # Of all others the kernel is not asked for: weights sum to one, so that values gain one.
    plus = with_instead(api, made, {"value_up": lambda y, x: y + 1})(x)
    out = made["params"]["out"]["kernel"].sum((0, 1))
    np.testing.assert_allclose(plus, linen().apply(made, x) + out, atol=1e-5)
    zero = with_instead(api, made, {"value_up": lambda y, x: 0 * y}, form="absorbed")
    assert not zero(x).any()


def test_dtypes():
    layer, made, x = linen(dtype=jnp.bfloat16), variables(linen()), inputs()
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
    want = run(linen(), made, x)
    for form in ("naive", "absorbed"):
        out = run(layer.clone(form=form), made, x)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(out), want, atol=0.05, rtol=0.05)
    assert jax.eval_shape(nnx_of(made, dtype=jnp.bfloat16), x).dtype == jnp.bfloat16


def test_dropout():
    layer = linen(dropout_rate=0.5)
    made, x = variables(linen()), inputs()
    with pytest.raises(ValueError):
        layer.apply(made, x)  # nobody said whether it is on
    quiet = layer.apply(made, x, deterministic=True)
    np.testing.assert_array_equal(quiet, linen().apply(made, x))
    loud = [
        layer.apply(made, x, deterministic=False, rngs={"dropout": jax.random.key(i)})
        for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(loud[0], loud[1])
    assert np.abs(loud[0] - loud[2]).max() > 1e-3 and np.abs(loud[0] - quiet).max() > 1e-3
    # The same key drops the same weights in both forms.
    rng = dict(deterministic=False, dropout_rng=jax.random.key(5))
    naive, absorbed = (layer.clone(form=f).apply(made, x, **rng) for f in ("naive", "absorbed"))
    np.testing.assert_allclose(naive, absorbed, atol=1e-5)
    ours = nnx_of(made, dropout_rate=0.5, deterministic=False)
    assert np.abs(ours(x) - ours(x)).max() > 1e-3
    np.testing.assert_array_equal(ours(x, deterministic=True), quiet)


def test_metadata_of_parameters_stays():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    params = linen(kernel_init=boxed).init(jax.random.key(0), inputs())["params"]
    for name in ("kv_down", "key_up", "value_up", "out"):
        assert isinstance(params[name]["kernel"], nn.Partitioned), name


@pytest.mark.parametrize(
    "error, match, fields, call",
    [
        (ValueError, "qk_rope_head_dim must be even", dict(qk_rope_head_dim=3), {}),
        (ValueError, "kv_lora_rank must be a positive integer, got 0", dict(kv_lora_rank=0), {}),
        (TypeError, "num_heads must be an integer, got 2.5", dict(num_heads=2.5), {}),
        (ValueError, "form must be one of .* got 'quick'", dict(form="quick"), {}),
        (TypeError, "rope takes a RotaryEmbedding, got None", dict(rope=None), {}),
        (ValueError, "lengths takes None without a cache", {}, dict(lengths=np.array([1, 2]))),
    ],
)
def test_errors(error, match, fields, call):
    with pytest.raises(error, match=match):
        linen(**fields).init(jax.random.key(0), inputs(), **call)
    with pytest.raises(error, match=match):
        axattn.nnx.MultiHeadLatentAttention(in_features=E, rngs=nnx.Rngs(0), **{**SIZES, **fields})(
            inputs(), **call
        )


def test_errors_over_caches():
    layer = linen()
    made, x = variables(layer), inputs()
    cache = DenseCache.create(2, T, **layer.cache_sizes, dtype="float32")
    ids = np.zeros((2, T), int)
    for match, options in (
        ("segment_ids does not go with cache", dict(segment_ids=ids, cache=cache)),
        ("is_causal=False .* cache", dict(is_causal=False, cache=cache)),
        ("B = 2 for this cache", dict(cache=cache)),
        ("see cache_sizes", dict(cache=DenseCache.create(2, T, 1, 16, dtype="float32"))),
    ):
        given = x[:1] if "B = 2" in match else x
        with pytest.raises(ValueError, match=match):
            layer.apply(made, given, **options)
        with pytest.raises(ValueError, match=match):
            nnx_of(made)(given, **options)
    with pytest.raises(TypeError, match="cache takes a cache of axattn.cache"):
        layer.apply(made, x, cache={})
