"""JAX's own ways of compiling over a topology's devices, beside `axattn.aot`."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from axattn import aot
from axattn.aot._targets import describe_device
from tests.aot.compilers import need
from tests.test_lowering import attend, gradients, hopper, kernels, structs

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("name", [n for n in aot.TARGETS if n != "cpu"])
def test_what_traced_code_is_told_is_what_the_compiler_says(name):
    device, told = aot.device(aot.target(need(name))), describe_device(aot.target(name))
    if name.startswith(("v", "tpu")):
        assert told == (device.device_kind, device.num_cores, "tpu", None)
    else:
        assert told == (device.device_kind, device.core_count, "gpu", device.compute_capability)


@pytest.mark.parametrize(
    "name, function", [("v5e", gradients), pytest.param("h200", attend, marks=hopper)]
)
def test_the_same_memory_as_by_aot(name, function):
    report = aot.analyze(lambda *x: function(*x), *structs(T=64), target=need(name))
    sharding = SingleDeviceSharding(aot.device(aot.target(name)))
    jitted = jax.jit(lambda *x: function(*x), in_shardings=sharding)
    compiled = jitted.lower(*structs(T=64)).compile()
    assert sum(kernels(report.hlo_text().replace('target="', "@"))) > 0
    found = compiled.memory_analysis()
    assert found.temp_size_in_bytes == report.temp_bytes
    assert compiled.as_text().count("custom-call(") == report.hlo_text().count("custom-call(")


@pytest.mark.parametrize(
    "name, count",
    [("v6e", (1, 0)), pytest.param("h100", (0, 3), marks=hopper), ("a100", (0, 0))],
)
def test_arrays_over_a_mesh_of_a_topology(name, count):
    mesh = Mesh(np.array([aot.device(aot.target(need(name)))]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in structs()]
    found = kernels(jax.jit(lambda *x: attend(*x)).lower(*arrays).as_text())
    assert [n > 0 for n in found] == [n > 0 for n in count]


def test_what_was_exported_for_any_tpu_compiles_for_each():
    found = jax.export.export(jax.jit(lambda *x: gradients(*x)), platforms=["tpu"])(*structs())
    for name in ("v4", "v5e", "v5p", "v6e", "tpu7x"):
        sharding = SingleDeviceSharding(aot.device(aot.target(need(name))))
        program = jax.jit(found.call, in_shardings=sharding).lower(*structs()).compile()
        assert kernels(program.as_text().replace('custom_call_target="', "@"))[0] == 2
