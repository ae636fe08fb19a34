from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import accuracy

EXACT = np.random.default_rng(0).standard_normal((1, 64, 2, 16)).astype(np.float32)


def error(wrong, reference=EXACT):
    return float(accuracy.error(jnp.asarray(wrong), reference))


def test_relative_to_the_row():
    # The rows behind many keys are small, and as important as the first.
    reference = EXACT * np.linspace(1, 0.05, 64, dtype=np.float32)[None, :, None, None]
    wrong = reference.copy()
    wrong[0, 40, 1] = 0
    assert error(reference, reference) == 0 and error(wrong, reference) == pytest.approx(1)


def test_rows_of_zeros_are_held_to_the_middle_one():
    reference = EXACT.copy()
    reference[:, 0] = 0
    noisy = reference.copy()
    noisy[:, 0] = 1e-3
    assert 0 < error(noisy, reference) < 1e-2


def test_nan_is_wrong():
    wrong = EXACT.copy()
    wrong[0, 0, 0, 0] = np.nan
    assert error(wrong) == np.inf


def test_limit():
    assert accuracy.limit(0.01, "bfloat16") == pytest.approx(0.02 + 2**-8)
