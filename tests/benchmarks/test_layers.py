from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import cases, functions, inputs, layers


def run(implementation, direction, dtype="float32", config="32/4/2/12"):
    case = cases.Case(cases.parse_config(config), implementation, 2, dtype, direction)
    work = layers.build(case)
    args = inputs.random_like(work.args, ints=work.ints)
    return work, args, jax.jit(work.fn)(*args)


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize("implementation", ["xla", "xla_chunked", "default", "jax_nn"])
def test_all_compute_what_the_baseline_does(implementation, direction):
    _, _, expected = run("repeat_kv", direction)
    _, _, got = run(implementation, direction)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_decode_is_the_last_token_of_the_forward_pass():
    # The cache of the tokens before, by the layer's own projections.
    work, (params, _, x), _ = run("xla", "fwd")
    out, _ = work.fn(params, (), x)
    step, (_, cache, inputs_), _ = run("xla", "decode")
    cache = {
        f"cached_{name}": jnp.einsum("bte,ekh->btkh", x, params[name]["kernel"]).at[:, -1].set(9.0)
        for name in ("key", "value")
    }
    token, new = step.fn(params, cache, {**inputs_, "x": x[:, -1:]})
    np.testing.assert_allclose(token, out[:, -1:], rtol=1e-5, atol=1e-5)
    assert new.keys() == cache.keys()  # goes into the next step as it is


def test_only_the_cache_is_donated():
    for direction, donated in (("fwd", ()), ("fwd+bwd", ()), ("decode", (1,))):
        assert run("xla", direction)[0].donate_argnums == donated


def test_dtype_is_everywhere():
    for direction in cases.DIRECTIONS:
        work, _, (out, cache) = run("xla", direction, "bfloat16")
        args = [a for a in jax.tree.leaves(work.args) if a.dtype != jnp.int32]
        assert {a.dtype for a in args} == {jnp.dtype("bfloat16")}
        loss_apart = [a for a in jax.tree.leaves((out, cache)) if a.shape]
        assert {a.dtype for a in loss_apart} == {jnp.dtype("bfloat16")}


def test_parameters_have_few_key_value_heads_and_no_biases():
    work = layers.build(cases.Case(cases.parse_config("32/4/2/12"), "xla", 1, "float32", "fwd"))
    shapes = {name: p["kernel"].shape for name, p in work.args[0].items()}
    assert shapes == {
        "query": (32, 4, 8),
        "key": (32, 2, 8),
        "value": (32, 2, 8),
        "out": (4, 8, 32),
    }
    assert all(list(p) == ["kernel"] for p in work.args[0].values())


def test_unsupported_says_so():
    with pytest.raises(NotImplementedError, match="cudnn"):
        run("cudnn", "fwd")


def test_default_implementation():
    small = cases.Case(cases.parse_config("32/4/2/12"), "default", 1, "float32", "decode")
    assert layers.default_implementation(small, "cpu") == "xla_chunked"  # it skips what is unused
    assert layers.default_implementation(small, "tpu") == "xla"
    large = cases.Case(cases.parse_config("4096/16/2/8192"), "default", 1, "bfloat16", "fwd")
    for platform in ("cpu", "tpu"):
        assert layers.default_implementation(large, platform) != "xla"


def test_direction():
    def fn(x, y):
        return x * y

    x, y = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 4.0])
    assert functions.in_direction(fn, "fwd")(x, y).tolist() == [3.0, 8.0]
    loss, grads = functions.in_direction(fn, "fwd+bwd")(x, y)
    assert loss == pytest.approx((9 + 64) / 2)
    np.testing.assert_allclose(grads[0], x * y * y)
    with pytest.raises(ValueError, match="direction='bwd'"):
        functions.in_direction(fn, "bwd")


def test_inputs_are_random():
    tree = {"x": jax.ShapeDtypeStruct((64, 8), jnp.bfloat16), "n": jax.ShapeDtypeStruct((), int)}
    drawn = inputs.random_like(tree, ints={"n": 5})
    assert int(drawn["n"]) == 5
    values = np.asarray(drawn["x"], np.float32)
    assert 0.8 < values.std() < 1.2 and abs(values.mean()) < 0.2
    kernel = inputs.random_like({"kernel": jax.ShapeDtypeStruct((64, 8), jnp.float32)})["kernel"]
    assert np.asarray(kernel).std() == pytest.approx(1 / 8, rel=0.2)
