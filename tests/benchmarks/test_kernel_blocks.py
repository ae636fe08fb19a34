"""Blocks of kernels for chips that are not here, and a kernel in the interpreter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from axattn import aot
from benchmarks.harness import inputs, interpreted, kernel_blocks, tpu_blocks
from tests.aot.compilers import need

SHAPES = tuple(jax.ShapeDtypeStruct((1, 4096, n, 128), jnp.bfloat16) for n in (16, 2, 2))


def test_the_kernels_take_what_they_would_take_there():
    for chip in ("v4", "v5p", "v6e"):
        found = kernel_blocks.forward(chip, *SHAPES, is_causal=True)
        (taken,) = (c for c in tpu_blocks.candidates(chip, *SHAPES, is_causal=True) if c.taken)
        assert found == (taken.block_q, taken.block_kv) and taken.fits
    # Two warpgroups of 64 rows.
    assert kernel_blocks.forward("h200", *SHAPES, is_causal=True) == (128, 128)
    q, kv = kernel_blocks.forward("cpu", *SHAPES, is_causal=True)
    assert 1 <= q <= 4096 and 1 <= kv <= 4096


def test_the_best_of_what_fits_is_taken():
    found = tpu_blocks.candidates("v4", *SHAPES, is_causal=True)
    taken = next(one for one in found if one.taken)
    assert taken.seconds == min(one.seconds for one in found if one.fits)
    assert any(not one.fits for one in found)


def test_grid():
    found = [
        tpu_blocks.Candidate(8, 128, 2**20, 2e-3, True, False),
        tpu_blocks.Candidate(16, 128, 2**21, 1e-3, True, True),
        tpu_blocks.Candidate(16, 256, 2**27, 5e-4, False, False),
    ]
    headers, lines = tpu_blocks.grid(found, least_q=16)
    assert headers == ["queries \\ keys", "128", "256"]
    assert lines == [["16", "**1.00 ms, 2.00 MiB**", "(500 us, 128 MiB)"]]


@pytest.mark.parametrize("where, name", [("v5p", "mosaic_tpu"), ("h200", "mosaic_gpu")])
def test_traced_on(where, name):
    with kernel_blocks.traced_on(where):
        why = axattn.explain_implementations(*SHAPES, is_causal=True)
    if name == "mosaic_tpu" or jax.__version_info__ >= (0, 11):
        assert why[name] is None


def test_errors():
    with pytest.raises(ValueError, match="where takes one of cpu, v4.*got 'a100'"):
        kernel_blocks.forward("a100", *SHAPES)
    with pytest.raises(ValueError, match="v7"), kernel_blocks.traced_on("v7"):
        pass


@pytest.mark.ci
def test_a_kernel_without_its_chip():
    arrays = inputs.attention_inputs(1, 24, 24, 4, 2, 16, jnp.float32)
    found = interpreted.attend(*arrays, is_causal=True)
    if jax.default_backend() == "cpu":
        assert "interpreter" in found.where and found.races is False
    plain, lse = axattn.dot_product_attention(
        *arrays, is_causal=True, implementation="xla", precision="highest", return_residual=True
    )
    np.testing.assert_allclose(found.out, plain, atol=1e-5)
    np.testing.assert_allclose(found.lse, lse, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a chip's own kernel may take it")
def test_what_no_kernel_takes():
    arrays = inputs.attention_inputs(1, 8, 8, 2, 2, 16, jnp.float32)
    with pytest.raises(NotImplementedError, match="needs bfloat16 or float32, got float16"):
        interpreted.attend(*(x.astype(jnp.float16) for x in arrays))


@pytest.mark.aot
def test_vmem_that_is_too_little_is_a_refusal():
    need("v5p")
    shapes = tuple(jax.ShapeDtypeStruct((1, 1024, n, 128), jnp.bfloat16) for n in (8, 1, 1))
    report = tpu_blocks.compiled("v5p", 128, 256, 2**19, *shapes, is_causal=True)
    assert isinstance(report.refusal, aot.Refusal)
    assert report.refusal.memory == "vmem"
    assert report.refusal.requested_bytes > report.refusal.available_bytes == 2**19
    assert tpu_blocks.compiled("v5p", 128, 256, 2**25, *shapes, is_causal=True).ok
