"""Which calls go to the kernels, and what the others are told."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from axattn import _jax_compat
from axattn._arguments import normalize_over_cache
from axattn._implementations import mosaic_gpu
from axattn._options import AttentionOptions
from axattn.cache import DenseCache, PagedCache
from tests.kernels.calls import REFUSED, make_call, shapes

# What CUDA's programming guide says of compute capability 9.0, for one block of threads.
SHARED_BYTES = 227 * 1024


def test_none_takes_the_kernels_on_hopper(hopper):
    why = axattn.explain_implementations(*shapes(), is_causal=True)
    assert why["mosaic_gpu"] is None and why["mosaic"] is None
    # The others take the other flash path, so that both keep the same residuals.
    assert why.by_platform == {
        **dict.fromkeys(("cpu", "rocm", "tpu"), "xla_chunked"),
        "cuda": "mosaic_gpu",
    }


@pytest.mark.parametrize("T, N", [(1, 8), (1, 128), (16, 64)])
def test_decode_and_speculative_steps(hopper, T, N):
    """Over many keys the decode kernel; over few, one program of XLA's costs less than four."""
    assert axattn.explain_implementations(*shapes(T=T, N=N)).by_platform["cuda"] == "mosaic_gpu"
    few = axattn.explain_implementations(*shapes(T=T, S=1016, N=N))
    assert few["mosaic_gpu"] is None and few.by_platform["cuda"] != "mosaic_gpu"


def test_a_ptxas_that_miscompiles(hopper, monkeypatch):
    monkeypatch.setattr(_jax_compat, "read_cuda_runtime_version", lambda: 12080)
    why = axattn.explain_implementations(*shapes())
    assert "got 12080" in why["mosaic_gpu"] and why.by_platform["cuda"] == "xla_chunked"


@pytest.mark.parametrize(
    "reason, arguments, options",
    [
        ("float32", dict(dtype=jnp.float32), {}),
        ("head size that is a multiple of 16 and at most 256, got 72", dict(H=72), {}),
        ("value head size that is a multiple of 16 and at most 256, got 512", dict(h=512), {}),
        *REFUSED,
    ],
)
def test_refusals(hopper, reason, arguments, options):
    why = axattn.explain_implementations(*shapes(**arguments), **options)
    assert reason in why["mosaic_gpu"]
    assert why.by_platform["cuda"] != "mosaic_gpu"


def test_a_named_request_without_the_device_says_what_it_needs():
    q, k, v = (jnp.zeros(x.shape, x.dtype) for x in shapes(T=8, S=8))
    with pytest.raises(NotImplementedError, match='"mosaic_gpu" needs a Hopper GPU'):
        axattn.dot_product_attention(q, k, v, implementation="mosaic_gpu")


@pytest.mark.parametrize("kind, capability", [("NVIDIA A100-SXM4-80GB", "8.0"), ("B200", "10.0")])
def test_other_gpus(kind, capability):
    with _jax_compat.use_abstract_device(kind, 100, "gpu", capability):
        why = axattn.explain_implementations(*shapes())
    assert why["mosaic_gpu"] == f"needs a Hopper GPU (compute capability 9.0), got {capability}"


def cache_call(T=1, N=8, K=2, H=128, query_dtype=jnp.bfloat16, kind="dense", **options):
    slots = options.pop("slots", 64)
    if kind == "paged":
        stored = PagedCache.create(1, 4, slots, 4, K, H, **options).stored()
    else:
        stored = DenseCache.create(1, slots, K, H, **options).stored()
    query = jnp.zeros((1, T, N, H), query_dtype)
    return normalize_over_cache(query, stored, AttentionOptions(is_causal=True))


@pytest.mark.parametrize(
    "kernel, options",
    [
        ("decode", {}),
        ("decode", dict(T=16, kind="paged", dtype="int8")),
        ("decode", dict(dtype=jnp.float16, query_dtype=jnp.float16)),
        ("forward", dict(T=17, dtype="float8_e4m3fn")),
        ("forward", dict(T=512, kind="paged", slots=16)),
        ("latent", dict(K=1, H=576, value_head_dim=512, values_in_keys=True)),
        ("latent", dict(T=20, K=1, H=576, value_head_dim=512, values_in_keys=True, dtype="int8")),
    ],
)
def test_the_kernel_for_a_cache(kernel, options):
    call = cache_call(**options)
    assert mosaic_gpu.find_call_refusal(call) is None
    assert mosaic_gpu.choose_kernel(call) == kernel


@pytest.mark.parametrize(
    "reason, options",
    [
        ("a cache of int4", dict(dtype="int4")),
        ("in the dtype of the cache, float16, got bfloat16", dict(dtype=jnp.float16)),
        ("needs float16 or bfloat16, got float32", dict(query_dtype=jnp.float32)),
        ("a bfloat16 query over a quantized cache", dict(query_dtype=jnp.float16, dtype="int8")),
        ("multiples of 32 in a quantized cache, got (80, 80)", dict(H=80, dtype="int8")),
        ("slots of a row in a multiple of 8, got 60", dict(slots=60)),
        ("slots of a page in a multiple of 8, got 4", dict(slots=4, kind="paged")),
        ("at most 576", dict(K=1, H=640, value_head_dim=512, values_in_keys=True)),
        (
            "at most 2048 query rows (tokens times heads of a group), got 4096",
            dict(T=32, N=128, K=1, H=576, value_head_dim=512, values_in_keys=True),
        ),
        ("got 128 and 64", dict(K=1, H=128, value_head_dim=64, values_in_keys=True)),
    ],
)
def test_caches_that_are_refused(reason, options):
    assert reason in mosaic_gpu.find_call_refusal(cache_call(**options))


def test_none_takes_the_kernels_over_a_cache(hopper):
    cache = DenseCache.create(1, 64, 2, 128, dtype="int8")
    query = jax.ShapeDtypeStruct((1, 1, 8, 128), jnp.bfloat16)
    why = cache.explain_implementations(query)
    assert why.by_platform["cuda"] == "mosaic_gpu" and why.by_platform["cpu"] == "xla_chunked"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("extras", [{}, dict(bias=np.zeros((1, 8, 1, 256), np.float32))])
def test_block_sizes_of_decode_fit(dtype, extras):
    """Something always fits; for one head size, two warpgroups that take turns."""
    fitting = pytest.importorskip("axattn.kernels._hopper.fitting", exc_type=ImportError)
    from axattn.kernels._hopper.kv_loader import KVLoader
    from axattn.kernels._hopper.primitives import count_shared_bytes
    from axattn.kernels._hopper.split_kv.decode import declare_decode_scratch

    for H in range(32, 257, 32):
        for h in range(32, 257, 32):
            stored = DenseCache.create(1, 256, 2, H, value_head_dim=h, dtype=dtype).stored()
            query = jnp.zeros((1, 1, 8, H), jnp.bfloat16)
            call = normalize_over_cache(query, stored, AttentionOptions(**extras))
            sizes = fitting.choose_decode_block_sizes(call)
            scratch = declare_decode_scratch(
                sizes,
                KVLoader.from_call(call),
                H,
                h,
                dtype=jnp.bfloat16,
                score_dtypes={"bias": jnp.float32} if extras else {},
            )
            needed = count_shared_bytes(scratch)
            assert needed <= SHARED_BYTES, (H, h, sizes)
            assert sizes.warpgroups == 2 or extras or H != h, (H, h, sizes)


@pytest.mark.parametrize("kind", ["full", "biased"])
def test_all_head_sizes_have_block_sizes_that_fit(kind):
    fitting = pytest.importorskip("axattn.kernels._hopper.fitting", exc_type=ImportError)
    options = dict(bias=np.zeros((1, 1, 24, 40))) if kind == "biased" else {}
    for H in range(16, 257, 16):
        for h in range(16, 257, 16):
            call = make_call(1, 24, 40, 2, 2, H, h, **options)
            backward = fitting.choose_backward_block_sizes(call)
            for kernel, sizes in (
                ("forward", fitting.choose_forward_block_sizes(call)),
                ("query_grad", backward.query),
                ("key_grad", backward.key),
            ):
                used = fitting.count_flash_bytes(kernel, sizes, H, h, score_tiles=kind == "biased")
                assert used <= SHARED_BYTES, (kernel, H, h, sizes)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("full", {}),
        ("masked", dict(is_causal=True)),
        ("masked", dict(mask=np.ones((1, 1, 1, 40), bool))),
        ("capped", dict(is_causal=True, logits_soft_cap=5.0)),
        ("general", dict(alibi_slopes=np.ones(4))),
        ("general", dict(bias=np.zeros((1, 1, 1, 40)))),
        ("general", dict(dropout_rate=0.1, dropout_rng=jax.random.key(0))),
        ("biased", dict(bias=np.zeros((1, 1, 24, 40)))),
        ("biased", dict(mask=np.ones((24, 40), bool), logits_soft_cap=5.0)),
    ],
)
def test_kinds(kind, options):
    block_sizes = pytest.importorskip("axattn.kernels._hopper.block_sizes", exc_type=ImportError)
    assert block_sizes.classify_call(make_call(1, 24, 40, 4, 2, 64, **options)) == kind
