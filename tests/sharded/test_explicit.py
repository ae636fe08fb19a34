"""Arrays that say by their types how they are sharded, and meshes that leave it to the compiler."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import axattn
from axattn._jax_compat import find_varying_axes, vary_over
from axattn._sharded import explicit
from tests import cases, precision
from tests.cases import Shape
from tests.precision import Call


def mesh_of(kind, *sizes):
    names = "xyz"[: len(sizes)]
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, tuple(names), axis_types=(kind,) * len(sizes), devices=devices)


def call_of(N=8, K=2, T=24, S=24, **options):
    rng = np.random.default_rng(11)
    shape = Shape(B=4, T=T, S=S, N=N, K=K, H=16, h=8)
    return Call(cases.arrays(rng, shape, jnp.float32), options)


def attend_as(mesh, query, key, implementation=None):
    """The door, of arrays that are sharded like this."""

    def attend(query_array, key_array, value_array, **options):
        given = zip((query_array, key_array, value_array), (query, key, key), strict=True)
        arrays = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in given]
        found = axattn.dot_product_attention(*arrays, implementation=implementation, **options)
        assert jax.typeof(found[0]).sharding.spec == P(*query, *(None,) * (4 - len(query)))
        return tuple(jax.sharding.reshard(x, NamedSharding(mesh, P())) for x in found)

    return lambda query, key, value, **options: attend(query, key, value, **options)


SHARDED = {
    "batch": (P("x"), P("x")),
    "heads": (P(None, None, "y"), P(None, None, "y")),
    "heads above K": (P("x", None, ("y", "z")), P("x", None, "y")),
    "sequence": (P(None, "x", "y"), P(None, "x", "y")),
    "sequence of queries alone": (P(None, "x"), P()),
    "batch, sequence, heads": (P("x", "y", "z"), P()),
}


def specs():
    """Implementations take turns."""
    for i, name in enumerate(SHARDED):
        marks = () if name == "heads above K" else pytest.mark.ci
        yield pytest.param(name, ("xla_chunked", "xla")[i % 2], marks=marks)


@pytest.mark.parametrize("specs, implementation", list(specs()))
def test_explicit(specs, implementation):
    mesh = mesh_of(AxisType.Explicit, 2, 2, 2)
    attend = attend_as(mesh, *SHARDED[specs], implementation)
    with jax.set_mesh(mesh):
        precision.check(call_of(is_causal=True, local_window_size=(13, 0)), (attend,))


@pytest.mark.ci
@pytest.mark.parametrize("sizes", [dict(N=12, K=4), dict(S=25)])
def test_what_cannot_be_cut_alike_is_left_to_the_partitioner(sizes):
    """6 ways of 12 heads would need parts of two key/value heads each; 25 keys are not halved."""
    mesh = mesh_of(AxisType.Explicit, 6 if "N" in sizes else 2)
    spec = P(None, None, "x") if "N" in sizes else P(None, "x")
    with jax.set_mesh(mesh):
        precision.check(call_of(**sizes), (attend_as(mesh, spec, P()),))


def test_kernels_get_what_a_device_has(monkeypatch):
    """A kernel is called inside of shard_map, whatever the types are outside."""
    from axattn._implementations import mosaic_tpu
    from tests.kernels.interpreter import behind_the_door

    seen = []

    def forward(call, *, interpret):
        seen.append((call.query.shape, call.key.shape, jax.typeof(call.query).sharding.mesh))
        B, T, N, _ = call.query.shape
        zeros = jnp.zeros((B, T, N, call.value_head_dim), call.query.dtype)
        return vary_over((zeros, jnp.zeros((B, T, N))), find_varying_axes(call.query))

    behind_the_door(monkeypatch, "mosaic_tpu", mosaic_tpu.find_call_refusal)
    monkeypatch.setattr(mosaic_tpu, "forward", forward)
    mesh = mesh_of(AxisType.Explicit, 2, 4)
    spec = NamedSharding(mesh, P("x", None, "y"))
    q, k, v = (call_of().inputs[name] for name in ("query", "key", "value"))
    q = jax.device_put(q, spec)
    axattn.dot_product_attention(q, k, v, implementation="mosaic_tpu")
    (query, key, inside), *_ = seen
    assert query == (2, 24, 2, 16) and key == (2, 24, 1, 16)
    assert set(inside.axis_types) == {AxisType.Manual}


@pytest.mark.ci
def test_several_batch_dimensions():
    mesh = mesh_of(AxisType.Explicit, 2, 2)
    call = call_of()
    q, k, v = (call.inputs[name].reshape(2, 2, *call.inputs[name].shape[1:])
               for name in ("query", "key", "value"))  # fmt: skip
    want = axattn.dot_product_attention(q, k, v)
    placed = [jax.device_put(x, NamedSharding(mesh, P("x", None, None, "y"))) for x in (q, k, v)]
    got = axattn.dot_product_attention(*placed)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.ci
def test_nothing_gathers_queries_or_more_key_value_heads_than_a_device_needs():
    mesh = mesh_of(AxisType.Explicit, 2, 4)
    q, k, v = (call_of(N=8, K=2).inputs[name] for name in ("query", "key", "value"))
    q = jax.device_put(q, NamedSharding(mesh, P("x", None, "y")))
    k, v = (jax.device_put(x, NamedSharding(mesh, P("x"))) for x in (k, v))
    attend = functools.partial(axattn.dot_product_attention, is_causal=True)
    text = jax.jit(attend).lower(q, k, v).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute|all-reduce", text)


@pytest.mark.ci
def test_keys_that_are_shared_out_stay_where_they_are():
    """A decoding step: results are summed, keys do not move; nothing compiles a second time."""
    mesh = mesh_of(AxisType.Explicit, 4)
    q, k, v = (call_of(T=1).inputs[name] for name in ("query", "key", "value"))
    q = jax.device_put(q, NamedSharding(mesh, P()))
    k, v = (jax.device_put(x, NamedSharding(mesh, P(None, "x"))) for x in (k, v))
    text = jax.jit(axattn.dot_product_attention).lower(q, k, v).compile().as_text()
    assert "all-gather" not in text and "all-reduce" in text
    want = axattn.dot_product_attention(*map(np.asarray, (q, k, v)))
    np.testing.assert_allclose(axattn.dot_product_attention(q, k, v), want, atol=1e-5)
    programs = explicit._run_partitioner._cache_size()
    axattn.dot_product_attention(q, k, v)
    assert explicit._run_partitioner._cache_size() == programs > 0
    with pytest.raises(NotImplementedError, match="left to the partitioner since keys have a mesh"):
        axattn.dot_product_attention(q, k, v, implementation="mosaic_gpu")


class TestAuto:
    """The partitioner cuts plain XLA and cannot cut kernels."""

    @pytest.fixture
    def arrays(self):
        mesh = mesh_of(AxisType.Auto, 2, 2)
        spec = NamedSharding(mesh, P("x", None, "y"))
        call = call_of()
        return [jax.device_put(call.inputs[n], spec) for n in ("query", "key", "value")]

    def test_kernels_are_refused_by_name(self, arrays):
        low = [x.astype(jnp.bfloat16) for x in arrays]
        with pytest.raises(NotImplementedError, match="XLA's partitioner, .* mesh axes x, y: name"):
            axattn.dot_product_attention(*low, implementation="mosaic_tpu")
        why = axattn.explain_implementations(*low)
        assert "partitioner" in why["mosaic_tpu"] and why["xla"] is None
        assert why.by_platform["tpu"] in ("xla", "xla_chunked")

    @pytest.mark.ci
    def test_none_takes_what_can_be_cut(self, arrays):
        want = axattn.dot_product_attention(*map(np.asarray, arrays), implementation="xla")
        got = jax.jit(axattn.dot_product_attention)(*arrays)
        np.testing.assert_allclose(got, want, atol=1e-5)

    def test_a_mesh_of_the_context_counts(self, arrays):
        """Where arrays are made inside the program, their types say nothing."""
        with jax.set_mesh(mesh_of(AxisType.Auto, 2)):
            q = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
            with pytest.raises(NotImplementedError, match="mesh axes x"):
                axattn.dot_product_attention(q, q, q, implementation="mosaic_gpu")
