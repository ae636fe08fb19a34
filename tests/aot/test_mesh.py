"""Meshes of absent chips, and programs that are shared out over them."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from axattn import _jax_compat, aot
from axattn.aot._meshes import make_grid_ring
from tests.aot.compilers import need


@pytest.mark.parametrize("sizes", [(2, 2), (4, 4, 4), (3, 4), (2, 3, 5), (4, 8, 8), (2, 1, 2)])
def test_a_ring_through_a_grid(sizes):
    ring = make_grid_ring(sizes)
    assert sorted(ring) == sorted(itertools.product(*map(range, sizes)))
    for one, other in zip(ring, [*ring[1:], ring[0]], strict=True):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) == 1


@pytest.mark.parametrize("sizes", [(5,), (3, 3), (3, 1, 5)])
def test_where_there_is_no_ring_there_is_a_path(sizes):
    path = make_grid_ring(sizes)
    assert sorted(path) == sorted(itertools.product(*map(range, sizes)))
    for one, other in itertools.pairwise(path):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) == 1


def test_slices_are_of_so_many_devices():
    for chip in aot.TARGETS.values():
        for count, topology in chip.slices.items():
            devices = math.prod(map(int, topology.partition(":")[2].split("x")))
            assert count == devices * (2 if chip.name == "tpu7x" else 1), topology
        # One way, over all links: what one neighbour gets is a share of it.
        assert (chip.ici_bandwidth is None) == (chip.platform == "cpu")


def test_what_meshes_do_not_take():
    with pytest.raises(ValueError, match="got 3"):
        aot.mesh("v5p", {"context": 3})
    with pytest.raises(ValueError, match="1, 4, 8, 16, 32, 64, 128, 256; got 512"):
        aot.mesh("v6e", {"data": 2, "context": 256})
    with pytest.raises(ValueError, match="takes a TPU for a mesh, got 'h200'"):
        aot.mesh("h200", {"context": 8})
    with pytest.raises(ValueError, match="sizes of at least 1"):
        aot.mesh("v5p", {"context": 0})
    with pytest.raises(ValueError, match="at most"):
        aot.mesh("cpu", {"context": 10_000})


def squares(mesh):
    def run(x, w):
        return jnp.sum((x @ w) ** 2)

    tokens = NamedSharding(mesh, PartitionSpec("context"))
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=tokens)
    return jax.grad(run, 1), x, jax.ShapeDtypeStruct((256, 256), jnp.float32)


def test_figures_are_per_device():
    """Here of the CPU devices of this process."""
    fn, x, w = squares(aot.mesh("cpu", {"context": 4}))
    report = aot.analyze(fn, x, w, target="cpu")
    assert report.num_devices == 4 and "one of 4" in str(report)
    # A quarter of x, and w, which says nothing of where it is, on each.
    assert report.argument_bytes == 4 * (x.size // 4 + w.size)
    (found,) = report.collectives
    assert found.kind == "all-reduce" and found.count == 1
    assert found.sent_bytes == report.sent_bytes == 2 * 3 / 4 * 4 * w.size
    assert report.to_dict()["collectives"] == [
        {"kind": "all-reduce", "count": 1, "sent_bytes": found.sent_bytes}
    ]
    assert report.flops == pytest.approx(2 * 2 * 256 * 256 * 256, rel=0.1)


def test_one_device_sends_nothing():
    report = aot.analyze(lambda x: x + 1, jnp.ones(8), target="cpu")
    assert report.num_devices == 1 and report.collectives == () and report.sent_bytes == 0


@pytest.mark.aot
@pytest.mark.parametrize(
    "target, axes, linked",
    [
        ("v5p", {"context": 64}, ("context",)),
        ("v5p", {"data": 1, "model": 4, "context": 16}, ("context",)),
        ("v6e", {"context": 64}, ("context",)),
        ("v4", {"context": 4}, ("context",)),
    ],
)
def test_neighbours_on_an_axis_are_linked(target, axes, linked):
    mesh = aot.mesh(need(target), axes)
    assert dict(mesh.shape) == axes
    assert len({d.id for d in mesh.devices.flat}) == math.prod(axes.values())
    for name in linked:
        lines = np.moveaxis(mesh.devices, list(axes).index(name), -1)
        for line in lines.reshape(-1, axes[name]):
            for one, other in zip(line, np.roll(line, -1), strict=True):
                steps = [abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)]
                assert sum(steps) == 1


@pytest.mark.aot
def test_a_mesh_is_of_the_same_devices_each_time():
    one, other = (aot.mesh(need("v5p"), {"context": 4}) for _ in range(2))
    assert one == other and one.devices[0] is other.devices[0]


@pytest.mark.aot
def test_kernels_know_the_chip_inside_shard_map():
    mesh, seen = aot.mesh(need("v6e"), {"context": 4}), []

    def look(x):
        seen.append(_jax_compat.find_tpu_chip())
        return 2 * x

    spec = PartitionSpec("context")
    fn = jax.shard_map(look, mesh=mesh, in_specs=spec, out_specs=spec)
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, spec))
    report = aot.analyze(fn, x, target="v6e")
    assert report.ok and report.num_devices == 4
    assert seen[0].kind == "TPU v6 lite" and seen[0].generation == 6


@pytest.mark.aot
def test_a_mesh_of_the_context_stays():
    mesh = aot.mesh(need("v5p"), {"context": 4})

    def run(x):
        return jax.shard_map(
            lambda x: jax.lax.psum(x, "context"),
            in_specs=PartitionSpec("context"), out_specs=PartitionSpec(),
        )(x)  # fmt: skip

    x = jax.ShapeDtypeStruct(
        (8, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("context"))
    )
    with jax.set_mesh(mesh):
        report = aot.analyze(run, x, target="v5p")
    assert report.ok, report
    assert [c.kind for c in report.collectives] == ["all-reduce"]
