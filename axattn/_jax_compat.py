"""Every use of a private, unstable or renamed part of JAX: the file to look at when JAX moves.

Checked at jax 0.10.2, 0.11.2 and 0.12.0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from axattn._typing import present


def call_once(function: Callable, *args):
    """Call a jitted function whose result several others read, so that XLA:CPU computes it once.

    XLA would compute it again in the loop of each of them, and for each element of a broadcast.
    Before jax 0.11, XLA:CPU ignores `lax.optimization_barrier`.
    """

    def call_apart(*args):
        with set_xla_metadata(inlineable="false"):
            return function(*args)

    return lax.platform_dependent(*args, cpu=call_apart, default=function)


def allow_auto_axes(function, arrays, specs):
    """Let the partitioner handle those mesh axes in ``function`` that are Explicit for ``arrays``.

    In JAX's Explicit sharding mode (the default of ``jax.make_mesh``) every operation must say how
    its result is sharded. ``specs`` maps the first array's PartitionSpec (a tuple, one entry per
    dimension) to the specs of the results, which are Explicit again.
    """
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    mesh = next((mesh for mesh in meshes if mesh.axis_names), meshes[0])
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in types if kind == jax.sharding.AxisType.Explicit)
    if not axes:
        return function
    spec = tuple(jax.typeof(arrays[0]).sharding.spec)
    spec += (None,) * (arrays[0].ndim - len(spec))
    function = jax.sharding.auto_axes(function, axes=axes, out_sharding=specs(spec))

    def call(*args):
        # auto_axes takes the mesh from the context, which holds none unless the user set one.
        with jax.sharding.use_abstract_mesh(mesh):
            return function(*args)

    return call


def find_explicit_sharding(array) -> tuple[object, tuple] | None:
    """Return the mesh and PartitionSpec in the type of ``array``; None without Explicit axes."""
    sharding = jax.typeof(array).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = tuple(sharding.spec)
    return sharding.mesh, spec + (None,) * (len(jax.typeof(array).shape) - len(spec))


def reshard(tree, specs, mesh):
    """Reshard ``tree`` to ``specs``, where mesh axes are Explicit and JAX would not do it."""
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return tree

    def move(array, spec):
        return jax.sharding.reshard(array, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(move, tree, specs)


def place_on_mesh(tree, specs, mesh):
    """Put those arrays of ``tree`` that are not traced on the devices of ``mesh``."""
    if not isinstance(mesh, jax.sharding.Mesh):
        return tree

    def put(array, spec):
        if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
            return array
        if array.sharding.device_set == set(mesh.devices.flat):
            return array
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(put, tree, specs)


def find_mesh_platform(mesh) -> str | None:
    """Return the platform that programs over ``mesh`` are lowered for; None if not known."""
    abstract = mesh if isinstance(mesh, jax.sharding.AbstractMesh) else mesh.abstract_mesh
    if abstract.abstract_device is None:
        return None
    return name_lowering_platform(abstract.abstract_device.platform)


def name_lowering_platform(backend: str) -> str:
    """Return the name by which JAX lowers for a backend: "cuda" or "rocm" for "gpu"."""
    if backend != "gpu":
        return backend
    rocm = jax.default_backend() == "gpu" and "rocm" in jax.devices()[0].client.platform_version
    return "rocm" if rocm else "cuda"


def find_auto_axes(array) -> tuple[str, ...]:
    """Return the axes of more than one device that the partitioner may use for ``array``."""
    meshes = [jax.typeof(array).sharding.mesh, jax.sharding.get_abstract_mesh()]
    mesh = next((mesh for mesh in meshes if mesh.axis_names), meshes[0])
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = (name for name, kind in types if kind == jax.sharding.AxisType.Auto)
    return tuple(name for name in auto if mesh.shape[name] > 1)


def find_varying_axes(*arrays: jax.Array) -> frozenset:
    """Return the manual mesh axes (of a ``shard_map``) over which any of the arrays varies."""
    axes: frozenset = frozenset()
    for array in arrays:
        manual = getattr(jax.typeof(array), "manual_axis_type", None)
        axes |= frozenset(getattr(manual, "varying", None) or ())
    return axes


def make_result_shape(array: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """Return the shape of a kernel's result, which varies over the same mesh axes as ``array``."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).manual_axis_type)


def vary_over(tree, axes: frozenset):
    """Mark every array of ``tree`` as varying over ``axes``: loop carries have to agree on it."""

    def mark(array):
        missing = tuple(sorted(axes - find_varying_axes(array), key=str))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(mark, tree) if axes else tree


def cpu_moves_bfloat16() -> bool:
    """Say whether this process updates and slices bfloat16 arrays in place.

    XLA:CPU before jax 0.11 converts the whole array to float32 and back, in every iteration.
    """
    return jax.__version_info__ >= (0, 11) or jax.default_backend() != "cpu"


def keep_layout(array: jax.Array) -> jax.Array:
    """Make XLA lay out ``array`` inside a loop as outside of it.

    The last axis is minor if it fills the 128 lanes of a TPU. Else the TPU compiler chooses.
    """
    from jax.experimental import layout

    if array.ndim < 3 or array.shape[-1] % 128:
        return array
    return layout.with_layout_constraint(array, layout.Layout(tuple(range(array.ndim))))


def is_known(compare: Callable[[], bool], *, otherwise: bool) -> bool:
    """Return what ``compare`` says of sizes, or ``otherwise`` where symbolic ones leave it open."""
    try:
        return bool(compare())
    except jax.errors.InconclusiveDimensionOperation:
        return otherwise


def take_smaller_size(a: int, b: int) -> int:
    """Return ``min(a, b)`` of sizes, which may be symbolic (`jax.export.symbolic_shape`)."""
    import jax.core

    return jax.core.min_dim(a, b)


def check_in_debug(ok: jax.Array, message: str) -> None:
    """Raise an error where ``ok`` is False under ``checkify.checkify``; do nothing without it.

    It is ``checkify.debug_check`` with an effect that `jax.export` can store.
    """
    from jax._src import checkify

    error = make_debug_error()(checkify.get_traceback(), message)
    effect = error.get_effect_type()
    payload, metadata = jax.tree.flatten(error)
    # Newer versions number the checks of a program themselves.
    code = checkify.next_code() if hasattr(checkify, "next_code") else 0
    number: Any = np.int32(code)
    error = checkify.Error(
        {effect: jnp.logical_not(ok)}, {effect: number}, {code: metadata}, {effect: payload}
    )
    checkify._check_error(error, debug=True)


@functools.cache
def make_debug_error() -> type:
    """Make the error of `check_in_debug`. Programs with one can be read after the first call.

    `jax.export` stores an effect by the name of its type, so effects with arguments, as checkify
    has them, cannot be exported.
    """
    from jax._src import checkify, effects

    class DebugEffect(checkify.ErrorEffect):
        __slots__ = ()

        def __init__(self):
            super().__init__(checkify.FailedCheckError, ())

    class DebugError(checkify.FailedCheckError):
        def get_effect_type(self):
            return DebugEffect()

    effects.lowerable_effects.add_type(DebugEffect)
    return DebugError


# --- primitives, and what they are lowered for ---


def apply_primitive(primitive, *args, **params):
    """Run a primitive outside of any trace, as a program of its own."""
    from jax._src import dispatch

    return dispatch.apply_primitive(primitive, *args, **params)


def list_lowering_platforms(ctx) -> tuple[str, ...]:
    """Return the platforms that a lowering rule is asked for."""
    from jax._src.interpreters import mlir as jax_mlir

    return tuple(jax_mlir._platforms_for_eqn(ctx))


def lower_per_platform(ctx, name: str, rules: dict[str, Any], *values):
    """Lower by the rule of each platform; more than one is a choice at run time."""
    from jax._src.interpreters import mlir as jax_mlir

    return jax_mlir.lower_per_platform(ctx, name, rules, None, frozenset(), *values)


def find_lowering_device(backend, platform: str):
    """Return the device that is lowered for, if the context lacks it."""
    there = jax.sharding.get_abstract_mesh().abstract_device
    if there is not None and _is_of_platform(there.platform, platform):
        return None
    device = None
    if backend is not None and _is_of_platform(backend.platform, platform):
        device = backend.devices()[0]
    if platform == "cuda" and device is not None:
        return _make_abstract_device(
            device.device_kind, device.core_count, "gpu", device.compute_capability
        )
    if platform == "tpu":
        # Pallas asks for the kind of TPU. Code for the oldest kind runs on all.
        kind, cores = (LEAST_TPU, 1) if device is None else (device.device_kind, device.num_cores)
        return _make_abstract_device(kind, cores, "tpu", None)
    return None


def _is_of_platform(name: str, platform: str) -> bool:
    """Say whether a device or backend is of the platform; both kinds of GPUs are "gpu", too."""
    return name == platform or (name == "gpu" and platform in ("cuda", "rocm"))


# --- ahead-of-time compilation for absent devices (axattn.aot) ---


def find_cpu_device() -> jax.Device:
    """Return the first CPU device. RuntimeError where JAX_PLATFORMS leaves the CPU out."""
    return jax.devices("cpu")[0]


def has_tpu() -> bool:
    """Say whether TPU chips are plugged into this machine; initializes nothing."""
    from jax._src import hardware_utils

    return hardware_utils.num_available_tpu_chips_and_device_id()[0] > 0


def has_nvidia_gpu() -> bool:
    """Say whether an NVIDIA GPU is visible on this machine; initializes nothing."""
    from jax._src import hardware_utils

    return hardware_utils.has_visible_nvidia_gpu()


@functools.cache
def make_aot_tpu_devices(
    topology: str, options: tuple[tuple[str, str], ...]
) -> tuple[jax.Device, ...]:
    """Return libtpu's devices of a topology such as ``"v5p:2x2x1"``; the same every time."""
    from jax.experimental import topologies

    return tuple(
        topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **dict(options)
        ).devices
    )


def make_aot_cuda_device(name: str, topology: str, config: str) -> jax.Device:
    """Return the first device of a CUDA topology; ``config`` is a GpuTargetConfigProto as text."""
    from jax.experimental import topologies

    def describe():
        return topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology=topology, target_config=config
        )

    try:
        return describe().devices[0]
    except NotImplementedError:
        # JAX looked for plugins before JAX_SKIP_CUDA_CONSTRAINTS_CHECK was set, and refused this
        # one because it found no cuDNN. It does not look again: register it by hand.
        try:
            from jax_plugins import xla_cuda13 as plugin
        except ImportError:
            from jax_plugins import xla_cuda12 as plugin
        plugin.initialize()
        return describe().devices[0]


def read_optimized_hlo(compiled: jax.stages.Compiled):
    """Return the compiled program as a jaxlib HloModule.

    Raises:
      RuntimeError: this jaxlib cannot read what a newer compiler wrote.
    """
    return present(compiled.runtime_executable()).hlo_modules()[0]


def analyze_hlo_cost(module) -> dict[str, float] | None:
    """Return XLA's platform-independent cost analysis of a module; None without a CPU backend."""
    from jaxlib import _jax

    try:
        client = find_cpu_device().client
    except RuntimeError:
        return None
    return _jax.hlo_module_cost_analysis(client, module)


def make_hlo_module(proto: bytes):
    """Make an HloModule from a serialized HloModuleProto."""
    from jaxlib import _hlo  # type: ignore[attr-defined]  # an extension without stubs

    return _hlo.HloModule.from_serialized_hlo_module_proto(proto)


def read_compiler_cost(compiled: jax.stages.Compiled) -> dict[str, float] | None:
    """Return the compiler's own cost analysis; None where it has none (CUDA)."""
    try:
        return compiled.cost_analysis()
    except (TypeError, NotImplementedError):  # jax 0.10 to 0.12 trip over CUDA's None
        return None


@functools.cache
def _make_abstract_device_with_capability() -> type:
    from jax.sharding import AbstractDevice

    # Mosaic GPU reads `compute_capability` off the device and takes 9.0 where there is none.
    return dataclasses.make_dataclass(
        "AbstractGpu", [("compute_capability", str)], bases=(AbstractDevice,), frozen=True
    )


def use_abstract_device(kind: str, num_cores: int, platform: str, capability: str | None):
    """Return a context in which code is traced for a device of that kind.

    Where a mesh of such devices is set, this is it.
    """
    there = jax.sharding.get_abstract_mesh()
    if not there.empty and getattr(there.abstract_device, "device_kind", None) == kind:
        return contextlib.nullcontext()
    device = _make_abstract_device(kind, num_cores, platform, capability)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def _make_abstract_device(kind: str, num_cores: int, platform: str, capability: str | None):
    if capability is None:
        return jax.sharding.AbstractDevice(kind, num_cores, platform)
    return _make_abstract_device_with_capability()(kind, num_cores, platform, capability)


def compute_einsum(dot_general, *, precision=None):
    """Compute ``jnp.einsum`` with another ``dot_general``, as Flax's ``einsum_dot_general`` asks.

    That argument of ``jnp.einsum`` has an underscore; Flax passes it, too.
    """
    return functools.partial(jnp.einsum, precision=precision, _dot_general=dot_general)


def find_traced_device(platform: str | None = None) -> str | None:
    """Return the kind of the device that is traced for, if it is of ``platform``.

    It is the device of the context (`use_abstract_device`), else the first accelerator of this
    process. None without one: the program may be lowered for any device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() != "cpu":
        device = jax.devices()[0]
    if device is None or (platform is None and device.platform == "cpu"):
        return None
    return device.device_kind if platform in (None, device.platform) else None


def find_gpu_capability() -> str | None:
    """Return the compute capability ("9.0") of the GPU that is traced for; None if not known.

    It is the device of the context (`use_abstract_device`), else the first one of this process.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        if device.platform != "gpu":
            return None
        # JAX's own AbstractDevice has no capability, only the kind; that of an H200 says Hopper.
        hopper = "9.0" if re.search(r"\bG?H(20|[128]00)\b", device.device_kind) else None
        return getattr(device, "compute_capability", hopper)
    if jax.default_backend() != "gpu":
        return None
    return getattr(jax.devices()[0], "compute_capability", None)


def count_gpu_cores() -> int:
    """Return the multiprocessors of the GPU that is traced for; an H200's where it does not say."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores or 132
    return getattr(jax.devices()[0], "core_count", None) or 132


def read_cuda_runtime_version() -> int | None:
    """Return the CUDA runtime of this process, 12090 for 12.9, or None without one."""
    try:
        from jax._src.lib import cuda_versions
    except ImportError:
        return None
    return None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()


def make_gpu_kernel_cost(estimate) -> dict[str, Any]:
    """Return the arguments that give a Mosaic GPU kernel its cost estimate; none before 0.12."""
    return {"cost_estimate": estimate} if jax.__version_info__ >= (0, 12) else {}


def make_gpu_interpreter():
    """Return parameters that run a Mosaic GPU kernel on the CPU and detect its races."""
    from jax.experimental.pallas import mosaic_gpu

    if hasattr(mosaic_gpu, "InterpretGPUParams"):
        return mosaic_gpu.InterpretGPUParams(detect_races=True)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # jax 0.11

    return InterpretGPUParams(detect_races=True)


# Code for this TPU runs on all that the kernels take: it has the least VMEM, and no extra
# instructions.
LEAST_TPU = "TPU v4"


class TpuChip(NamedTuple):
    """The TPU that is traced for; figures per TensorCore."""

    kind: str
    generation: int
    cores: int  # of one JAX device
    vmem_bytes: int
    bf16_flops: float
    hbm_bandwidth: float  # bytes/s


def find_tpu_chip() -> TpuChip | None:
    """Return the TPU of the context (`use_abstract_device`), else of this process, or None."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        if jax.default_backend() != "tpu":
            return None
        device = jax.devices()[0]
        kind = device.device_kind
    elif device.platform != "tpu":
        return None
    else:
        kind = device.device_kind
    from jax._src.pallas.mosaic import tpu_info

    version = tpu_info.chip_version_from_device_kind(kind)
    if version is None:
        return None
    cores = device.num_cores or 1
    info = tpu_info.get_tpu_info_for_chip(version, cores)
    return TpuChip(
        kind,
        info.generation,
        cores,
        info.vmem_capacity_bytes,
        info.bf16_ops_per_second,
        info.mem_bw_bytes_per_second,
    )


def make_tpu_interpreter(cores: int):
    """Return parameters that run a TPU kernel on the CPU as on `cores` cores and detect races."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)


def has_tpu_races() -> bool:
    """Say whether that interpreter has seen a race in what it ran last."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = interpret_pallas_call.races
    return races is not None and races.races_found
