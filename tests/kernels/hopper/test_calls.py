"""The kernels as a part of JAX programs: what features under the numeric rule do not show."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from tests import precision
from tests.kernels import calls
from tests.precision import Call


def arrays(B=1, T=72, S=104, N=4, K=2, H=64, dtype=jnp.bfloat16, seed=0):
    return calls.arrays(B, T, S, N, K, H, dtype=dtype, seed=seed)


def attend(*args, **options):
    return axattn.dot_product_attention(*args, implementation="mosaic_gpu", **options)


def plain_attend(*args, **options):
    return axattn.dot_product_attention(*args, implementation="xla_chunked", **options)


def close(got, want, tolerance=0.03):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scales_that_are_not_positive(interpreted, scale):
    """The largest product is not the largest score."""
    q, k, v = arrays()
    call = Call(dict(query=q, key=k, value=v), dict(scale=scale, is_causal=True))
    precision.check(call, ("mosaic_gpu",))


SEVERAL_TILES = {
    "causal": dict(is_causal=True),
    "rows": dict(is_causal=True, local_window_size=(150, 0), q_offset=np.array([0, 110])),
    "ragged": dict(key_value_seq_lengths=np.array([400, 90]), query_seq_lengths=np.array([5, 300])),
}


@pytest.mark.parametrize("name", SEVERAL_TILES)
def test_several_tiles_of_rows_and_keys(interpreted, name):
    """Rings go around; full and partial blocks meet in one row; the last tiles are clipped."""
    q, k, v = arrays(B=2, T=300, S=410, N=2, K=1, H=16)
    call = Call(dict(query=q, key=k, value=v), SEVERAL_TILES[name])
    precision.check(call, ("mosaic_gpu",))


def test_slopes_of_rows_and_heads(interpreted):
    """Few query rows: a tile has those of several heads, each with its batch row's slope."""
    q, k, v = arrays(B=2, T=20, S=40, N=2, K=1, H=16)
    options = dict(is_causal=True, q_offset=20, alibi_slopes=np.float32([[0.1, 0.5], [1.0, 0.2]]))
    precision.check(Call(dict(query=q, key=k, value=v), options), ("mosaic_gpu",))


def test_sinks_that_are_off(interpreted):
    """A sink of -inf is none, also in rows without keys."""
    q, k, v = arrays(T=24, S=40)
    call = Call(
        dict(query=q, key=k, value=v, sinks=jnp.full(4, -jnp.inf)),
        dict(is_causal=True, q_offset=-8),
    )
    assert np.isneginf(call.exact_results["lse"][:, :8]).all()
    precision.check(call, ("mosaic_gpu",))


def test_cotangents_of_empty_rows_do_not_count(interpreted):
    q, k, v = arrays(T=24, S=40)
    _, pull = jax.vjp(lambda *x: attend(*x, is_causal=True, q_offset=-8), q, k, v)
    dout = jnp.ones(q.shape, q.dtype)
    close(pull(dout.at[:, :8].set(jnp.nan)), pull(dout), tolerance=0)


def test_bitwise_repeatable(interpreted):
    def gradients(q, k, v):
        out, pull = jax.vjp(lambda *x: attend(*x, is_causal=True), q, k, v)
        return out, pull(out)

    program = jax.jit(gradients)
    first, second = program(*arrays()), program(*arrays())
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_group_is_summed_in_the_kernel(interpreted):
    """No array of the size of N heads of keys appears in the backward pass."""
    B, S, N, K, H = 1, 200, 8, 2, 64
    q, k, v = arrays(B=B, T=40, S=S, N=N, K=K, H=H)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *x: attend(*x).sum().astype(float), (0, 1, 2)))(q, k, v)
    sizes = {
        var.aval.size
        for eqn in _equations(jaxpr.jaxpr)
        for var in eqn.outvars
        if hasattr(var.aval, "size")
    }
    assert max(sizes) < S * N * H
    assert S * K * H in sizes


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if "kernel" not in eqn.primitive.name and hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_vmap(interpreted):
    batches = [jnp.stack([a, b]) for a, b in zip(arrays(seed=1), arrays(seed=2), strict=True)]

    def loss(q, k, v):
        return (attend(q, k, v, is_causal=True).astype(jnp.float32) ** 2).sum()

    got = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(*batches)
    want = [jax.jit(jax.grad(loss, (0, 1, 2)))(*(x[i] for x in batches)) for i in range(2)]
    close(got, [jnp.stack(x) for x in zip(*want, strict=True)], tolerance=1e-6)


def test_layers_in_a_scan(interpreted):
    """With remat it is compiled in tests/aot: the interpreter's effects have no remat."""
    q, k, v = arrays(T=72, S=72)

    def loss(q, scales, attend):
        def layer(x, scale):
            return attend(x * scale, k, v, is_causal=True), None

        return jax.lax.scan(layer, q, scales)[0].astype(jnp.float32).sum()

    scales = jnp.asarray([1.0, 0.5], q.dtype)
    gradient = jax.grad(loss, (0, 1))
    got = jax.jit(lambda *x: gradient(*x, attend))(q, scales)
    plain = jax.jit(lambda *x: gradient(*x, plain_attend))(q, scales)
    close(got, plain, tolerance=0.1)


def test_no_gradient_of_gradients(interpreted):
    q, k, v = arrays()
    with pytest.raises(NotImplementedError, match='"mosaic_gpu" has no gradient of gradients'):
        first = jax.grad(lambda q: attend(q, k, v).astype(jnp.float32).sum())
        jax.grad(lambda q: first(q).astype(jnp.float32).sum())(q)


def test_masks_that_are_traced(interpreted):
    """Lengths, offsets and ids are data: one program serves them all."""
    q, k, v = arrays(B=2)
    program = jax.jit(lambda lengths: attend(q, k, v, key_value_seq_lengths=lengths))
    plain = jax.jit(lambda lengths: plain_attend(q, k, v, key_value_seq_lengths=lengths))
    for lengths in ([104, 3], [0, 64]):
        close(program(jnp.asarray(lengths)), plain(jnp.asarray(lengths)))
    assert program._cache_size() == 1
