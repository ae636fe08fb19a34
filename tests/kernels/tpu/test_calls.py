"""The kernels as a part of JAX programs: what features under the numeric rule do not show."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import axattn
from tests import precision
from tests.kernels import calls
from tests.precision import Call


def arrays(B=1, T=40, S=72, N=4, K=2, H=32, dtype=jnp.float32, seed=0):
    return calls.arrays(B, T, S, N, K, H, dtype=dtype, seed=seed)


def attend(*args, implementation="mosaic_tpu", **options):
    return axattn.dot_product_attention(*args, implementation=implementation, **options)


def plain_attend(*args, **options):
    return attend(*args, implementation="xla_chunked", **options)


def close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance, rtol=tolerance)


def gradients(attend, **options):
    def loss(q, k, v):
        return (attend(q, k, v, **options).astype(jnp.float32) ** 2).sum()

    return jax.grad(loss, (0, 1, 2))


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scales_that_are_not_positive(interpreted, scale):
    """The largest product is not the largest score."""
    q, k, v = arrays(dtype=jnp.bfloat16)
    call = Call(dict(query=q, key=k, value=v), dict(scale=scale, is_causal=True))
    precision.check(call, ("mosaic_tpu",))


def test_sinks_that_are_off(interpreted):
    """A sink of -inf is none, also in rows without keys."""
    q, k, v = arrays(T=24, S=40)
    options = dict(is_causal=True, q_offset=-8, return_residual=True)
    found = attend(q, k, v, sinks=jnp.full(4, -jnp.inf), **options)
    close(found, attend(q, k, v, **options), tolerance=0)
    assert (np.asarray(found[1])[:, :8] == -np.inf).all()


def test_cotangents_of_empty_rows_do_not_count(interpreted):
    q, k, v = arrays(T=24, S=40)
    _, pull = jax.vjp(lambda *x: attend(*x, is_causal=True, q_offset=-8), q, k, v)
    dout = jnp.ones(q.shape, q.dtype)
    close(pull(dout.at[:, :8].set(jnp.nan)), pull(dout), tolerance=0)


def test_vmap(interpreted):
    batches = [jnp.stack([a, b]) for a, b in zip(arrays(seed=1), arrays(seed=2), strict=True)]
    gradient = gradients(attend, is_causal=True)
    got = jax.jit(jax.vmap(gradient))(*batches)
    want = [
        jax.jit(gradients(plain_attend, is_causal=True))(*(x[i] for x in batches)) for i in (0, 1)
    ]
    close(got, [jnp.stack(x) for x in zip(*want, strict=True)], tolerance=1e-4)


@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")], ids=["batch", "heads"])
def test_shard_map(interpreted, spec):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k, v = arrays(B=2)
    gradient = gradients(attend, is_causal=True)
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec)
    close(
        jax.jit(sharded)(q, k, v), jax.jit(gradients(plain_attend, is_causal=True))(q, k, v), 1e-4
    )


def test_layers_in_a_scan(interpreted):
    """With remat it is compiled in tests/aot: the interpreter's effects have no remat."""
    q, k, v = arrays(T=72)

    def loss(q, scales, attend):
        def layer(x, scale):
            return attend(x * scale, k, v, is_causal=True), None

        return jax.lax.scan(layer, q, scales)[0].sum()

    scales = jnp.asarray([1.0, 0.5], q.dtype)
    gradient = jax.grad(loss, (0, 1))
    got = jax.jit(lambda *x: gradient(*x, attend))(q, scales)
    plain = jax.jit(lambda *x: gradient(*x, plain_attend))(q, scales)
    close(got, plain, tolerance=1e-4)


def test_no_gradient_of_gradients(interpreted):
    q, k, v = arrays()
    with pytest.raises(NotImplementedError, match='"mosaic_tpu" has no gradient of gradients'):
        first = jax.grad(lambda q: attend(q, k, v).sum())
        jax.grad(lambda q: first(q).sum())(q)


def test_masks_that_are_traced(interpreted):
    """Lengths, offsets and ids are data: one program serves them all."""
    q, k, v = arrays(B=2)
    program = jax.jit(lambda lengths: attend(q, k, v, key_value_seq_lengths=lengths))
    plain = jax.jit(lambda lengths: plain_attend(q, k, v, key_value_seq_lengths=lengths))
    for lengths in ([72, 3], [0, 64]):
        close(program(jnp.asarray(lengths)), plain(jnp.asarray(lengths)))
    assert program._cache_size() == 1


def test_vmap_over_what_differs_by_row(interpreted):
    """Lengths, offsets and slopes of two batches, one query for both."""
    q, k, v = arrays(B=2)
    ks, vs = jnp.stack([k, -k]), jnp.stack([v, v + 1])
    lengths, offsets = jnp.asarray([[72, 10], [0, 33]]), jnp.asarray([3, 30])
    slopes = jnp.linspace(0.1, 1, 2 * q.shape[2]).reshape(2, -1)

    def run(attend):
        def one(k, v, lengths, offset, slopes):
            options = dict(key_value_seq_lengths=lengths, q_offset=offset, alibi_slopes=slopes)
            return attend(q, k, v, is_causal=True, **options)

        return jax.jit(jax.vmap(one))(ks, vs, lengths, offsets, slopes)

    close(run(attend), run(plain_attend))


def test_vmap_over_what_all_rows_share(interpreted):
    """One call after another."""
    q, k, v = arrays()
    sinks = jnp.asarray([[0.0, 1, 2, 3], [3, -2, 1, 0]])

    def run(attend):
        def loss(sinks):
            return (attend(q, k, v, sinks=sinks) ** 2).sum()

        return jax.jit(jax.vmap(jax.value_and_grad(loss)))(sinks)

    close(run(attend), run(plain_attend), tolerance=1e-4)
