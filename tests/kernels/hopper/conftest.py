"""Hopper kernels on a CPU: the Pallas GPU interpreter, with race detection, behind the one door."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from axattn import _jax_compat, attention
from axattn.implementations import flash, mosaic_gpu, registry

recent = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU kernels need jax >= 0.11"
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/kernels/hopper" in item.path.as_posix():
            item.add_marker(recent)


@pytest.fixture
def hopper():
    """Code that is traced finds itself on a small H200."""
    # Of a few cores: decode steps are split among them.
    with _jax_compat.use_abstract_device("NVIDIA H200", 3, "gpu", None):
        yield


@pytest.fixture
def interpreted(hopper, monkeypatch):
    """``implementation="mosaic_gpu"`` runs on the CPU, in the interpreter."""

    ways_on_devices = flash.ways

    def ways(call, plan):
        found = ways_on_devices(call, plan)
        return tuple((platform, replace(way, interpret=True)) for platform, way in found)

    entry = registry.Implementation("mosaic_gpu", None, mosaic_gpu.call_refusal, registry.PLATFORMS)
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "mosaic_gpu", entry)
    monkeypatch.setattr(flash, "ways", ways)
    # A function of our own: jit must not find the programs of other ways.
    attend = jax.jit(lambda call, plan: registry.attend(call, plan), static_argnames="plan")
    monkeypatch.setattr(attention, "_attend", attend)
