"""The chips that axattn can compile for, as one table.

Figures are per JAX device and come from the vendors' data sheets (links below); they are peaks,
for roofline arithmetic, and were not measured here. What a program may really allocate is a
little less than ``hbm_bytes``: the compilers and the drivers keep some for themselves.

TPU: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and the page of each version.
There the bandwidth between chips is given per chip, of all links and both directions
("bidirectional ICI bandwidth", 1200 GB/s of a v5p; on older pages 4800 Gbps, one way); here it is
one way.
NVIDIA: the A100 80GB SXM, H100 SXM, H200 SXM and DGX B200 data sheets; dense (not sparse) bf16; of
NVLink half of what is given for both ways.
GPU memory sizes are what the driver reports, as XLA's own target descriptions list them
(openxla/xla, xla/backends/gpu/target_config/specs).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class GpuLimits:
    """Limits that XLA's GPU compiler must know of a chip that is not there."""

    compute_capability: tuple[int, int]
    accelerated_features: bool  # the "a" of sm_90a: WGMMA, TMA, tcgen05
    multiprocessors: int
    fp32_lanes_per_multiprocessor: int
    shared_memory_per_multiprocessor: int  # bytes
    shared_memory_per_block: int  # bytes, the opt-in maximum
    l2_bytes: int
    clock_ghz: float


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip to compile for, with its peaks from the vendor's data sheet.

    Attributes:
      name: what ``target=`` of `axattn.aot.analyze` takes.
      platform: ``"tpu"``, ``"cuda"`` or ``"cpu"``: the platform that programs are lowered for.
      topology: the smallest topology that every version of the compiler knows; programs are
        compiled for its first device. Empty for the CPU.
      topology_options: further options of the topology.
      hbm_bytes: device memory in bytes; None for the CPU, whose memory is not HBM.
      peak_bf16_flops: dense bfloat16 FLOP/s; None for the CPU.
      hbm_bandwidth: bytes/s; None for the CPU.
      ici_bandwidth: bytes/s that a device sends to others over all of its links, one way; None for
        the CPU.
      ici_links: how many links these are, a neighbour at each; 1 where a switch is between them,
        and a neighbour may have it all.
      slices: topologies of several devices, by how many.
      description: the name that the device reports for itself.
      cores: of one JAX device; 0 for the CPU.
      gpu: limits of the chip; None unless the platform is ``"cuda"``.

    Example:
      >>> from axattn import aot
      >>> chip = aot.TARGETS["v5p"]
      >>> chip.hbm_bytes // 2**30, chip.peak_bf16_flops, chip.hbm_bandwidth
      (96, 459000000000000.0, 2765000000000.0)
      >>> round(chip.peak_bf16_flops / chip.hbm_bandwidth)  # FLOPs per byte at which it is balanced
      166
    """

    name: str
    platform: str
    topology: str = ""
    topology_options: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    hbm_bytes: int | None = None
    peak_bf16_flops: float | None = None
    hbm_bandwidth: float | None = None
    ici_bandwidth: float | None = None
    ici_links: int = 1
    slices: Mapping[int, str] = dataclasses.field(default_factory=dict, hash=False)
    description: str = ""
    cores: int = 0
    gpu: GpuLimits | None = None

    def config(self) -> str:
        """Return XLA's description of the GPU: a ``GpuTargetConfigProto`` in text form.

        Raises:
          ValueError: the target is no GPU.
        """
        if self.gpu is None:
            raise ValueError(f"target {self.name!r} is not a GPU and has no GPU target config")
        major, minor = self.gpu.compute_capability
        features = "ACCELERATED_FEATURES" if self.gpu.accelerated_features else "NONE"
        return _GPU_CONFIG.format(
            major=major,
            minor=minor,
            features=features,
            memory=self.hbm_bytes,
            bandwidth=int(self.hbm_bandwidth or 0),
            description=self.description,
            **dataclasses.asdict(self.gpu),
        )


# Limits of the CUDA programming model that all of our chips share, then the chip's own.
_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  core_count: {multiprocessors}
  fpus_per_core: {fp32_lanes_per_multiprocessor}
  shared_memory_per_core: {shared_memory_per_multiprocessor}
  shared_memory_per_block_optin: {shared_memory_per_block}
  l2_cache_size: {l2_bytes}
  clock_rate_ghz: {clock_ghz}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{description}"
"""

_AMPERE = GpuLimits((8, 0), False, 108, 64, 167_936, 166_912, 41_943_040, 1.41)
_HOPPER = GpuLimits((9, 0), True, 132, 128, 233_472, 232_448, 52_428_800, 1.98)
_BLACKWELL = GpuLimits((10, 0), True, 148, 128, 233_472, 232_448, 132_644_864, 1.965)


# Slices of machines whose chips lie in a cube, and in a square.
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


def _make_tpu(
    name: str, shapes: tuple[str, ...], hbm: int, flops: float, bandwidth: float, ici: float,
    description: str, cores: int, devices_per_chip: int = 1, **options: str,
) -> Target:  # fmt: skip
    slices = {
        devices_per_chip * math.prod(map(int, shape.split("x"))): f"{name}:{shape}"
        for shape in shapes
    }
    return Target(
        name, "tpu", f"{name}:{shapes[0]}", options, hbm, flops, bandwidth, ici,
        2 * (shapes[0].count("x") + 1), slices, description, cores,
    )  # fmt: skip


def _make_gpu(
    name: str, hbm: int, flops: float, bandwidth: float, nvlink: float, description: str,
    limits: GpuLimits,
) -> Target:  # fmt: skip
    return Target(
        name, "cuda", "1x1x1", {}, hbm, flops, bandwidth, nvlink, description=description,
        cores=limits.multiprocessors, gpu=limits,
    )  # fmt: skip


#: The chips that axattn can compile for, by name.
TARGETS: Mapping[str, Target] = {
    t.name: t
    for t in (
        # JAX runs a v4 chip as one device with both cores ("megacore"); the bare topology would
        # describe two devices of half a chip each.
        _make_tpu(
            "v4",
            _CUBES,
            32 * _GIB,
            275e12,
            1.228e12,
            3e11,
            "TPU v4",
            2,
            chip_config_name="megacore",
        ),  # fmt: skip
        _make_tpu("v5e", _SQUARES, 16 * _GIB, 197e12, 0.819e12, 2e11, "TPU v5 lite", 1),
        # Sold as 95 GB; the compiler offers 95.73 GiB of 96.
        _make_tpu("v5p", _CUBES, 96 * _GIB, 459e12, 2.765e12, 6e11, "TPU v5", 2),
        _make_tpu("v6e", _SQUARES, 32 * _GIB, 918e12, 1.64e12, 4e11, "TPU v6 lite", 1),
        # One JAX device is one of the chip's two cores: half of 192 GiB, 2307 TFLOP/s, 7.38 TB/s
        # and 600 GB/s to other chips.
        _make_tpu(
            "tpu7x", _CUBES, 96 * _GIB, 1153.5e12, 3.69e12, 3e11, "TPU7x", 1, devices_per_chip=2
        ),
        _make_gpu("a100", 85_100_068_864, 312e12, 2.039e12, 3e11, "NVIDIA A100-SXM4-80GB", _AMPERE),
        _make_gpu(
            "h100", 84_942_979_072, 989e12, 3.35e12, 4.5e11, "NVIDIA H100 80GB HBM3", _HOPPER
        ),
        _make_gpu("h200", 150_754_820_096, 989e12, 4.8e12, 4.5e11, "NVIDIA H200", _HOPPER),
        _make_gpu("b200", 191_514_411_008, 2250e12, 8.0e12, 9e11, "NVIDIA B200", _BLACKWELL),
        Target("cpu", "cpu", description="cpu"),
    )
}


def target(name: str | Target) -> Target:
    """Return the target of that name.

    Args:
      name: one of ``axattn.aot.TARGETS``, in any case; a `Target` is returned as it is.

    Raises:
      ValueError: there is no such name; the message lists those that there are.

    Example:
      >>> from axattn import aot
      >>> aot.target("H100").platform
      'cuda'
    """
    if isinstance(name, Target):
        return name
    try:
        return TARGETS[name.lower()]
    except (KeyError, AttributeError):
        known = ", ".join(TARGETS)
        raise ValueError(f"target={name!r} is unknown; it takes one of {known}") from None


def describe_device(chip: Target) -> tuple[str, int, str, str | None]:
    """Return kind, cores, platform and compute capability of a target's device.

    Code that is traced asks the device for these. No compiler is needed.
    """
    if chip.gpu is None:
        return chip.description, chip.cores, chip.platform, None
    return chip.description, chip.cores, "gpu", "{}.{}".format(*chip.gpu.compute_capability)
