"""Where numbers come from: device, versions, date, command."""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
import platform
import shlex
import subprocess
from importlib import metadata
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "google-benchmark")
_ACCELERATOR_PACKAGES = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


@dataclasses.dataclass(frozen=True)
class Environment:
    """Provenance of a set of rows."""

    date: str  # ISO 8601, with the offset from UTC
    command: str
    platform: str  # of the default backend: cpu, cuda, rocm, tpu
    device: str  # its kind
    devices: int
    cpu: str
    cores: int
    host_bytes: int | None
    system: str
    python: str
    versions: dict[str, str]
    commit: str | None  # of this repository, "+" behind it where files were changed
    load: list[float] | None = None  # average of 1, 5 and 15 minutes, before anything was run

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def header(self) -> str:
        """What a report begins with."""
        return f"{self.command}\n{self.date}\n{self.summary()}"

    def summary(self) -> str:
        """One line for people."""
        where = f"{self.device} x {self.devices}, " if self.platform != "cpu" else ""
        memory = f", {self.host_bytes / 2**30:.0f} GiB" if self.host_bytes else ""
        versions = ", ".join(f"{name} {v}" for name, v in self.versions.items())
        load = f", load {' '.join(f'{x:.2f}' for x in self.load)}" if self.load else ""
        machine = f"{where}{self.cpu}, {self.cores} cores{memory}{load}"
        return f"{machine}; Python {self.python}, {versions}"


def choose_backend() -> None:
    """Settles on the CPU where wheels for TPUs and GPUs are installed but none is there.

    Otherwise JAX tries each plugin and each complains. JAX_PLATFORMS, if set, is left alone.
    """
    import jax

    from axattn import _jax_compat

    if os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms:
        return
    wheels = any(_version(name) for name in _ACCELERATOR_PACKAGES)
    if wheels and not (_jax_compat.has_tpu() or _jax_compat.has_nvidia_gpu()):
        jax.config.update("jax_platforms", "cpu")


def xla_platform(device: Any) -> str:
    """The platform that programs for ``device`` are lowered for: cpu, cuda, rocm or tpu."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"


def host_bytes() -> int | None:
    """Physical memory of this machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def load_average() -> list[float] | None:
    """Of 1, 5 and 15 minutes; None where the system does not count."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (OSError, AttributeError):
        return None


def describe() -> Environment:
    """This process's environment; starts JAX's default backend."""
    import jax

    import axattn

    devices = jax.devices()
    versions = {"axattn": axattn.__version__}
    versions |= {name: v for name in _PACKAGES + _ACCELERATOR_PACKAGES if (v := _version(name))}
    return Environment(
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        command="",
        platform=xla_platform(devices[0]),
        device=devices[0].device_kind,
        devices=len(devices),
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        host_bytes=host_bytes(),
        system=platform.platform(terse=True),
        python=platform.python_version(),
        versions=versions,
        commit=_commit(),
        load=load_average(),
    )


def command_line(argv: list[str]) -> str:
    """The command as one would type it in the repository's root."""
    script = pathlib.Path(argv[0]).resolve()
    name = script.relative_to(_ROOT) if script.is_relative_to(_ROOT) else script.name
    return shlex.join(["python", str(name), *argv[1:]])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *args], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        changed = "+" if git("status", "--porcelain") else ""
        return git("rev-parse", "--short=10", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return None
