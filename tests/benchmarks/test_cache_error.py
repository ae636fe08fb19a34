from __future__ import annotations

import numpy as np
import pytest

from benchmarks.harness import cache_error


def measured(dtype):
    return cache_error.quantization_error(dtype, heads=4, kv_heads=2, head_dim=128, tokens=512)


def test_exact():
    found = measured("float32")
    assert max(found.gaussian, found.offset, found.centered) < 1e-5


def test_int8():
    found = measured("int8")
    assert 1e-3 < found.gaussian <= 0.01
    assert found.centered <= 0.01 < 2 * found.gaussian < found.offset


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("float8_e4m3fn", 0.02, 0.06), ("int4", 0.1, 0.3)]
)
def test_fewer_bits(dtype, least, most):
    found = measured(dtype)
    assert least < found.gaussian < most
    assert least < found.centered < most
    assert found.offset > found.centered


def test_reference():
    # Two keys, of which query head 1 (of key/value head 0) sees e times more of the first.
    query = np.array([[[[0.0], [1.0], [0.0], [0.0]]]])
    key = np.array([[[[1.0], [5.0]], [[0.0], [5.0]]]])
    value = np.array([[[[1.0], [3.0]], [[0.0], [3.0]]]])
    out = cache_error.reference(query, key, value)
    assert out.shape == (1, 1, 4, 1) and out.dtype == np.float64
    np.testing.assert_allclose(out[0, 0, :, 0], [0.5, np.e / (1 + np.e), 3, 3])
