"""jit, vmap, grad, remat, scan, shard_map, forward mode: each with every implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import axattn
from axattn import Mask
from tests import reference
from tests.tiers import ci

B, T, S, N, K, H, h = 4, 20, 28, 4, 2, 8, 12
IMPLEMENTATIONS = ["xla", "xla_chunked"]


# Most of what JAX does to an einsum is JAX's own: in CI. Where the library has a part in it, everyday.
with_each = pytest.mark.parametrize("attend", IMPLEMENTATIONS, indirect=True)


@pytest.fixture(params=["xla_chunked", *ci("xla")])
def attend(request, force_blocks):
    """The function with one implementation; 20 x 28 is cut into blocks of 8 x 12 with tails."""
    force_blocks(8, 12)
    return functools.partial(axattn.dot_product_attention, implementation=request.param)


def inputs(seed=0, *, lead=(B,), q_len=T, heads=N):
    rng = np.random.default_rng(seed)
    shapes = (q_len, heads, H), (S, K, H), (S, K, h)
    return [jnp.asarray(rng.normal(size=(*lead, *shape)).astype(jnp.float32)) for shape in shapes]


def close(got, want, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
    )


def loss_of(attend, **kwargs):
    def loss(q, k, v, *rest):
        out, lse = attend(q, k, v, return_residual=True, **kwargs, **(rest[0] if rest else {}))
        return (out**2).sum() + (jnp.where(jnp.isfinite(lse), lse, 0.0) ** 2).sum()

    return loss


def exact_loss(q, k, v, **kwargs):
    """The loss above and its gradients, float64."""
    exact = reference.attend(q, k, v, **kwargs)
    lse = np.where(np.isfinite(exact.lse), exact.lse, 0.0)
    gradients = exact.gradients(2 * exact.out, 2 * lse)
    return (exact.out**2).sum() + (lse**2).sum(), gradients


def assert_gradients(got, **kwargs):
    """``got`` is ((loss, gradients of q, k, v)) at ``inputs()``."""
    value, gradients = exact_loss(*inputs(), **kwargs)
    np.testing.assert_allclose(got[0], value, rtol=1e-5)
    for name, gradient in zip(("query", "key", "value"), got[1], strict=True):
        np.testing.assert_allclose(gradient, gradients[name], rtol=1e-4, atol=1e-4, err_msg=name)


@with_each
def test_eager_equals_jit(attend):
    q, k, v = inputs()
    np.testing.assert_array_equal(
        attend(q, k, v, is_causal=True), jax.jit(lambda *x: attend(*x, is_causal=True))(q, k, v)
    )


RNG = np.random.default_rng(0)
# Sets of arguments that are mapped over together, two of each.
MAPPED = {
    "lengths_bias_sinks_offset": dict(
        key_value_seq_lengths=np.array([[28, 1, 0, 9], [5, 28, 13, 12]]),
        bias=RNG.normal(size=(2, N, 1, S)).astype(np.float32),
        sinks=RNG.normal(size=(2, N)).astype(np.float32),
        q_offset=np.array([4, 11]),
    ),
    "mask_positions_scale_slopes": dict(
        mask=RNG.random((2, 1, 1, 1, S)) < 0.5,
        kv_positions=np.stack([np.arange(S), np.arange(S)[::-1]]),
        scale=np.array([0.2, 0.6], np.float32),
        alibi_slopes=RNG.random((2, N)).astype(np.float32),
    ),
    "mask_object": dict(
        mask=Mask.lengths(kv=np.array([[7], [20]])) & Mask.causal(np.array([[9], [2]]))
    ),
}


class TestVmap:
    """Whatever is mapped over: the same as one call per index."""

    @pytest.mark.parametrize(
        "name, q_len", [(name, T) for name in MAPPED] + [("lengths_bias_sinks_offset", 2)]
    )
    def test_over_options(self, attend, name, q_len):
        q, k, v = inputs(q_len=q_len)

        def one(options):
            gradient = jax.value_and_grad(loss_of(attend, is_causal=True), (0, 1, 2))
            return gradient(q, k, v, options)

        values, gradients = jax.jit(jax.vmap(one))(MAPPED[name])
        for n in range(2):
            options = jax.tree.map(lambda x, n=n: x[n], MAPPED[name])
            if name == "mask_object":
                options = dict(
                    causal_offset=[[9], [2]][n], key_value_seq_lengths=np.array([[7], [20]])[n]
                )
            value, want = exact_loss(q, k, v, is_causal=True, **options)
            np.testing.assert_allclose(values[n], value, rtol=1e-5)
            close([g[n] for g in gradients], [want[x] for x in ("query", "key", "value")], 2e-4)

    def test_over_the_batch(self, attend):
        q, k, v = inputs(lead=(3, B))
        got = jax.jit(jax.vmap(lambda *x: attend(*x, local_window_size=(9, 3))))(q, k, v)
        want = reference.attend(q, k, v, local_window_size=(9, 3)).out
        close(got, want)

    @pytest.mark.ci
    def test_over_queries_alone(self, attend):
        q, k, v = inputs()
        many = jnp.stack([q, 2 * q, -q])
        gradient = jax.grad(loss_of(attend), (0, 1))
        got = jax.jit(jax.vmap(gradient, in_axes=(0, None, None)))(many, k, v)
        for n in range(3):
            want = exact_loss(many[n], k, v)[1]
            close([g[n] for g in got], [want["query"], want["key"]], 2e-4)

    @pytest.mark.ci
    @pytest.mark.parametrize("q_len", [T, 2])
    def test_over_heads(self, attend, q_len):
        # A group at a time is the same as all: in_axes need not be the batch.
        q, k, v = inputs(q_len=q_len)
        grouped = q.reshape(B, q_len, K, N // K, H)
        one = lambda q, k, v: attend(q, k[:, :, None], v[:, :, None])  # noqa: E731
        got = jax.jit(jax.vmap(one, in_axes=(2, 2, 2), out_axes=2))(grouped, k, v)
        close(got.reshape(B, q_len, N, h), reference.attend(q, k, v).out)


@pytest.mark.ci
def test_gradient_of_vmap_sums(attend):
    q, k, v = inputs()

    def loss(q, k, v):
        return jax.vmap(loss_of(attend, is_causal=True))(q, k, v).sum()

    got = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)
    assert_gradients(got, is_causal=True)


@pytest.mark.parametrize("policy", [None, *ci(jax.checkpoint_policies.dots_saveable)])
def test_remat(attend, policy):
    loss = loss_of(attend, is_causal=True, logits_soft_cap=3.0)
    wrapped = jax.checkpoint(loss, policy=policy)
    got = jax.jit(jax.value_and_grad(wrapped, (0, 1, 2)))(*inputs())
    assert_gradients(got, is_causal=True, logits_soft_cap=3.0)


@pytest.mark.ci
def test_scan_over_layers_with_remat(attend):
    """A stack of layers as models write it, against the same layers in a Python loop."""
    rng = np.random.default_rng(0)
    width, layers = N * H, 3
    x = jnp.asarray(rng.normal(size=(2, T, width)).astype(jnp.float32))
    scale = width**-0.5
    weights = {
        "q": jnp.asarray(rng.normal(size=(layers, width, N, H)) * scale, jnp.float32),
        "kv": jnp.asarray(rng.normal(size=(layers, 2, width, K, H)) * scale, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(layers, N, H, width)) * scale, jnp.float32),
    }

    def layer(x, w, attend):
        q = jnp.einsum("btd,dnh->btnh", x, w["q"])
        k, v = (jnp.einsum("btd,dnh->btnh", x, w["kv"][n]) for n in range(2))
        return x + jnp.einsum("btnh,nhd->btd", attend(q, k, v, is_causal=True), w["out"])

    def scanned(weights, x):
        step = jax.checkpoint(lambda x, w: (layer(x, w, attend), None))
        return (jax.lax.scan(step, x, weights)[0] ** 2).sum()

    def looped(weights, x):
        for n in range(layers):
            x = layer(x, jax.tree.map(lambda w, n=n: w[n], weights), jax.nn.dot_product_attention)
        return (x**2).sum()

    got = jax.jit(jax.value_and_grad(scanned, (0, 1)))(weights, x)
    want = jax.jit(jax.value_and_grad(looped, (0, 1)))(weights, x)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    close(got[1], want[1], 2e-3)


def two_devices(kind):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    return jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])


class TestShardMap:
    """Two simulated devices, replication checked by JAX; gradients of what is shared are summed."""

    KWARGS = dict(is_causal=True, q_offset=8)

    @pytest.fixture
    def mesh(self):
        return two_devices(AxisType.Auto)

    def value_and_grad(self, attend, mesh, specs, arrays, extra=None, extra_specs=None):
        """The loss over shards and its gradients, of the whole arrays."""
        extra, extra_specs = extra or {}, extra_specs or {}

        def local(q, k, v, extra):
            loss = loss_of(attend, **self.KWARGS)(q, k, v, extra)
            return jax.lax.psum(loss, "x")

        loss = jax.shard_map(local, mesh=mesh, in_specs=(*specs, extra_specs), out_specs=P())
        arrays = [
            jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)
        ]
        names = {n: x for n, x in extra.items() if jnp.issubdtype(jnp.result_type(x), jnp.floating)}
        integers = {n: x for n, x in extra.items() if n not in names}

        def total(q, k, v, names):
            return loss(q, k, v, {**names, **integers})

        value, gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(*arrays, names)
        return (value, gradients[:3]), gradients[3]

    @pytest.mark.parametrize(
        "specs",
        [
            (P("x"), P("x"), P("x")),
            (P(None, None, "x"), P(None, None, "x"), P(None, None, "x")),
        ],
        ids=["batch", "heads"],
    )
    def test_sharded(self, attend, mesh, specs):
        got, _ = self.value_and_grad(attend, mesh, specs, inputs())
        assert_gradients(got, **self.KWARGS)

    def test_queries_sharded_keys_replicated(self, attend, mesh):
        """T over devices: each has its own q_offset, and dK, dV come from both."""
        specs = (P(None, "x"), P(), P())
        offsets = jnp.array([8, 8 + T // 2])

        def local_offset(q, k, v, q_offset, **kwargs):
            return attend(q, k, v, q_offset=q_offset[0], **kwargs)

        self.KWARGS = dict(is_causal=True)  # of this instance
        got, _ = self.value_and_grad(
            local_offset, mesh, specs, inputs(), dict(q_offset=offsets), dict(q_offset=P("x"))
        )
        assert_gradients(got, is_causal=True, q_offset=8)

    @pytest.mark.ci
    def test_query_heads_sharded_one_kv_head_replicated(self, attend, mesh):
        q, k, v = inputs()
        k, v = k[:, :, :1], v[:, :, :1]
        specs = (P(None, None, "x"), P(), P())
        (value, gradients), _ = self.value_and_grad(attend, mesh, specs, (q, k, v))
        want_value, want = exact_loss(q, k, v, **self.KWARGS)
        np.testing.assert_allclose(value, want_value, rtol=1e-5)
        close(list(gradients), [want["query"], want["key"], want["value"]], 2e-4)

    def test_bias_sinks_and_lengths(self, attend, mesh):
        rng = np.random.default_rng(0)
        bias = rng.normal(size=(1, N, T, S)).astype(np.float32)
        sinks = rng.normal(size=N).astype(np.float32)
        lengths = np.array([28, 10, 0, 17])
        specs = (P("x"), P("x"), P("x"))
        got, gradients = self.value_and_grad(
            attend,
            mesh,
            specs,
            inputs(),
            dict(bias=bias, sinks=sinks, key_value_seq_lengths=lengths),
            dict(bias=P(), sinks=P(), key_value_seq_lengths=P("x")),
        )
        options = dict(bias=bias, sinks=sinks, key_value_seq_lengths=lengths, **self.KWARGS)
        assert_gradients(got, **options)
        want = exact_loss(*inputs(), **options)[1]
        for name in ("bias", "sinks"):
            np.testing.assert_allclose(gradients[name], want[name], rtol=1e-4, atol=1e-4)

    @pytest.mark.ci
    def test_decode(self, attend, mesh):
        q, k, v = inputs(q_len=1)
        lengths = np.array([28, 10, 0, 17])

        def local(q, k, v, lengths):
            return attend(q, k, v, key_value_seq_lengths=lengths)

        program = jax.shard_map(local, mesh=mesh, in_specs=(P("x"),) * 4, out_specs=P("x"))
        want = reference.attend(q, k, v, key_value_seq_lengths=lengths).out
        close(jax.jit(program)(q, k, v, lengths), want)

    @pytest.mark.ci
    def test_everything_replicated(self, attend, mesh):
        program = jax.shard_map(
            lambda *x: attend(*x, is_causal=True), mesh=mesh, in_specs=(P(),) * 3, out_specs=P()
        )
        close(jax.jit(program)(*inputs()), reference.attend(*inputs(), is_causal=True).out)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(P("x"), id="batch"),
        pytest.param(P(None, None, "x"), id="heads", marks=pytest.mark.ci),
    ],
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_arrays(attend, kind, spec):
    """Plain jit over sharded arrays: the compiler cuts it, or (explicit) the types say how."""
    mesh = two_devices(kind)
    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in inputs()]
    got = jax.jit(jax.value_and_grad(loss_of(attend, is_causal=True), (0, 1, 2)))(*arrays)
    assert_gradients(got, is_causal=True)


class TestForwardMode:
    TANGENTS = inputs(seed=5)

    def test_xla_has_it(self):
        loss = loss_of(functools.partial(axattn.dot_product_attention, implementation="xla"))
        _, slope = jax.jit(lambda x, t: jax.jvp(loss, tuple(x), tuple(t)))(inputs(), self.TANGENTS)
        _, gradients = exact_loss(*inputs())
        want = sum(
            (gradients[name] * np.asarray(t)).sum()
            for name, t in zip(("query", "key", "value"), self.TANGENTS, strict=True)
        )
        np.testing.assert_allclose(slope, want, rtol=1e-4)

    def test_xla_has_second_derivatives(self):
        q, k, v = (x[:1, :3] for x in inputs())

        def loss(q):
            return (axattn.dot_product_attention(q, k, v, implementation="xla") ** 2).sum()

        product = jax.jvp(jax.grad(loss), (q,), (jnp.ones_like(q),))[1]
        step = 1e-2
        numeric = (jax.grad(loss)(q + step) - jax.grad(loss)(q - step)) / (2 * step)
        np.testing.assert_allclose(product, numeric, atol=2e-3)

    @pytest.mark.parametrize(
        "implementation, heads",
        [
            ("xla_chunked", 4),
            # Of few rows None takes the one path or the other.
            *ci((None, 2), (None, 4), ("xla_chunked", 2)),
        ],
    )
    def test_all_that_varies(self, small_blocks, implementation, heads):
        """Tangents of a value, of a gradient and of tangents are those of the einsum."""
        rng = np.random.default_rng(0)
        shapes = ((2, 24, heads, 8), (2, 40, 2, 8), (2, 40, 2, 6), (1, heads, 24, 40), (heads,))
        x = tuple(jnp.asarray(rng.normal(size=shape).astype(jnp.float32)) for shape in shapes)
        tangents = tuple(
            jnp.asarray(rng.normal(size=shape).astype(jnp.float32)) for shape in shapes
        )

        def results(name):
            def loss(query, key, value, bias, sinks):
                out, lse = axattn.dot_product_attention(
                    query, key, value, bias, is_causal=True, q_offset=-3, sinks=sinks,
                    logits_soft_cap=3.0, dropout_rate=0.2, dropout_rng=jax.random.key(0),
                    implementation=name, return_residual=True,
                )  # fmt: skip
                lse = jnp.where(lse == -jnp.inf, 0.0, lse)
                return (out * out).sum() + jnp.sin(lse).sum()

            def slope(*x):
                return jax.jvp(loss, x, tangents)[1]

            slopes = jax.vmap(lambda q: slope(q, *x[1:]))(jnp.stack([x[0], -x[0]]))
            product = jax.jvp(jax.grad(loss, range(5)), x, tangents)[1]
            return slopes, product, jax.jvp(slope, x, tangents)[1]

        found, want = (jax.jit(lambda name=n: results(name))() for n in (implementation, "xla"))
        for got, exact in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(got, exact, rtol=2e-5, atol=2e-5 * np.abs(exact).max())

    def test_linear_transposes_name_the_implementation_that_has_them(self):
        q, k, v = (jax.random.normal(jax.random.key(n), (1, n, 2, 8)) for n in (4, 600, 600))

        def transposed(name):
            attend = functools.partial(axattn.dot_product_attention, q, k, implementation=name)
            return jax.linear_transpose(attend, v)(q)[0]

        (want,) = jax.vjp(lambda v: axattn.dot_product_attention(q, k, v), v)[1](q)
        close(transposed("xla"), want)
        with pytest.raises(NotImplementedError, match='ask for implementation="xla"'):
            transposed("xla_chunked")


class TestStaging:
    def test_eval_shape(self, attend):
        q, k, v = (jax.ShapeDtypeStruct((5, *x.shape), jnp.bfloat16) for x in inputs())
        out, lse = jax.eval_shape(lambda *x: attend(*x, return_residual=True), q, k, v)
        assert (out.shape, out.dtype) == ((5, B, T, N, h), jnp.bfloat16)
        assert (lse.shape, lse.dtype) == ((5, B, T, N), jnp.float32)

    def test_ahead_of_time(self, attend):
        q, k, v = inputs()
        program = jax.jit(lambda q, k, v, mask: attend(q, k, v, mask=mask))
        mask = Mask.lengths(kv=jnp.array([28, 3, 0, 9]))
        structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (q, k, v, mask))
        compiled = program.lower(*structs).compile()
        want = reference.attend(q, k, v, key_value_seq_lengths=np.array([28, 3, 0, 9])).out
        close(compiled(q, k, v, mask), want)

    @with_each
    @pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
    def test_lowers_for_every_platform(self, attend, platform):
        q, k, v = inputs()
        program = jax.jit(jax.value_and_grad(loss_of(attend, is_causal=True), (0, 1, 2)))
        lowered = program.trace(q, k, v).lower(lowering_platforms=(platform,))
        assert "dot_general" in lowered.as_text()

    def test_compiles_once_for_all_lengths(self, attend):
        traces = []

        @jax.jit
        def program(q, k, v, lengths, offset):
            traces.append(1)
            return attend(q, k, v, key_value_seq_lengths=lengths, q_offset=offset, is_causal=True)

        for lengths, offset in (([1, 2, 3, 4], 0), ([9, 28, 0, 4], 20)):
            got = program(*inputs(), np.array(lengths), offset)
            want = reference.attend(
                *inputs(), key_value_seq_lengths=lengths, q_offset=offset, is_causal=True
            )
            close(got, want.out)
        assert len(traces) == 1

    @pytest.mark.ci
    def test_inside_while_loop(self, attend):
        q, k, v = inputs()

        def body(state):
            n, q = state
            return n + 1, q + attend(q, k, v)[..., :H] / 10

        _, got = jax.jit(lambda q: jax.lax.while_loop(lambda s: s[0] < 3, body, (0, q)))(q)
        want = np.asarray(q, np.float64)
        for _ in range(3):
            want = want + reference.attend(want, k, v).out[..., :H] / 10
        close(got, want)
