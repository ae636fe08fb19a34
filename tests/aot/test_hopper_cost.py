"""FLOPs and bytes of programs with the Hopper kernels, compiled for H200, against arithmetic."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

import axattn
from axattn import aot
from axattn.cache import DenseCache, PagedCache
from tests.aot.compilers import need

pytestmark = [
    pytest.mark.aot,
    pytest.mark.hopper,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need jax >= 0.11"),
]

B, T, H = 2, 1024, 64
# The diagonal's blocks count whole: how much of them is above it.
DIAGONAL = 1.2


def attend(causal):
    return functools.partial(
        axattn.dot_product_attention, is_causal=causal, implementation="mosaic_gpu"
    )


def gradients(fn):
    def run(q, k, v):
        out, pull = jax.vjp(fn, q, k, v)
        return out, pull(out)

    return run


def layers(fn, count):
    """As many layers in a loop, twice."""

    def run(q, k, v):
        def layer(x, _):
            return fn(x, k, v), None

        def stack(x, _):
            return jax.lax.scan(layer, x, None, count)[0], None

        return jax.lax.scan(stack, q, None, 2)[0]

    return run


def report(fn, *args):
    found = aot.analyze(fn, *args, target=need("h200"))
    assert found.ok, found
    if jax.__version_info__ < (0, 12):
        # No place for an estimate: FLOPs of the kernels are not claimed.
        assert found.cost_is_lower_bound
        assert "Mosaic GPU takes no estimate before jax 0.12" in found.notes[-1]
        pytest.skip("Mosaic GPU takes no estimate before jax 0.12")
    assert (found.notes, found.cost_is_lower_bound) == ((), False)
    return found


@pytest.mark.parametrize("N, K", [(8, 2), (4, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_forward_and_backward(causal, N, K):
    shapes = [jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (N, K, K)]
    product = 2 * B * N * T * T * H * (0.5 if causal else 1)
    most = DIAGONAL if causal else 1.001
    rows, keys = (2 * B * T * n * H for n in (N, K))

    forward = report(attend(causal), *shapes)
    assert product * 2 <= forward.flops <= product * 2 * most
    arrays = 2 * rows + 2 * keys
    assert arrays + 4 * B * N * T <= forward.bytes_accessed < 1.1 * arrays

    # Two products, three for the queries' gradient and four for those of keys and values.
    both = report(gradients(attend(causal)), *shapes)
    assert product * 9 <= both.flops <= product * 9 * most
    # Each kernel reads what it needs: queries, keys and values, and the output's gradient.
    arrays += (3 * rows + 2 * keys) + (2 * rows + 4 * keys)
    assert arrays < both.bytes_accessed < 2 * arrays


def test_layers_in_loops():
    shapes = [jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (4, 2, 2)]
    one = report(attend(True), *shapes)
    six = report(layers(attend(True), 3), *shapes)
    assert 6 * one.flops <= six.flops < 6.01 * one.flops
    assert six.bytes_accessed > 6 * one.bytes_accessed


SLOTS = 8192
CACHES = {
    "dense": (DenseCache, (4, SLOTS, 2, 128), "bfloat16", 256),
    "paged": (PagedCache, (4, 4 * SLOTS // 32, 64, SLOTS // 64, 2, 128), "int8", 132),
}


@pytest.mark.parametrize("name", CACHES)
def test_decode_counts_all_slots_of_the_batch(name):
    kind, sizes, dtype, slot = CACHES[name]
    cache = jax.eval_shape(lambda: kind.create(*sizes, dtype=dtype))
    query = jax.ShapeDtypeStruct((4, 1, 8, 128), jnp.bfloat16)
    found = report(lambda cache, q: cache.attend(q, implementation="mosaic_gpu"), cache, query)
    flops = 2 * 4 * 8 * SLOTS * (128 + 128)
    keys = 4 * 2 * SLOTS * 2 * slot
    # Besides that, splits are combined and written.
    assert flops <= found.flops < 1.05 * flops
    assert keys <= found.bytes_accessed < 1.3 * keys


def test_latent_decode_reads_keys_only():
    options = dict(value_head_dim=512, values_in_keys=True, dtype="bfloat16")
    cache = jax.eval_shape(
        lambda: PagedCache.create(4, SLOTS // 16, 64, SLOTS // 64, 1, 576, **options)
    )
    query = jax.ShapeDtypeStruct((4, 1, 16, 576), jnp.bfloat16)
    found = report(lambda cache, q: cache.attend(q, implementation="mosaic_gpu"), cache, query)
    flops = 2 * 4 * 16 * SLOTS * (576 + 512)
    keys = 4 * SLOTS * 2 * 576
    assert flops <= found.flops < 1.05 * flops
    assert keys <= found.bytes_accessed < 2 * keys
