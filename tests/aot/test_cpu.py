"""`analyze` on the CPU target, where the compiler is always there."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import aot

X = jax.ShapeDtypeStruct((64, 32), jnp.float32)
ROWS = 2 * 64 * 32 * 32  # FLOPs of X @ a 32 x 32 matrix

cpu = functools.partial(aot.analyze, target="cpu")


def test_sizes_and_flops():
    r = cpu(lambda x, w: x @ w, X, jnp.ones((32, 32)))
    assert r.ok
    assert (r.argument_bytes, r.output_bytes) == (64 * 32 * 4 + 32 * 32 * 4, 64 * 32 * 4)
    assert r.flops == pytest.approx(ROWS, rel=0.05)
    assert r.bytes_accessed > 0
    assert not r.cost_is_lower_bound
    assert r.hbm_bytes is None
    assert set(r.versions) == {"jax", "jaxlib"}
    assert "HloModule" in r.hlo_text()


def test_arguments_may_be_arrays_of_any_kind_in_any_pytree():
    def f(tree, *, extra):
        return tree["a"] @ tree["b"][0] + extra

    square = np.ones((32, 32), np.float32)
    assert cpu(f, {"a": X, "b": [square, None]}, extra=jnp.ones((32,))).ok


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("abstract", [True, False])
def test_prng_keys(typed, abstract):
    key = jax.random.key(0) if typed else jax.random.PRNGKey(0)
    if abstract:
        key = jax.ShapeDtypeStruct(key.shape, key.dtype)
    assert cpu(lambda k: jax.random.normal(k, (8,)), key).output_bytes == 32


def test_jitted_functions_keep_their_own_options():
    scaled = jax.jit(lambda x, n, *, flip: -x * n if flip else x * n, static_argnames=("n", "flip"))
    assert cpu(scaled, X, 3, flip=True).ok
    assert cpu(jax.jit(jnp.sin, donate_argnums=0), X).alias_bytes == 64 * 32 * 4


def test_static_and_donated_arguments_of_a_plain_function():
    assert cpu(lambda x, n: x.reshape(n, -1), X, 8, static_argnums=1).ok
    assert cpu(lambda n, x: x.reshape(n, -1), 8, X, static_argnums=-2).ok
    assert cpu(jnp.sin, X, donate_argnums=0).alias_bytes == 64 * 32 * 4


def test_keywords_without_arrays_are_constants():
    def f(x, *, flip, axis, how, fn):
        assert flip is True and how == "up"
        return fn(x).sum(axis)

    assert cpu(f, X, flip=True, axis=1, how="up", fn=jnp.sin).output_bytes == 64 * 4


def test_scalars_stay_weakly_typed():
    r = cpu(lambda x, s: x * s, jax.ShapeDtypeStruct((8,), jnp.bfloat16), 2.0)
    assert r.output_bytes == 16


def test_a_function_of_no_arrays():
    assert cpu(lambda: jnp.ones((4, 4))).output_bytes == 64
    assert cpu(jax.jit(lambda: jnp.ones((4, 4)))).output_bytes == 64


def test_the_target_decides_the_branch():
    def f(x):
        return jax.lax.platform_dependent(x, cpu=lambda x: x[:1], default=lambda x: x[:2])

    # Shapes must agree between branches, so tell them apart by FLOPs instead.
    def g(x):
        w = jnp.ones((32, 32))
        return jax.lax.platform_dependent(x, cpu=lambda x: x @ w, default=lambda x: x)

    with pytest.raises(TypeError):
        cpu(f, X)
    assert cpu(g, X).flops == pytest.approx(ROWS, rel=0.1)


def test_errors_of_the_function_are_raised():
    with pytest.raises(TypeError):
        cpu(lambda x: x + "a", X)
    with pytest.raises(ValueError, match="target='v9' is unknown"):
        aot.analyze(jnp.sin, X, target="v9")


def test_not_implemented_is_a_refusal():
    def f(x):
        raise NotImplementedError("no dropout here")

    r = cpu(f, X)
    assert (r.refusal.kind, r.refusal.message) == ("unsupported", "no dropout here")
    assert r.function == "f"
    assert r.compiled is None


def test_the_name_of_a_partial_is_that_of_its_function():
    assert cpu(functools.partial(jnp.sum, axis=0), X).function == "sum"


# XLA's own analysis counts a loop body once; ours as often as it runs.


def steps(x, w, n):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=n)[0]


def nested(x, w):
    return jax.lax.scan(lambda c, _: (steps(c, w, 5) * 2, c.sum()), x, None, length=3)


@pytest.mark.parametrize(
    "fn, times",
    [
        (lambda x, w: steps(x, w, 10), 10),
        (nested, 15),
        (jax.grad(lambda x, w: nested(x, w)[1].sum()), 30),
        (lambda x, w: jax.lax.fori_loop(2, 8, lambda i, c: c @ w, x), 6),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: steps(x, w, 10), lambda: x), 10),
    ],
    ids=["scan", "nested", "grad", "fori", "cond"],
)
def test_loops_count_as_often_as_they_run(fn, times, capfd):
    x, w = jax.ShapeDtypeStruct((256, 256), jnp.float32), jnp.ones((256, 256))
    r = cpu(fn, x, w)
    assert r.flops == pytest.approx(times * 2 * 256**3, rel=0.05)
    assert not r.cost_is_lower_bound
    assert capfd.readouterr().err == ""


def test_a_loop_of_unknown_length_makes_a_lower_bound():
    def f(x, n):
        return jax.lax.fori_loop(0, n, lambda i, c: c @ c, x)

    r = cpu(f, jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))
    assert r.cost_is_lower_bound
    (note,) = r.notes
    assert note.startswith(
        "loop bodies count once, as the trip count is not known here: a loop at jit(f)/while: "
    )
    assert "it depends on what" in note
    assert r.flops == pytest.approx(2 * 64**3, rel=0.1)
