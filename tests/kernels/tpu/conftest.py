"""TPU kernels on a CPU: the Pallas TPU interpreter, with race detection, behind the one door.

Where JAX has a TPU, on that.
"""

from __future__ import annotations

import jax
import pytest

from axattn import _jax_compat
from axattn.implementations import mosaic_tpu
from tests.kernels.interpreter import behind_the_door


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
        chip = _jax_compat.tpu_chip()
        monkeypatch.setattr(_jax_compat, "tpu_chip", lambda: chip)
        yield


@pytest.fixture
def layout(request, monkeypatch):
    """Parametrized with "tokens" or "heads": which of them is first where queries lie in HBM."""
    monkeypatch.setattr(_jax_compat, "is_argument", lambda _: request.param == "tokens")


@pytest.fixture
def interpreted(tpu, monkeypatch):
    """``implementation="mosaic_tpu"`` runs on the CPU, in the interpreter."""
    if jax.default_backend() == "tpu":
        yield
        return
    behind_the_door(monkeypatch, "mosaic_tpu", mosaic_tpu.call_refusal)
    yield
    assert not _jax_compat.tpu_races_found()
