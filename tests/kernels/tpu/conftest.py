"""TPU kernels on a CPU: the Pallas TPU interpreter, with race detection, behind the one door.

Where JAX has a TPU, on that.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from axattn import _jax_compat, attention
from axattn.implementations import flash, mosaic_tpu, registry


@pytest.fixture
def tpu(monkeypatch):
    """Code that is traced finds itself on a TPU v5p, inside of meshes, too."""
    if jax.default_backend() == "tpu":
        yield
        return
    with _jax_compat.use_abstract_device("TPU v5", 2, "tpu", None):
        chip = _jax_compat.tpu_chip()
        monkeypatch.setattr(_jax_compat, "tpu_chip", lambda: chip)
        yield


@pytest.fixture
def interpreted(tpu, monkeypatch):
    """``implementation="mosaic_tpu"`` runs on the CPU, in the interpreter."""
    if jax.default_backend() == "tpu":
        yield
        return
    ways_on_devices = flash.ways

    def ways(call, plan):
        found = ways_on_devices(call, plan)
        return tuple((platform, replace(way, interpret=True)) for platform, way in found)

    entry = registry.Implementation("mosaic_tpu", None, mosaic_tpu.call_refusal, registry.PLATFORMS)
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "mosaic_tpu", entry)
    monkeypatch.setattr(flash, "ways", ways)
    # A function of our own: jit must not find the programs of other ways.
    attend = jax.jit(lambda call, plan: registry.attend(call, plan), static_argnames="plan")
    monkeypatch.setattr(attention, "_attend", attend)
    yield
    assert not _jax_compat.tpu_races_found()
