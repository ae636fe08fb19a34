"""The Hopper kernels under NVIDIA's compiler, without a GPU: registers, shared memory and HBM."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

import axattn
from axattn import aot
from tests.aot.compilers import need, releases_have_all

pytestmark = [
    pytest.mark.aot,
    pytest.mark.hopper,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need jax >= 0.11"),
]

KERNELS = ("forward", "query_grad", "key_grad")
KINDS = ("full", "masked", "capped", "general", "biased")
HEADS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
# Of the table's rows, all kernels and kinds, and the heads that have most registers.
QUICK = [
    ("forward", "biased", (128, 128)),
    ("forward", "full", (256, 256)),
    ("query_grad", "general", (128, 128)),
    ("query_grad", "masked", (192, 128)),
    ("key_grad", "capped", (128, 128)),
    ("key_grad", "masked", (64, 64)),
]

MiB = 2**20


@pytest.fixture(params=["h200"])
def target(request):
    return need(request.param)


def compiled_row(kernel, kind, sizes, target, dtype="bfloat16"):
    """ptxas on the kernel with the tiles that the table has for such a call."""
    from benchmarks.harness import tile_calls, tile_candidates, tile_compile, tile_table

    tile_compile.prepare(target)
    place = tile_candidates.Place(kernel, kind, *sizes)
    own = tile_table.tiles_of(place)
    assert tile_candidates.shared_bytes(place, own) <= tile_candidates.SHARED_BYTES
    found, refusal = tile_compile.compile_call(place, own, tile_calls.TYPICAL[kind], target)
    assert refusal is None, (own, refusal)
    return own, found


@releases_have_all("kernel, kind, sizes", QUICK, KERNELS, KINDS, HEADS)
def test_no_row_of_the_table_spills(target, kernel, kind, sizes):
    own, found = compiled_row(kernel, kind, sizes, target)
    assert (found.spill_stores, found.spill_loads) == (0, 0), (own, found)
    assert not found.serialized, (own, found)


def test_kinds():
    from axattn.kernels._hopper import block_sizes

    assert set(KINDS) == set(block_sizes.KINDS)


@releases_have_all("kernel", ["forward"], KERNELS)
def test_h100(kernel):
    own, found = compiled_row(kernel, "masked", (128, 128), need("h100"))
    assert (found.spill_stores, found.serialized) == (0, False), own


def structs(B=1, T=8192, N=16, K=2, H=128, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((B, T, heads, H), dtype) for heads in (N, K, K)]


def gradients(attend):
    def run(q, k, v):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(out)

    return run


def test_none_takes_the_kernels_and_needs_no_memory(target):
    """Temporaries are the LSE and bounds per row; nothing has the size of N heads of keys."""
    attend = functools.partial(axattn.dot_product_attention, is_causal=True)
    both = aot.analyze(gradients(attend), *structs(), target=target)
    assert both.ok, both
    assert both.hlo_text().count('custom_call_target="mosaic_gpu') == 3
    assert both.temp_bytes < 4 * MiB
    size = 2 * 8192 * 128
    assert both.output_bytes < (2 * 16 + 2 * 2) * size + MiB  # out, dq, dk, dv


def test_remat_and_scan(target):
    attend = functools.partial(axattn.dot_product_attention, implementation="mosaic_gpu")

    def loss(q, k, v, scales):
        @jax.checkpoint
        def layer(x, scale):
            return attend(x * scale, k, v, is_causal=True), None

        return jax.lax.scan(layer, q, scales)[0].astype(jnp.float32).sum()

    scales = jax.ShapeDtypeStruct((4,), jnp.bfloat16)
    assert aot.analyze(jax.grad(loss, (0, 1, 2)), *structs(T=256), scales, target=target).ok


@pytest.mark.exhaustive
def test_vmap(target):
    attend = functools.partial(axattn.dot_product_attention, implementation="mosaic_gpu")
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in structs(T=256)]
    assert aot.analyze(jax.vmap(gradients(attend)), *stacked, target=target).ok


@releases_have_all("H", [80], (16, 48, 80, 112, 144, 208))
def test_head_sizes_between_the_rows_of_the_table(target, H):
    attend = functools.partial(
        axattn.dot_product_attention, is_causal=True, implementation="mosaic_gpu"
    )
    assert aot.analyze(gradients(attend), *structs(T=200, H=H), target=target).ok


def test_other_gpus_do_not_take_them():
    q, k, v = structs(T=4096)
    report = aot.analyze(axattn.dot_product_attention, q, k, v, target=need("b200"))
    assert report.ok and "mosaic_gpu" not in report.hlo_text()
    with pytest.raises(NotImplementedError, match="compute capability 9.0"):
        with aot.tracing_for("b200"):
            jax.eval_shape(
                functools.partial(axattn.dot_product_attention, implementation="mosaic_gpu"),
                q,
                k,
                v,
            )
