from __future__ import annotations

import sys
import types

import jax
import pytest

from benchmarks.harness import device_time


@pytest.fixture
def profiler(monkeypatch):
    """Mosaic's profiler, as far as it is used: the kernels that the functions "launch"."""
    fake = types.ModuleType("jax.experimental.mosaic.gpu.profiler")
    fake.launched = []

    def measure(fn, *, aggregate):
        # What the real one asks before it calls a function as it is, without tracing it.
        assert isinstance(fn, jax.stages.Wrapped)
        assert not aggregate

        def wrapper():
            fn()  # warm-up
            fake.launched.clear()
            out = fn()
            return out, list(fake.launched) or None

        return wrapper

    fake.measure = measure
    package = types.ModuleType("jax.experimental.mosaic.gpu")
    package.profiler = fake
    monkeypatch.setitem(sys.modules, "jax.experimental.mosaic.gpu", package)
    monkeypatch.setitem(sys.modules, "jax.experimental.mosaic.gpu.profiler", fake)
    monkeypatch.setattr(device_time, "_FLUSH_BYTES", 1 << 10)
    real = jax.block_until_ready

    def block(tree):
        fake.launched.append(("flush", 40.0))
        return real(tree)

    monkeypatch.setattr(device_time.jax, "block_until_ready", block)
    return fake


def test_only_the_steps_kernels_count(profiler):
    def step():
        profiler.launched.extend([("axattn_forward", 1.5), ("pad", 0.5)])

    for kernels, milliseconds in (({}, 2.0), ({"kernels": "axattn_"}, 1.5)):
        seconds, note = device_time.cold_timer(step, "gpu", **kernels)
        assert note is None
        assert seconds() == pytest.approx(milliseconds * 1e-3)
    seconds, note = device_time.cold_timer(step, "gpu", kernels="another")
    assert seconds is None and "no kernel is called another" in note


def test_notes_where_the_clock_is_the_walls(profiler):
    profiler.measure = lambda fn, *, aggregate: lambda: (None, None)
    assert device_time.cold_timer(lambda: None, "gpu") == (None, "wall time: CUPTI saw no kernels")

    def measure(fn, *, aggregate):
        raise RuntimeError("CUPTI profiling is not supported on this platform")

    profiler.measure = measure
    seconds, note = device_time.cold_timer(lambda: None, "gpu")
    assert seconds is None
    assert note.startswith("wall time: CUPTI is not available (RuntimeError: CUPTI profiling")
    for platform in ("cpu", "tpu"):
        assert device_time.cold_timer(lambda: None, platform) == (None, None)
