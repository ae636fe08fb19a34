"""The TPU kernels under the TPU compiler, without a TPU: real shapes, VMEM and HBM."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import axattn
from axattn import aot
from tests.aot.compilers import need, releases_have_all
from tests.tiers import exhaustive

pytestmark = pytest.mark.aot

MiB = 2**20

CHIPS = ("v4", "v5e", "v5p", "v6e")

# Query heads, key/value heads, head sizes, and what is particular.
MODELS = {
    "Llama-3 8B": (32, 8, 128, 128, {}),
    "Llama-3 70B": (64, 8, 128, 128, {}),
    "Llama-3 405B": (128, 8, 128, 128, {}),
    "Gemma-2 9B": (16, 8, 256, 256, dict(logits_soft_cap=50.0, local_window_size=(4095, 0))),
    "Gemma-3 27B": (32, 16, 128, 128, dict(local_window_size=(1023, 0))),
    "Qwen2 7B": (28, 4, 128, 128, {}),
    "Qwen2 0.5B": (14, 2, 64, 64, {}),
    "Mistral 7B": (32, 8, 128, 128, dict(local_window_size=(4095, 0))),
    "Falcon 7B": (71, 1, 64, 64, {}),
    "gpt-oss": (64, 8, 64, 64, dict(local_window_size=(127, 0))),
    "Phi-2": (32, 32, 80, 80, {}),
    "DeepSeek-V3": (128, 128, 192, 128, {}),
}


def structs(B=1, T=8192, N=16, K=2, H=128, h=None, dtype=jnp.bfloat16):
    sizes = ((N, H), (K, H), (K, h or H))
    return [jax.ShapeDtypeStruct((B, T, *size), dtype) for size in sizes]


def gradients(attend):
    def run(q, k, v):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(out)

    return run


def causal(**options):
    return functools.partial(axattn.dot_product_attention, is_causal=True, **options)


def computed(attend):
    """``attend`` of a query that the program makes, so that heads come first."""
    return lambda q, k, v: attend(2 * q, k, v, is_projected=True)


def kernels(report) -> int:
    return report.hlo_text().count('custom_call_target="tpu_custom_call"')


# Groups and head sizes that differ; a v4 has the least VMEM.
QUICK = [
    ("Gemma-2 9B", "v4"),
    ("Falcon 7B", "v5e"),
    ("DeepSeek-V3", "v4"),
]


@releases_have_all("model, chip", QUICK, MODELS, CHIPS)
def test_models_compile_within_vmem(model, chip):
    """Forward and backward; every other one with queries that the program computes."""
    heads, kv_heads, head, value, options = MODELS[model]
    shapes = structs(T=4096, N=heads, K=kv_heads, H=head, h=value)
    attend = causal(**options)
    if (list(MODELS).index(model) + CHIPS.index(chip)) % 2:
        attend = computed(attend)
    report = aot.analyze(gradients(attend), *shapes, target=need(chip))
    assert report.ok, report
    assert kernels(report) in (2, 3)


@releases_have_all("dtype, chip", [("bfloat16", "v5p")], ("bfloat16", "float32"), ("v5p", "tpu7x"))
def test_all_features_compile(chip, dtype):
    T, S, N = 300, 500, 8

    def attend(q, k, v, bias, mask, sinks, slopes, lengths, offset, ids, kv_ids, key):
        return axattn.dot_product_attention(
            q,
            k,
            v,
            bias,
            mask,
            sinks=sinks,
            alibi_slopes=slopes,
            key_value_seq_lengths=lengths,
            q_offset=offset,
            query_segment_ids=ids,
            key_value_segment_ids=kv_ids,
            is_causal=True,
            local_window_size=(200, 0),
            logits_soft_cap=30.0,
            dropout_rate=0.1,
            dropout_rng=key,
            implementation="mosaic_tpu",
        )

    def run(q, k, v, bias, sinks, *rest):
        def of(q, k, v, bias, sinks):
            return attend(q, k, v, bias, rest[0], sinks, *rest[1:])

        out, pull = jax.vjp(of, q, k, v, bias, sinks)
        return pull(out)

    def like(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    arrays = [like(2, length, heads, 64, dtype=dtype) for length, heads in ((T, N), (S, 2), (S, 2))]
    more = [like(1, N, T, S, dtype=dtype), like(N, dtype=dtype), like(2, N, T, S, dtype=bool)]
    more += [like(N, dtype=jnp.float32), like(2), like(2), like(2, T), like(2, S)]
    key = jax.eval_shape(lambda: jax.random.key(0))
    report = aot.analyze(run, *arrays, *more, key, target=need(chip))
    assert report.ok, report
    assert kernels(report) >= 2


@pytest.mark.parametrize(
    "length, forward_mib, both_mib",
    [(8192, 24, 100), *exhaustive((32768, 96, 400))],
)
def test_memory(length, forward_mib, both_mib):
    """Queries and outputs are read and written as they are: only K and V are laid out anew."""
    target, shapes = need("v5p"), structs(T=length)
    forward = aot.analyze(causal(), *shapes, target=target)
    both = aot.analyze(gradients(causal()), *shapes, target=target)
    assert forward.ok and both.ok
    assert forward.temp_bytes <= forward_mib * MiB
    assert both.temp_bytes <= both_mib * MiB


@pytest.mark.parametrize(
    "heads, kv_heads, features",
    [(16, 2, 2048), *exhaustive((64, 8, 3072))],
)
def test_a_layer_has_no_copies(heads, kv_heads, features):
    """Projections write heads first, and the kernels read them so: nothing is laid out anew."""
    length, size = 4096, 128

    def layer(x, query, key, value, out):
        q, k, v = (jnp.einsum("bte,enh->btnh", x, kernel) for kernel in (query, key, value))
        attended = causal(is_projected=True)(q, k, v)
        return jnp.einsum("btnh,nhe->bte", attended, out)

    def both(*args):
        out, pull = jax.vjp(layer, *args)
        return out, pull(out)

    kernels_of = [(features, n, size) for n in (heads, kv_heads, kv_heads)]
    shapes = [(1, length, features), *kernels_of, (heads, size, features)]
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    copied = re.compile(rf"bf16\[(?:1,)?(?:{length},{heads}|{heads},{length}),{size}\]\S* copy\(")
    reports = [aot.analyze(run, *args, target=need("v5p")) for run in (layer, both)]
    for report in reports:
        assert report.ok, report
        assert not copied.findall(report.hlo_text())
    rows = length * heads * size * 2
    assert reports[0].temp_bytes < 3 * rows


def test_what_is_read_falls_with_the_group():
    """The same query heads with fewer key/value heads: each block is fetched once per group."""
    read = []
    for kv_heads in (16, 2, 1):
        report = aot.analyze(causal(), *structs(K=kv_heads), target=need("v5p"))
        assert 1 < report.flops / (2 * 2 * 16 * 128 * 8192**2 / 2) < 1.3
        read.append(report.bytes_accessed)
    assert read == sorted(read, reverse=True)
    rows = 2 * 16 * 8192 * 128 * 2
    assert read[0] - rows > 3 * (read[1] - rows)


@pytest.mark.exhaustive
def test_highest_precision():
    """By the argument, and by the context."""
    low, full = structs(T=1024), structs(T=1024, dtype=jnp.float32)
    assert aot.analyze(gradients(causal(precision="highest")), *low, target=need("v5p")).ok
    with jax.default_matmul_precision("highest"):
        assert aot.analyze(gradients(causal()), *full, target=need("v5p")).ok


def test_remat_scan_and_vmap():
    target = need("v5p")
    attend = causal(implementation="mosaic_tpu")

    def loss(q, k, v, scales):
        @jax.checkpoint
        def layer(x, scale):
            return attend(x * scale, k, v), None

        return jax.lax.scan(layer, q, scales)[0].astype(jnp.float32).sum()

    scales = jax.ShapeDtypeStruct((4,), jnp.bfloat16)
    args = structs(T=256)
    assert aot.analyze(jax.grad(loss, (0, 1, 2)), *args, scales, target=target).ok
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in args]
    assert aot.analyze(jax.vmap(gradients(attend)), *stacked, target=target).ok


@pytest.mark.exhaustive
def test_splash_is_called_as_it_should_be():
    """The peer of the benchmark."""
    from benchmarks.harness.baselines import splash

    attend = functools.partial(splash, is_causal=True)
    report = aot.analyze(gradients(attend), *structs(T=1024), target=need("v5p"))
    assert report.ok and kernels(report) == 3


def test_decode_steps_over_arrays_stay_with_xla():
    """They would have keys and values laid out anew for one token."""
    query, key, value = structs(T=1)[0], *structs()[1:]
    report = aot.analyze(axattn.dot_product_attention, query, key, value, target=need("v5p"))
    assert report.ok and not kernels(report)
