"""What is said when a compiler's wheels are missing or do not fit."""

from __future__ import annotations

import shutil
from importlib import metadata

import jax.numpy as jnp
import pytest

from axattn import aot
from axattn.aot import _toolchain


@pytest.fixture
def installed(monkeypatch):
    """A machine with just the packages that the test puts into the returned dictionary."""
    packages = {"jax": "0.12.0", "jaxlib": "0.12.0"}

    def version(name):
        try:
            return packages[name]
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(_toolchain.metadata, "version", version)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    _toolchain.device.cache_clear()
    yield packages
    _toolchain.device.cache_clear()


@pytest.mark.parametrize("name", ["v5p", "v6e"])
def test_missing_libtpu(installed, name):
    with pytest.raises(aot.MissingCompilerError) as caught:
        aot.analyze(jnp.sin, jnp.ones(3), target=name)
    assert isinstance(caught.value, ImportError)
    assert str(caught.value) == (
        f"compiling for {name} needs libtpu, not installed here: "
        "in a checkout of axattn, pip install -e '.[aot]'"
    )


def test_missing_cuda_wheels_are_all_named(installed):
    with pytest.raises(aot.MissingCompilerError) as caught:
        aot.analyze(jnp.sin, jnp.ones(3), target="h200")
    message = str(caught.value)
    for wheel in ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"):
        assert wheel in message
    assert message.endswith(": in a checkout of axattn, pip install -e '.[aot]'")
    assert "\n" not in message


CUDA13 = {
    "jax-cuda13-plugin": "0.12.0",
    "jax-cuda13-pjrt": "0.12.0",
    "nvidia-cuda-nvcc": "13.0",
    "nvidia-nvvm": "13.0",
}
CUDA12 = {
    "jax-cuda12-plugin": "0.12.0",
    "jax-cuda12-pjrt": "0.12.0",
    "nvidia-cuda-nvcc-cu12": "12.9",
}


@pytest.mark.parametrize("wheels", [CUDA13, CUDA12], ids=["cuda13", "cuda12"])
def test_either_generation_of_cuda_will_do(installed, wheels):
    installed.update(wheels)
    aot.check_installed(aot.target("h200"))


def test_a_toolkit_on_the_path_replaces_its_wheels(installed, monkeypatch):
    installed.update({name: v for name, v in CUDA13.items() if name.startswith("jax")})
    with pytest.raises(aot.MissingCompilerError, match="nvidia-cuda-nvcc"):
        aot.check_installed(aot.target("h200"))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/local/cuda/bin/" + name)
    aot.check_installed(aot.target("h200"))


def test_a_plugin_of_another_version_is_named(installed):
    installed.update(CUDA13, **{"jax-cuda13-plugin": "0.10.2"})
    with pytest.raises(aot.MissingCompilerError) as caught:
        aot.check_installed(aot.target("h200"))
    assert str(caught.value) == (
        "compiling for h200 needs jax-cuda13-plugin of the version of jaxlib (0.12.0), "
        "but 0.10.2 is installed: in a checkout of axattn, pip install -e '.[aot]'"
    )


def test_the_cpu_needs_nothing(installed):
    assert aot.analyze(jnp.sin, jnp.ones(3), target="cpu").ok


def test_what_the_user_set_is_kept(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    _toolchain._set_defaults({"TPU_WORKER_HOSTNAMES": "ours", "TPU_ACCELERATOR_TYPE": "ours"})
    assert _toolchain.os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert _toolchain.os.environ["TPU_ACCELERATOR_TYPE"] == "ours"
