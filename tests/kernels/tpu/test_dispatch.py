"""Which calls go to the kernels, and what the others are told."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import axattn
from axattn import _jax_compat
from axattn.cache import DenseCache
from tests.kernels.calls import REFUSED, shapes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_none_takes_the_kernels_on_a_tpu(tpu, dtype):
    why = axattn.explain_implementations(*shapes(dtype=dtype), is_causal=True)
    assert why["mosaic_tpu"] is None and why["mosaic"] is None
    # The others take the other flash path, so that both keep the same residuals.
    assert why.by_platform == {
        **dict.fromkeys(("cpu", "rocm", "cuda"), "xla_chunked"),
        "tpu": "mosaic_tpu",
    }


def test_decode_over_arrays_stays_with_xla(tpu):
    why = axattn.explain_implementations(*shapes(T=1, S=8192))
    assert why["mosaic_tpu"] is None and why.by_platform["tpu"] == "xla"


@pytest.mark.parametrize("T", [1, 16, 300])
def test_a_cache_goes_to_the_kernels(tpu, T):
    cache = jax.eval_shape(lambda: DenseCache.create(2, 1024, 2, 128, dtype=jnp.int8))
    query = jax.ShapeDtypeStruct((2, T, 8, 128), jnp.bfloat16)
    why = cache.explain_implementations(query)
    assert why["mosaic_tpu"] is None and why.by_platform["tpu"] == "mosaic_tpu"


@pytest.mark.parametrize(
    "reason, arguments, options",
    [
        ("bfloat16 or float32, got float16", dict(dtype=jnp.float16), {}),
        ("head size of at most 256, got 512", dict(H=512), {}),
        ("value head size of at most 256, got 512", dict(h=512), {}),
        *REFUSED,
        ("MiB of VMEM for its smallest blocks", dict(N=1021, K=1021, H=256), {}),
    ],
)
def test_refusals(tpu, reason, arguments, options):
    why = axattn.explain_implementations(*shapes(**arguments), **options)
    assert reason in why["mosaic_tpu"]
    assert why.by_platform["tpu"] != "mosaic_tpu"


def test_a_named_request_without_the_device_says_what_it_needs():
    q, k, v = (jnp.zeros(x.shape, x.dtype) for x in shapes(T=8, S=8))
    with pytest.raises(NotImplementedError, match='"mosaic_tpu" needs a TPU .v4 or later., and'):
        axattn.dot_product_attention(q, k, v, implementation="mosaic_tpu")


def test_an_older_tpu():
    with _jax_compat.use_abstract_device("TPU v3", 1, "tpu", None):
        why = axattn.explain_implementations(*shapes())
    assert why["mosaic_tpu"] == "needs a TPU v4 or later, got TPU v3"


def test_a_tpu_that_jax_does_not_know():
    with _jax_compat.use_abstract_device("TPU v99", 1, "tpu", None):
        why = axattn.explain_implementations(*shapes())
    assert "needs a TPU" in why["mosaic_tpu"]
