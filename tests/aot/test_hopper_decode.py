"""The Hopper decode kernels under NVIDIA's compiler, without a GPU: registers and HBM."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from axattn import aot
from axattn.cache import DenseCache, PagedCache, RingCache
from tests.aot.compilers import need, releases_have_all

pytestmark = [
    pytest.mark.aot,
    pytest.mark.hopper,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need jax >= 0.11"),
]

MiB = 2**20

# Mosaic keeps what it compiled and says nothing the second time: no two programs are alike.
_BATCHES = itertools.count(2)


def make(kind, B, S, K, H, page=64, **options):
    if kind == "dense":
        return jax.eval_shape(lambda: DenseCache.create(B, S, K, H, **options))
    if kind == "ring":
        return jax.eval_shape(lambda: RingCache.create(B, S - 512, K, H, max_append=512, **options))
    pages = S // page
    return jax.eval_shape(lambda: PagedCache.create(B, B * pages, page, pages, K, H, **options))


def analyzed(cache, target, N, T=1, **options):
    """The compiler's report on a step over such a cache."""
    query = jax.ShapeDtypeStruct((cache.batch, T, N, cache.head_dim), jnp.bfloat16)
    return aot.analyze(
        lambda cache, query: cache.attend(query, **options), cache, query, target=target
    )


def reports(kind, target="h200", N=8, K=2, H=128, T=1, S=1024, features=None, **options):
    """ptxas on the kernels of a step: none of them spills, none has serialized products."""
    from benchmarks.harness import ptxas, tile_compile

    tile_compile.prepare(need(target))
    cache = make(kind, next(_BATCHES), S, K, H, **options)
    with ptxas.captured() as texts:
        report = analyzed(cache, target, N, T, implementation="mosaic_gpu", **(features or {}))
    assert report.ok, report.refusal
    return {kernel.name: kernel for kernel in ptxas.parse(texts[0])}


def check(found, name, *, few=0):
    """``few``: bytes per thread that may be spilled all the same."""
    kernel = next(kernel for key, kernel in found.items() if key.startswith(name))
    if jax.__version_info__ < (0, 12):
        # An older Mosaic: latent decode of codes spills 4 to 16 bytes, their prefill at H=256 32.
        few = max(few, 32)
    assert max(kernel.spill_stores, kernel.spill_loads) <= few, kernel
    assert not kernel.serialized, kernel


KINDS = ("dense", "ring", "paged")
DTYPES = ("bfloat16", "int8", "float8_e4m3fn")
DECODED = [("dense", "bfloat16", 256), ("paged", "int8", 128), ("ring", "float8_e4m3fn", 64)]


@releases_have_all("kind, dtype, H", DECODED, KINDS, DTYPES, (64, 96, 128, 192, 256))
def test_decode_does_not_spill(kind, dtype, H):
    # Codes on their way through registers, besides 64 x 256 sums: a scalar or two too many.
    few = 20 if H == 256 and dtype != "bfloat16" else 0
    check(reports(kind, H=H, dtype=dtype), "axattn_decode", few=few)


FEATURES = {
    "capped": dict(logits_soft_cap=50.0, local_window_size=(512, 0), sinks=np.ones(8, np.float32)),
    "alibi": dict(alibi_slopes=np.ones(8, np.float32)),
    "tree": dict(mask=np.ones((1, 1, 8, 1024), bool)),
    "bias": dict(bias=np.ones((1, 8, 8, 1024), np.float32)),
    "fixed": dict(kv_split_size=256),
}


@releases_have_all(
    "dtype, feature", [("bfloat16", "capped"), ("int8", "bias")], ("bfloat16", "int8"), FEATURES
)
def test_features_do_not_spill(dtype, feature):
    options = dict(dtype=dtype, features=FEATURES[feature])
    check(reports("paged", T=8, page=16, **options), "axattn_decode")


LATENT = [("paged", "bfloat16", "plain"), ("dense", "float8_e4m3fn", "capped")]


@releases_have_all("kind, dtype, feature", LATENT, ("dense", "paged"), DTYPES, ("plain", "capped"))
def test_latent_decode_does_not_spill(kind, dtype, feature):
    features = dict(logits_soft_cap=30.0, local_window_size=(512, 0)) if feature == "capped" else {}
    options = dict(K=1, N=128, H=576, value_head_dim=512, values_in_keys=True, dtype=dtype)
    check(reports(kind, features=features, **options), "axattn_mla_decode")


PREFILLED = [(("dense", 64), "bfloat16", 256), (("paged", 16), "int8", 128)]
PAGES = (("dense", 64), ("ring", 64), ("paged", 64), ("paged", 16))


@releases_have_all("kind_and_page, dtype, H", PREFILLED, PAGES, DTYPES, (64, 128, 256))
def test_prefill_over_a_cache_does_not_spill(kind_and_page, dtype, H):
    kind, page = kind_and_page
    few = 24 if H == 256 and dtype != "bfloat16" and kind == "ring" else 0
    check(reports(kind, H=H, T=512, dtype=dtype, page=page), "axattn_forward", few=few)


@pytest.mark.exhaustive
def test_h100():
    check(reports("paged", "h100"), "axattn_decode")


SIZES_BETWEEN = ((16, 16), (48, 80), (80, 48), (112, 112), (144, 208), (192, 128))


@releases_have_all("H, h", [(80, 48)], SIZES_BETWEEN)
def test_other_head_sizes_compile(H, h):
    cache = make("paged", 2, 1024, 2, H, value_head_dim=h, page=16)
    assert analyzed(cache, need("h200"), 8, T=3, implementation="mosaic_gpu").ok


SIZES = {
    "dense": dict(kind="dense", B=8, S=32768, K=8, H=128),
    "paged": dict(kind="paged", B=8, S=32768, K=8, H=128),
    "ring": dict(kind="ring", B=8, S=32768, K=8, H=128),
    "int8": dict(kind="paged", B=8, S=32768, K=8, H=128, dtype="int8"),
    "float8": dict(kind="dense", B=8, S=32768, K=8, H=128, dtype="float8_e4m3fn"),
}


@releases_have_all("name", ["paged"], SIZES)
def test_none_takes_the_kernels_and_copies_nothing(name):
    """A step's temporaries are the results of splits; keys, values and scales are read in place."""
    cache = make(**SIZES[name])
    report = analyzed(cache, need("h200"), N=32)
    assert report.ok and report.hlo_text().count('custom_call_target="mosaic_gpu') == 2
    assert report.temp_bytes < 8 * MiB < cache.nbytes / 60
    if name == "paged":
        # Between one layer and the next a decode step launches little besides its two kernels.
        text = report.hlo_text()
        entry = text[text.index("ENTRY") :]
        assert entry.count(" fusion(") <= 4 and " while(" not in entry and " sort(" not in entry
    prefill = analyzed(cache, "h200", N=32, T=512)
    assert prefill.hlo_text().count('custom_call_target="mosaic_gpu') == 1
    assert prefill.temp_bytes < 40 * MiB


def test_decode_over_arrays():
    """Keys and values as a caller has them, with lengths: no copy with unused slots zeroed."""
    structs = [
        jax.ShapeDtypeStruct((8, n, heads, 128), jnp.bfloat16) for n, heads in ((1, 32), (32768, 8))
    ]
    lengths = jax.ShapeDtypeStruct((8,), jnp.int32)
    query, key = structs
    attend = functools.partial(axattn.dot_product_attention)
    report = aot.analyze(
        lambda q, k, v, n: attend(q, k, v, key_value_seq_lengths=n),
        query,
        key,
        key,
        lengths,
        target=need("h200"),
    )
    assert report.ok and "mosaic_gpu" in report.hlo_text()
    assert report.temp_bytes < 8 * MiB
