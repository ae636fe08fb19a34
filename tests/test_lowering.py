"""Programs that JAX lowers for devices that are not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import axattn
from axattn import _jax_compat
from axattn._implementations import mosaic_tpu
from axattn.cache import DenseCache

hopper = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU kernels need jax >= 0.11"
)


def structs(T=32, N=2, K=1, H=64, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((1, T, n, H), dtype) for n in (N, K, K)]


LONG = structs(T=512, N=8, K=2)  # as many scores as the einsum no longer takes on a CPU


def attend(*arrays, **options):
    return axattn.dot_product_attention(*arrays, is_causal=True, **options)


def gradients(*arrays, **options):
    def loss(*arrays):
        return attend(*arrays, **options).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(*arrays)


def lowered(function, arrays, platform, **options):
    traced = jax.jit(lambda *x: function(*x, **options)).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def kernels(text):
    return text.count("@tpu_custom_call"), text.count("@mosaic_gpu")


@pytest.mark.parametrize("arrays", [structs(), LONG], ids=["short", "long"])
@pytest.mark.parametrize("implementation", [None, "mosaic_tpu", ("mosaic", "xla")])
def test_for_a_tpu(arrays, implementation):
    assert kernels(lowered(gradients, arrays, "tpu", implementation=implementation))[0] >= 2


@hopper
def test_for_a_gpu():
    """One that is not known need not be a Hopper: None and a sequence take what all GPUs do."""
    for function in (attend, gradients):
        assert kernels(lowered(function, structs(), "cuda", implementation="mosaic_gpu"))[1] > 0
    for implementation in (None, ("mosaic_gpu", "xla")):
        for arrays in (structs(), LONG):
            text = lowered(gradients, arrays, "cuda", implementation=implementation)
            assert kernels(text) == (0, 0)
    with _jax_compat.use_abstract_device("NVIDIA H200", 132, "gpu", None):
        assert kernels(lowered(attend, structs(), "cuda"))[1] > 0


def test_only_what_it_is_lowered_for_is_traced(monkeypatch):
    def forward(*args, **options):
        pytest.fail("a kernel was traced")

    monkeypatch.setattr(mosaic_tpu, "forward", forward)
    for arrays in (structs(H=16), [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in LONG]):
        assert kernels(lowered(gradients, arrays, "cpu")) == (0, 0)


@pytest.mark.ci
def test_blocks_of_a_tpu_that_is_not_known_are_those_of_the_least():
    unknown = lowered(gradients, LONG, "tpu")
    with _jax_compat.use_abstract_device(_jax_compat.LEAST_TPU, 1, "tpu", None):
        assert lowered(gradients, LONG, "tpu", implementation="mosaic_tpu") == unknown
    with _jax_compat.use_abstract_device("TPU v5 lite", 1, "tpu", None):
        assert lowered(gradients, LONG, "tpu") != unknown


@pytest.mark.ci
def test_exported_for_several_platforms():
    def both(*arrays):
        return attend(*arrays), jax.vmap(attend)(*(x[None] for x in arrays))[0]

    found = jax.export.export(jax.jit(both), platforms=["cpu", "tpu"])(*structs(H=16))
    assert kernels(found.mlir_module())[0] == 2
    arrays = [
        jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(found.in_avals)
    ]
    for out, want in zip(found.call(*arrays), jax.jit(both)(*arrays), strict=True):
        np.testing.assert_allclose(out.astype(float), want.astype(float), atol=2e-2)
    with pytest.raises(NotImplementedError, match='"mosaic_tpu" needs a TPU.*lowered for cpu'):
        named = jax.jit(lambda *x: attend(*x, implementation="mosaic_tpu"))
        jax.export.export(named, platforms=["tpu", "cpu"])(*structs())


def in_scan(query, key, value):
    def layer(query, _):
        return attend(query, key, value), None

    return jax.lax.scan(jax.checkpoint(layer), query, length=3)[0].astype(jnp.float32).sum()


def over_rows(query, key, value):
    rows = (jnp.stack([x, x]) for x in (query, key, value))
    return jax.vmap(attend)(*rows).astype(jnp.float32).sum()


@pytest.mark.ci
@pytest.mark.parametrize("function, count", [(in_scan, 3), (over_rows, 2)])
def test_gradients_inside_of_transformations(function, count):
    """The forward kernel, in scan once more for the backward pass, and that of the gradients."""
    gradient = jax.grad(function, argnums=(0, 1, 2))
    assert kernels(lowered(gradient, LONG, "tpu"))[0] == count
    assert kernels(lowered(gradient, LONG, "cpu")) == (0, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_step_over_a_cache(dtype):
    cache = jax.eval_shape(lambda: DenseCache.create(1, 256, 1, 128, dtype=dtype))
    arrays = structs(T=1, H=128)
    step = jax.jit(lambda cache, *x: cache.extend(*x)).trace(cache, *arrays)
    assert kernels(step.lower(lowering_platforms=("tpu",)).as_text())[0] == 1
    assert kernels(step.lower(lowering_platforms=("cpu",)).as_text()) == (0, 0)


@pytest.mark.ci
@pytest.mark.parametrize("abstract", [False, True])
def test_inside_shard_map(abstract):
    """A mesh of CPUs stands for one of TPUs, and so does one of no devices."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mesh, spec = mesh.abstract_mesh if abstract else mesh, PartitionSpec("data")
    if abstract:
        mesh = mesh.update(abstract_device=None)
    own = jax.shard_map(gradients, mesh=mesh, in_specs=spec, out_specs=spec)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in structs()]
    assert kernels(lowered(own, arrays, "tpu"))[0] == 2


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an attached device may take it")
@pytest.mark.parametrize("name", ["mosaic_tpu", "mosaic_gpu", "mosaic"])
def test_a_named_kernel_is_refused_where_it_is_not_lowered_for_its_platform(name):
    arrays = [jnp.ones(x.shape, x.dtype) for x in structs()]
    words = f'implementation "{name}" .*needs .*'
    for function in (attend, jax.jit(gradients, static_argnames="implementation")):
        with pytest.raises(NotImplementedError, match=words):
            function(*arrays, implementation=name)
    for platform in ("cpu", "rocm", {"mosaic_tpu": "cuda", "mosaic_gpu": "tpu"}.get(name, "cpu")):
        with pytest.raises(NotImplementedError, match=words):
            lowered(attend, structs(), platform, implementation=name)
    (length,) = jax.export.symbolic_shape("t")
    with pytest.raises(
        NotImplementedError, match=f'"{name}" .*needs sizes that are known, got 1, t'
    ):
        jax.export.export(jax.jit(lambda *x: attend(*x, implementation=name)))(*structs(T=length))
    with pytest.raises(NotImplementedError, match="MiB of VMEM for its smallest blocks"):
        lowered(attend, structs(N=1021, K=1021, H=256), "tpu", implementation="mosaic_tpu")


@pytest.mark.ci
def test_derivatives_of_the_default_where_it_is_xla_alone():
    """The kernels of other platforms, which have fewer, stand beside it."""
    arrays = [jax.random.normal(jax.random.key(i), (1, 40, 2, 2)) for i in range(3)]

    def loss(query, implementation):
        return (attend(query, *arrays[1:], implementation=implementation) ** 2).sum()

    assert axattn.explain_implementations(*arrays).by_platform["tpu"] == "mosaic_tpu"
    for derivative in (
        jax.hessian,
        jax.jacfwd,
        lambda f: jax.grad(lambda q: jax.jvp(f, (q,), (q,))[1]),
    ):
        got, want = (
            jax.jit(derivative(lambda q, n=n: loss(q, n)))(arrays[0]) for n in (None, "xla")
        )
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e", "tpu7x", "h100", "h200"])
def test_explained_for_a_target(target):
    kernel = "mosaic_gpu" if target.startswith("h") else "mosaic_tpu"
    if kernel == "mosaic_gpu" and jax.__version_info__ < (0, 11):
        pytest.skip("the GPU kernels need jax >= 0.11")
    why = axattn.explain_implementations(*structs(), is_causal=True, target=target)
    assert why.chosen == kernel and why[kernel] is None and why["mosaic"] is None
    (other,) = {"mosaic_gpu", "mosaic_tpu"} - {kernel}
    if jax.__version_info__ >= (0, 11):  # else the GPU kernels ask for that first
        assert f"got {'NVIDIA' if kernel == 'mosaic_gpu' else 'TPU'}" in why[other]


def test_targets_without_kernels():
    for target, reason in {
        "a100": "got 8.0",
        "b200": "got 10.0",
        "cpu": "none is attached",
    }.items():
        why = axattn.explain_implementations(*LONG, target=target)
        assert why.chosen == "xla_chunked"
        if reason == "none is attached" or jax.__version_info__ >= (0, 11):
            assert reason in why["mosaic_gpu" if target != "cpu" else "mosaic_tpu"]
    big = axattn.explain_implementations(*structs(N=1021, K=1021, H=256), target="v5e")
    assert "MiB of VMEM" in big["mosaic_tpu"] and big.chosen != "mosaic_tpu"
    with pytest.raises(ValueError, match="target='v9' is unknown; it takes one of v4, v5e, v5p"):
        axattn.explain_implementations(*LONG, target="v9")
