"""The kernels as a part of JAX programs: what features under the numeric rule do not show."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import axattn
from axattn import parallel
from tests import precision
from tests.kernels import calls
from tests.kernels.conftest import HOPPER, TPU
from tests.precision import Call
from tests.tiers import ci, exhaustive

DTYPE = {TPU: jnp.float32, HOPPER: jnp.bfloat16}
TOLERANCE = {TPU: 1e-4, HOPPER: 0.05}

of_tpu = pytest.mark.parametrize("family", [TPU])
of_hopper = pytest.mark.parametrize("family", [pytest.param(HOPPER, marks=pytest.mark.hopper)])


@pytest.fixture
def arrays(family):
    def make(B=1, T=40, S=72, N=4, K=2, H=32, dtype=DTYPE[family], seed=0):
        return calls.arrays(B, T, S, N, K, H, dtype=dtype, seed=seed)

    return make


@pytest.fixture
def alike(interpreted, family):
    """A function of the door and arrays has the same results with the kernels and without."""

    def check(function, *args):
        results = []
        for implementation in (family, "xla_chunked"):

            def attend(*args, implementation=implementation, **options):
                return axattn.dot_product_attention(*args, implementation=implementation, **options)

            results.append(jax.jit(lambda *args, attend=attend: function(attend, *args))(*args))
        for a, b in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(
                np.float32(a), np.float32(b), atol=TOLERANCE[family], rtol=TOLERANCE[family]
            )

    return check


def squares(out):
    return (out.astype(jnp.float32) ** 2).sum()


@pytest.mark.parametrize(
    "family, scale",
    [
        *ci((TPU, -0.2), (TPU, 0.0)),
        pytest.param(HOPPER, -0.2, marks=[pytest.mark.hopper, pytest.mark.exhaustive]),
        pytest.param(HOPPER, 0.0, marks=[pytest.mark.hopper, pytest.mark.ci]),
    ],
)
def test_scales_that_are_not_positive(interpreted, family, arrays, scale):
    """The largest product is not the largest score."""
    q, k, v = arrays(dtype=jnp.bfloat16)
    call = Call(dict(query=q, key=k, value=v), dict(scale=scale, is_causal=True))
    precision.check(call, (family,))


@pytest.mark.ci
@pytest.mark.parametrize("family", [TPU, pytest.param(HOPPER, marks=pytest.mark.hopper)])
def test_rows_without_keys(interpreted, family, arrays):
    """A sink of -inf is none, there too; their cotangents do not count; and always the same bits."""
    q, k, v = arrays(T=24, S=40)
    inputs = dict(query=q, key=k, value=v, sinks=jnp.full(4, -jnp.inf, q.dtype))
    call = Call(inputs, dict(is_causal=True, q_offset=-8))

    def program(inputs, cotangents):
        def attend(inputs):
            return axattn.dot_product_attention(
                **inputs, **call.options, implementation=family, return_residual=True
            )

        (out, lse), pull = jax.vjp(attend, inputs)
        return {"out": out, "lse": lse, **pull(cotangents)[0]}

    program, (dout, dlse) = jax.jit(program), call.cotangents
    found = jax.tree.map(np.asarray, program(inputs, (dout, dlse)))
    assert np.isneginf(found["lse"][:, :8]).all()
    precision.assert_right(call, found, precision.plain_results(call))
    again = program(inputs, (dout.at[:, :8].set(jnp.nan), dlse))
    jax.tree.map(np.testing.assert_array_equal, found, again)


SEVERAL_TILES = {
    "causal": dict(is_causal=True),
    "rows": dict(is_causal=True, local_window_size=(150, 0), q_offset=np.array([0, 110])),
    "ragged": dict(key_value_seq_lengths=np.array([400, 90]), query_seq_lengths=np.array([5, 300])),
}


@of_hopper
@pytest.mark.parametrize(
    "name",
    [*ci("rows"), *exhaustive("causal", "ragged")],
)
def test_several_tiles_of_rows_and_keys(interpreted, family, arrays, name):
    """Rings go around; full and partial blocks meet in one row; the last tiles are clipped."""
    q, k, v = arrays(B=2, T=300, S=410, N=2, K=1, H=16)
    precision.check(Call(dict(query=q, key=k, value=v), SEVERAL_TILES[name]), (family,))


@of_hopper
@pytest.mark.ci
def test_slopes_of_rows_and_heads(interpreted, family, arrays):
    """Few query rows: a tile has those of several heads, each with its batch row's slope."""
    q, k, v = arrays(B=2, T=20, S=40, N=2, K=1, H=16)
    options = dict(is_causal=True, q_offset=20, alibi_slopes=np.float32([[0.1, 0.5], [1.0, 0.2]]))
    precision.check(Call(dict(query=q, key=k, value=v), options), (family,))


@of_hopper
def test_the_group_is_summed_in_the_kernel(interpreted, family, arrays):
    """No array of the size of N heads of keys appears in the backward pass."""
    S, N, K, H = 200, 8, 2, 64

    def loss(*args):
        return squares(axattn.dot_product_attention(*args, implementation=family))

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*arrays(S=S, N=N, K=K, H=H))
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


@pytest.mark.ci
def test_vmap(alike, arrays):
    """Over arrays, lengths, offsets and slopes of two batches, with one query for both."""
    q, k, v = arrays(B=2)
    ks, vs = jnp.stack([k, -k]), jnp.stack([v, v + 1])
    lengths, offsets = jnp.asarray([[72, 10], [0, 33]]), jnp.asarray([3, 30])
    slopes = jnp.linspace(0.1, 1, 2 * q.shape[2]).reshape(2, -1)

    def run(attend, *args):
        def loss(q, k, v, lengths, offset, slopes):
            options = dict(key_value_seq_lengths=lengths, q_offset=offset, alibi_slopes=slopes)
            return squares(attend(q, k, v, is_causal=True, **options))

        of_one = jax.value_and_grad(loss, (0, 1, 2))
        return jax.vmap(of_one, (None, 0, 0, 0, 0, 0))(q, *args)

    alike(run, ks, vs, lengths, offsets, slopes)


@of_tpu
@pytest.mark.ci
def test_vmap_over_what_all_rows_share(alike, arrays):
    """One call after another."""
    q, k, v = arrays()

    def run(attend, sinks):
        return jax.vmap(jax.value_and_grad(lambda x: squares(attend(q, k, v, sinks=x))))(sinks)

    alike(run, jnp.asarray([[0.0, 1, 2, 3], [3, -2, 1, 0]]))


@of_tpu
@pytest.mark.ci
def test_shard_map(alike, arrays):
    """Over rows and heads."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
                         devices=jax.devices()[:4])  # fmt: skip
    spec = P("x", None, "y")

    def run(attend, *args):
        gradients = jax.grad(lambda *x: squares(attend(*x, is_causal=True)), (0, 1, 2))
        return jax.shard_map(gradients, mesh=mesh, in_specs=spec, out_specs=spec)(*args)

    alike(run, *arrays(B=2))


@of_tpu
@pytest.mark.ci
def test_a_ring(interpreted, family, arrays):
    """Two devices whose tokens are in zigzag order: positions say where they are."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    order = parallel.positions("zigzag", 2, 64)
    q, k, v = arrays(T=64, S=64, N=2, K=1)

    def ring(*args):
        return parallel.attention(
            *args, axes=parallel.Axes(sequence="x"), mesh=mesh, strategy="ring", layout="zigzag",
            implementation=family, is_causal=True,
        )  # fmt: skip

    def plain(*args):
        return axattn.dot_product_attention(*args, implementation="xla", is_causal=True)

    found, want = (jax.jit(jax.grad(lambda *x, attend=attend: squares(attend(*x)), (0, 1, 2)))
                   for attend in (ring, plain))  # fmt: skip
    got = found(*(x[:, order] for x in (q, k, v)))
    for a, b in zip(got, want(q, k, v), strict=True):
        np.testing.assert_allclose(a, b[:, order], atol=1e-4, rtol=1e-4)


@pytest.mark.ci
def test_layers_in_a_scan(alike, arrays):
    """With remat it is compiled in tests/aot: the interpreter's effects have no remat."""
    q, k, v = arrays(S=40)

    def run(attend, q, scales):
        def layer(x, scale):
            return attend(x * scale, k, v, is_causal=True), None

        def loss(q, scales):
            return jax.lax.scan(layer, q, scales)[0].astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1))(q, scales)

    alike(run, q, jnp.asarray([1.0, 0.5], q.dtype))


def test_no_gradient_of_gradients(interpreted, family, arrays):
    def loss(q):
        return squares(axattn.dot_product_attention(q, *arrays()[1:], implementation=family))

    with pytest.raises(NotImplementedError, match=f'"{family}" has no gradient of gradients'):
        jax.jit(jax.grad(lambda q: squares(jax.grad(loss)(q)))).lower(arrays()[0])
