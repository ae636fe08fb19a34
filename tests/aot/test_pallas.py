"""Pallas kernels for absent chips: Mosaic TPU and Mosaic GPU go through `analyze` too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from axattn import aot
from tests.aot.compilers import analyze, need

pytestmark = pytest.mark.aot


def increment(x, rows=128, cost=None):
    def body(x_ref, o_ref):
        o_ref[...] = x_ref[...] + 1

    block = pl.BlockSpec((rows, x.shape[1]), lambda i: (i, 0))
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0] // rows,),
        in_specs=[block],
        out_specs=block,
        cost_estimate=cost,
    )(x)


X = jax.ShapeDtypeStruct((1024, 128), jnp.float32)


@pytest.mark.parametrize("name", ["v4", "v6e"])
def test_mosaic_tpu(name):
    r = analyze(increment, X, target=name)
    assert r.ok, r
    assert "tpu_custom_call" in r.hlo_text()
    assert (r.argument_bytes, r.output_bytes) == (X.size * 4, X.size * 4)
    assert r.flops is None
    assert "kernels without a cost estimate" in r.notes[0]


def test_the_cost_estimate_of_a_kernel_counts():
    cost = pl.CostEstimate(flops=12345, bytes_accessed=777, transcendentals=0)
    r = analyze(lambda x: increment(x, cost=cost), X, target="v5p")
    assert (r.flops, r.bytes_accessed, r.notes) == (12345, 777, ())


def test_the_cost_estimate_of_a_kernel_counts_as_often_as_a_loop_runs():
    cost = pl.CostEstimate(flops=10**9, bytes_accessed=10**10, transcendentals=0)

    def loop(x):
        def twice(x, _):
            return jax.lax.scan(lambda x, _: (increment(x, cost=cost), None), x, None, 2)[0], None

        return jax.lax.scan(twice, increment(x, cost=cost), None, 5)[0]

    r = analyze(loop, X, target="v5p")
    assert r.flops == pytest.approx(11 * 10**9, rel=1e-3)
    assert r.bytes_accessed == pytest.approx(11 * 10**10, rel=1e-2)


def test_a_block_larger_than_vmem_is_a_refusal():
    x = jax.ShapeDtypeStruct((65536, 1024), jnp.float32)
    r = analyze(lambda x: increment(x, rows=65536), x, target="v5p")
    assert (r.refusal.kind, r.refusal.memory) == ("out_of_memory", "vmem")
    assert r.refusal.requested_bytes > r.refusal.available_bytes > 0


# --- Mosaic GPU ---

recent = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU kernels need jax >= 0.11"
)


def wgmma(a, b):
    """a @ b for [64, 64] and [64, 128] float16 on a Hopper tensor core."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(a_gmem, b_gmem, o_gmem, a_smem, b_smem, o_smem, barriers):
        plgpu.copy_gmem_to_smem(a_gmem, a_smem, barriers.at[0])
        plgpu.copy_gmem_to_smem(b_gmem, b_smem, barriers.at[1])
        plgpu.barrier_wait(barriers.at[0])
        plgpu.barrier_wait(barriers.at[1])

        def multiply(acc):
            plgpu.wgmma(acc, a_smem, b_smem)
            return acc[...]

        product = pl.run_scoped(multiply, plgpu.ACC((64, 128), jnp.float32))
        o_smem[...] = product.astype(jnp.float16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_smem, o_gmem)
        plgpu.wait_smem_to_gmem(0)

    def smem(*shape):
        tiles = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
        return plgpu.SMEM(shape, jnp.float16, transforms=tiles)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((64, 128), jnp.float16),
        grid=(1,),
        grid_names=("i",),
        scratch_types=[smem(64, 64), smem(64, 128), smem(64, 128), plgpu.Barrier(num_barriers=2)],
    )(a, b)


A = jax.ShapeDtypeStruct((64, 64), jnp.float16)
B = jax.ShapeDtypeStruct((64, 128), jnp.float16)


@recent
@pytest.mark.parametrize("name", ["h100"])
def test_mosaic_gpu_on_hopper(name):
    r = analyze(wgmma, A, B, target=name)
    assert r.ok, r
    assert "mosaic_gpu" in r.hlo_text()
    assert (r.argument_bytes, r.output_bytes) == (3 * 64 * 64 * 2 + 0, 64 * 128 * 2)


@recent
def test_hopper_instructions_are_refused_for_blackwell(capfd):
    r = analyze(wgmma, A, B, target="b200")
    assert r.refusal.kind == "compiler_error"
    # Before jax 0.12 the reason is on stderr only.
    assert "sm_100a" in r.refusal.message + capfd.readouterr().err


@recent
def test_too_much_shared_memory_is_a_refusal():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def f(x):
        def body(x_ref, o_ref, scratch):
            o_ref[...] = x_ref[...] + 1

        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
            grid=(1,),
            grid_names=("i",),
            scratch_types=[plgpu.SMEM((512, 1024), jnp.float32)],
        )(x)

    r = analyze(f, jax.ShapeDtypeStruct((128, 128), jnp.float32), target="h200")
    assert (r.refusal.kind, r.refusal.memory) == ("out_of_memory", "smem")
    assert (r.refusal.requested_bytes, r.refusal.available_bytes) == (512 * 1024 * 4, 232448)


@pytest.mark.parametrize("name, cores", [("v5p", 2), ("v6e", 1), ("h200", 132), ("b200", 148)])
def test_tracing_for_a_target(name, cores):
    with aot.tracing_for(need(name)):
        device = jax.sharding.get_abstract_mesh().abstract_device
        assert device.num_cores == cores
        assert device.platform == ("tpu" if name.startswith("v") else "gpu")
        if not name.startswith("v"):
            assert device.compute_capability == {"h200": "9.0", "b200": "10.0"}[name]
    with aot.tracing_for("cpu"):
        assert jax.sharding.get_abstract_mesh().abstract_device is None
