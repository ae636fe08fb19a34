"""Kernels on a CPU: the interpreters of Pallas, with race detection, behind the one door.

The TPU kernels run on a TPU where JAX has one.
"""

from __future__ import annotations

import jax
import pytest

from axattn import _jax_compat
from axattn._implementations import mosaic_gpu, mosaic_tpu
from tests.kernels.interpreter import behind_the_door, numpy_in_callbacks

TPU, HOPPER = "mosaic_tpu", "mosaic_gpu"

recent = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU kernels need jax >= 0.11"
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/kernels/hopper" in item.path.as_posix():
            item.add_marker(pytest.mark.hopper)
        if item.get_closest_marker("hopper"):
            item.add_marker(recent)


@pytest.fixture
def cores(request):
    """Cores of the chip: one, or as parametrized. Two take the interpreter twice as long."""
    return getattr(request, "param", 1)


@pytest.fixture
def tpu(monkeypatch, cores):
    """Code that is traced finds itself on a TPU v5p, inside of meshes, too."""
    if jax.default_backend() == "tpu":
        yield
        return
    with _jax_compat.use_abstract_device("TPU v5", cores, "tpu", None):
        chip = _jax_compat.find_tpu_chip()
        monkeypatch.setattr(_jax_compat, "find_tpu_chip", lambda: chip)
        yield


@pytest.fixture
def hopper():
    """Code that is traced finds itself on a small H200."""
    # Of a few cores: decode steps are split among them.
    with _jax_compat.use_abstract_device("NVIDIA H200", 3, "gpu", None):
        yield


@pytest.fixture(params=[TPU, pytest.param(HOPPER, marks=pytest.mark.hopper)])
def family(request):
    """Whose kernels: both in tests beside this file, in a family's own folder its own."""
    return request.param


@pytest.fixture
def interpreted(request, monkeypatch, family, cores):
    """``implementation=family`` runs on the CPU, in the interpreter."""
    request.getfixturevalue("tpu" if family == TPU else "hopper")
    if jax.default_backend() == "tpu":
        yield
        return
    module = mosaic_tpu if family == TPU else mosaic_gpu
    behind_the_door(monkeypatch, family, module.find_call_refusal)
    numpy_in_callbacks(monkeypatch, integers=family == HOPPER)
    yield
    if family == TPU:
        assert not _jax_compat.has_tpu_races()
