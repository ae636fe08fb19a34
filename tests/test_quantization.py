"""Codes and scales of vectors, against the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from axattn import _quantization
from axattn._quantization import LIMITS
from axattn.quantization import dequantize, key_center, quantize

# Half a step of the largest number of a vector; float8 has 3 bits of mantissa.
WORST = {"int8": 0.5 / 127, "float8_e4m3fn": 2.0**-4, "int4": 0.5 / 7}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("of", ["float32", "bfloat16", "float16"])
def test_error_is_at_most_half_a_step(dtype, of):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3, 32)) * 7, of)
    back = np.asarray(dequantize(quantize(x, dtype), dtype))
    exact = np.asarray(x, np.float64)
    top = np.abs(exact).max(-1, keepdims=True)
    bound = WORST[dtype] * (np.abs(exact) if dtype.startswith("float8") else top) + 2e-6 * top
    if dtype.startswith("float8"):
        bound = bound + top / 448 * 2.0**-10  # half a subnormal step
    assert (np.abs(back - exact) <= bound).all()
    assert back.dtype == np.float32


@pytest.mark.parametrize("dtype", LIMITS)
def test_the_top_keeps_its_value_and_codes_are_symmetric(dtype):
    x = jnp.asarray([[-3.0, 1.0, 0.0, 3.0], [1e-30, -1e-30, 0, 0], [6e4, -1.0, 2.0, 0]])
    back = np.asarray(dequantize(quantize(x, dtype), dtype))
    np.testing.assert_allclose(back[0, [0, 3]], [-3, 3], rtol=1e-6)
    np.testing.assert_allclose(back[1, :2], [1e-30, -1e-30], rtol=1e-6)
    np.testing.assert_allclose(back[2, 0], 6e4, rtol=1e-6)
    if dtype != "float8_e4m3fn":
        many = jnp.asarray(np.random.default_rng(1).normal(size=(1000, 16)).astype(jnp.float32))
        codes = np.asarray(quantize(many, dtype).codes).astype(int)
        assert codes.min() == -LIMITS[dtype]
        assert codes.max() == LIMITS[dtype]


def test_int8_rounds_to_nearest():
    x = jnp.asarray([[127.0, 0.4, 0.6, 1.5, 2.5, -0.6]])
    assert np.asarray(quantize(x, "int8").codes).tolist() == [[127, 0, 1, 2, 2, -1]]


@pytest.mark.parametrize("dtype", LIMITS)
def test_zeros_and_what_is_not_finite(dtype):
    x = np.ones((5, 8), np.float32)
    x[0], x[1, 3], x[2, 3], x[3, 3] = 0, np.nan, np.inf, -np.inf
    quantized = quantize(jnp.asarray(x), dtype)
    back = np.asarray(dequantize(quantized, dtype))
    assert (back[0] == 0).all()
    assert quantized.scales[0] == 0
    assert np.isnan(back[1:4]).all()
    np.testing.assert_allclose(back[4], 1, rtol=1e-6)


def test_codes_are_exact_in_short_floats():
    numbers = np.arange(-127, 128).astype(np.int8)[None]
    fp8 = np.arange(256).astype(np.uint8)[None]
    fp8 = fp8[~np.isnan(fp8.view(ml_dtypes.float8_e4m3fn).astype(np.float32))][None]
    for codes, dtype in ((numbers, "int8"), (fp8, "float8_e4m3fn")):
        exact = np.asarray(_quantization.cast_codes(jnp.asarray(codes), dtype, jnp.float32))
        if dtype == "int8":
            np.testing.assert_array_equal(exact, numbers)
        for short in (jnp.bfloat16, jnp.float16):
            got = _quantization.cast_codes(jnp.asarray(codes), dtype, short)
            np.testing.assert_array_equal(np.asarray(got, np.float32), exact)


def test_key_center_is_the_mean_of_real_tokens():
    x = np.random.default_rng(2).normal(size=(2, 5, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(key_center(jnp.asarray(x)), x.mean((0, 1)), rtol=1e-5, atol=1e-6)
    padded = x.copy()
    padded[0, 2:], padded[1, 4:] = np.nan, np.inf
    got = key_center(jnp.asarray(padded), np.array([2, 4]))
    want = np.concatenate([x[0, :2], x[1, :4]]).mean(0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert (np.asarray(key_center(jnp.asarray(x), np.array([0, 0]))) == 0).all()


def test_bytes_per_vector():
    sizes = {"float32": 512, "bfloat16": 256, "int8": 132, "float8_e4m3fn": 132, "int4": 68}
    assert {name: _quantization.bytes_per_vector(name, 128) for name in sizes} == sizes
    assert _quantization.bytes_per_vector("int4", 5) == 3 + 4


@pytest.mark.parametrize("dtype", ["int16", "float8_e5m2", "complex64", "nonsense", None, 3])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="dtype takes one of"):
        _quantization.check_dtype(dtype)
    with pytest.raises(TypeError, match="dtype takes one of"):
        quantize(jnp.ones(4), dtype)


def test_floats_are_not_quantized():
    with pytest.raises(TypeError, match="int8"):
        quantize(jnp.ones(4), jnp.bfloat16)


def test_under_jit_and_vmap():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 6, 8)).astype(jnp.float32))
    plain = quantize(x, "int8")
    for function in (
        jax.jit(lambda x: quantize(x, "int8")),
        jax.vmap(lambda x: quantize(x, "int8")),
    ):
        for got, want in zip(function(x), plain, strict=True):
            np.testing.assert_array_equal(got, want)
