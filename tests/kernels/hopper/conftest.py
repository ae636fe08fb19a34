"""The Hopper kernels' own tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def family():
    return "mosaic_gpu"
