"""Hopper kernels on a CPU: the Pallas GPU interpreter, with race detection, behind the one door."""

from __future__ import annotations

import jax
import pytest

from axattn import _jax_compat
from axattn.implementations import mosaic_gpu
from tests.kernels.interpreter import behind_the_door

recent = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU kernels need jax >= 0.11"
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/kernels/hopper" in item.path.as_posix():
            item.add_marker(recent)
            item.add_marker(pytest.mark.hopper)


@pytest.fixture
def hopper():
    """Code that is traced finds itself on a small H200."""
    # Of a few cores: decode steps are split among them.
    with _jax_compat.use_abstract_device("NVIDIA H200", 3, "gpu", None):
        yield


@pytest.fixture
def interpreted(hopper, monkeypatch):
    """``implementation="mosaic_gpu"`` runs on the CPU, in the interpreter."""
    behind_the_door(monkeypatch, "mosaic_gpu", mosaic_gpu.call_refusal)
