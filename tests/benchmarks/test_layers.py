from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import cases, functions, inputs, layers


def case(implementation, direction, dtype="float32", config="32/4/2/12"):
    return cases.Case(cases.parse_config(config), implementation, 2, dtype, direction)


def run(implementation, direction):
    work = layers.build(case(implementation, direction))
    args = inputs.random_like(work.args, ints=work.ints)
    return work, args, jax.jit(work.fn)(*args)


@pytest.mark.ci
@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_all_compute_what_the_baseline_does(direction):
    _, _, expected = run("repeat_kv", direction)
    for implementation in ("xla", "xla_chunked", "default", "jax_nn"):
        _, _, got = run(implementation, direction)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), got, expected)


@pytest.mark.ci
def test_decode_is_the_last_token_of_the_forward_pass():
    # The cache of the tokens before, by the layer's own projections.
    work, (params, _, x), (out, _) = run("xla", "fwd")
    step, (_, cache, inputs_), _ = run("xla", "decode")
    cache = {
        f"cached_{name}": jnp.einsum("bte,ekh->btkh", x, params[name]["kernel"]).at[:, -1].set(9.0)
        for name in ("key", "value")
    }
    token, new = jax.jit(step.fn)(params, cache, {**inputs_, "x": x[:, -1:]})
    np.testing.assert_allclose(token, out[:, -1:], rtol=1e-5, atol=1e-5)
    assert new.keys() == cache.keys()  # goes into the next step as it is


def test_dtype_is_everywhere_and_only_the_cache_is_donated():
    for direction, donated in (("fwd", ()), ("fwd+bwd", ()), ("decode", (1,))):
        work = layers.build(case("xla", direction, "bfloat16"))
        assert work.donate_argnums == donated
        out, cache = jax.eval_shape(work.fn, *work.args)
        args = [a for a in jax.tree.leaves(work.args) if a.dtype != jnp.int32]
        assert {a.dtype for a in args} == {jnp.dtype("bfloat16")}
        loss_apart = [a for a in jax.tree.leaves((out, cache)) if a.shape]
        assert {a.dtype for a in loss_apart} == {jnp.dtype("bfloat16")}


def test_parameters_have_few_key_value_heads_and_no_biases():
    work = layers.build(case("xla", "fwd"))
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
    small = case("default", "decode")
    assert layers.default_implementation(small, "cpu") == "xla_chunked"  # it skips what is unused
    assert layers.default_implementation(small, "tpu") == "xla"
    large = case("default", "fwd", "bfloat16", "4096/16/2/8192")
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
