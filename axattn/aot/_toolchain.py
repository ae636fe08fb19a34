"""The compilers of absent chips: whether they are installed, and how JAX comes to load them.

Each needs its wheels and a few environment variables. Variables are set only if the user has not
set them, only when such a compiler is first asked for, and only when no chip of that kind is in
this machine, where they would get in the way of the real runtime.
"""

from __future__ import annotations

import functools
import os
import shutil
from importlib import metadata

import jax

from axattn import _jax_compat
from axattn.aot._targets import Target

_INSTALL = "in a checkout of axattn, pip install -e '.[aot]'"

_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask the cloud's metadata server who we are
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling needs no lock on chips
    # Without these libtpu looks for its host's place in a pod and complains on stderr. They do not
    # decide for which chip we compile: the topology alone does.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
_CUDA_ENVIRONMENT = {
    # The plugin would refuse to load without cuDNN and the other run-time libraries.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}

# The wheels that each compiler needs: one of each group.
_TPU_WHEELS = (("libtpu",),)
_CUDA_WHEELS = (
    ("jax-cuda13-plugin", "jax-cuda12-plugin"),
    ("jax-cuda13-pjrt", "jax-cuda12-pjrt"),
)
_CUDA_TOOLKIT_WHEELS = (
    ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12"),
    ("nvidia-nvvm", "nvidia-cuda-nvcc-cu12"),
)


class MissingCompilerError(ImportError):
    """The wheels that compile for a target are not installed, or do not fit together.

    The message names them, and the command that installs them.

    Raises:
      MissingCompilerError: by `check_installed`, `device`, `mesh`, `analyze` and `tracing_for`.

    Example:
      >>> from axattn import aot
      >>> try:
      ...     aot.check_installed(aot.target("cpu"))  # any other target needs the extra
      ... except aot.MissingCompilerError as error:
      ...     print(error)
    """


def check_installed(target: Target) -> None:
    """Check that the compiler of a target is installed.

    Args:
      target: the chip, a `Target`.

    Raises:
      MissingCompilerError: it is not, or its wheels do not fit together.

    Example:
      >>> from axattn import aot
      >>> aot.check_installed(aot.target("cpu"))  # comes with jax
    """
    missing = [" or ".join(group) for group in _list_wheels(target) if not _find_versions(group)]
    if missing:
        raise MissingCompilerError(
            f"compiling for {target.name} needs {', '.join(missing)}, not installed here: "
            f"{_INSTALL}"
        )
    if target.platform == "cuda":
        jaxlib = metadata.version("jaxlib")
        for group in _CUDA_WHEELS:
            name, found = next(iter(_find_versions(group).items()))
            if _parse_release(found) != _parse_release(jaxlib):
                raise MissingCompilerError(
                    f"compiling for {target.name} needs {name} of the version of jaxlib "
                    f"({jaxlib}), but {found} is installed: {_INSTALL}"
                )


def get_compiler_versions(target: Target) -> dict[str, str]:
    """Return versions of jax, jaxlib and of the wheels that compile for ``target``."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    wheels = {"tpu": _TPU_WHEELS, "cuda": _CUDA_WHEELS + _CUDA_TOOLKIT_WHEELS}
    for group in wheels.get(target.platform, ()):
        versions |= dict(list(_find_versions(group).items())[:1])
    return versions


@functools.cache
def device(target: Target) -> jax.Device:
    """Return the JAX device of a target: one can compile for it, not run on it.

    For the CPU target it is the CPU of this machine.

    Args:
      target: the chip, a `Target`.

    Raises:
      MissingCompilerError: its compiler is not installed.

    Example:
      >>> from axattn import aot
      >>> aot.device(aot.target("cpu")).platform
      'cpu'
    """
    if target.platform == "cpu":
        return _jax_compat.find_cpu_device()
    if target.platform == "tpu":
        return get_tpu_devices(target, target.topology)[0]
    _set_up_compiler(target)
    return _jax_compat.make_aot_cuda_device(target.name, target.topology, target.config())


def get_tpu_devices(target: Target, topology: str) -> tuple[jax.Device, ...]:
    """Return the devices of a topology such as ``"v5p:4x4x4"``, the same ones at each call."""
    _set_up_compiler(target)
    return _jax_compat.make_aot_tpu_devices(topology, tuple(target.topology_options.items()))


def _set_up_compiler(target: Target) -> None:
    """Check that the compiler is installed, and set the variables with which JAX loads it."""
    check_installed(target)
    # Both, whatever the target: JAX, if it has not started yet, tries every plugin it finds.
    if not _jax_compat.has_tpu():
        _set_defaults(_TPU_ENVIRONMENT)
    if not _jax_compat.has_nvidia_gpu():
        _set_defaults(_CUDA_ENVIRONMENT)


def _set_defaults(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def _list_wheels(target: Target) -> tuple[tuple[str, ...], ...]:
    """Return the groups of wheels that a target needs, one of each."""
    if target.platform == "tpu":
        # A libtpu.so that is not from the wheel is the user's own business.
        return () if os.environ.get("TPU_LIBRARY_PATH") else _TPU_WHEELS
    if target.platform == "cuda":
        # ptxas and libdevice may also come from a CUDA toolkit.
        return _CUDA_WHEELS if shutil.which("ptxas") else _CUDA_WHEELS + _CUDA_TOOLKIT_WHEELS
    return ()


def _find_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those wheels that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _parse_release(version: str) -> tuple[str, ...]:
    """Return a version's numbers as jaxlib compares them: no ``.dev``, ``rc``, local part."""
    release = version.split("+")[0].split("rc")[0].split(".dev")[0]
    return tuple(release.split("."))
