from __future__ import annotations

import numpy as np
import pytest

from benchmarks.harness import cache_error


@pytest.mark.ci
@pytest.mark.parametrize(
    "dtype, least, most, offset",
    [
        ("float32", 0, 1e-5, 0),
        # Two channels that stand out cost int8 more than twice the error; a center, nothing.
        ("int8", 1e-3, 0.01, 2),
        ("float8_e4m3fn", 0.02, 0.06, 1),
        ("int4", 0.1, 0.3, 1),
    ],
)
def test_error_by_dtype(dtype, least, most, offset):
    found = cache_error.quantization_error(dtype, heads=4, kv_heads=2, head_dim=128, tokens=512)
    assert least < found.gaussian < most and least < found.centered < most
    assert found.offset > offset * max(found.centered, found.gaussian)
    assert offset or found.offset < most


def test_reference():
    # Two keys, of which query head 1 (of key/value head 0) sees e times more of the first.
    query = np.array([[[[0.0], [1.0], [0.0], [0.0]]]])
    key = np.array([[[[1.0], [5.0]], [[0.0], [5.0]]]])
    value = np.array([[[[1.0], [3.0]], [[0.0], [3.0]]]])
    out = cache_error.reference(query, key, value)
    assert out.shape == (1, 1, 4, 1) and out.dtype == np.float64
    np.testing.assert_allclose(out[0, 0, :, 0], [0.5, np.e / (1 + np.e), 3, 3])
