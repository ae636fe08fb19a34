"""Compilation of a function for a named chip that need not be there."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from axattn import _jax_compat
from axattn.aot import _toolchain
from axattn.aot._collectives import program_collectives
from axattn.aot._cost import compute_program_cost
from axattn.aot._report import Refusal, Report, parse_refusal
from axattn.aot._targets import Target
from axattn.aot._targets import target as find_target


def analyze(
    fn: Callable[..., Any],
    /,
    *args: Any,
    target: str | Target = "v5p",
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    **kwargs: Any,
) -> Report:
    """Compile a function for a target and return what it costs there. Nothing is run.

    Args:
      fn: a function of arrays, plain or jitted already. Arrays that it closes over are constants of
        the program.
      *args: its arguments: pytrees of arrays or ``jax.ShapeDtypeStruct`` (PRNG keys too), whose
        values and placement do not matter. A ShapeDtypeStruct with a sharding over devices of the
        target's kind, e.g. over an `axattn.aot.mesh`, keeps it; all that have one share its
        devices, and the others are then replicated over these.
      target: a name in ``axattn.aot.TARGETS``, or a `Target`.
      donate_argnums: as in ``jax.jit``.
      static_argnums: as in ``jax.jit``.
      **kwargs: keyword arguments. One that holds no array (a bool, a number, a string, None, a
        function) is bound as a constant of a plain function, as ``functools.partial`` would.

    Returns:
      A `Report`, whose figures are per device. The compiler's refusal, above all for want of
      memory, is in its ``refusal``.

    Raises:
      ValueError: an unknown target.
      MissingCompilerError: the compiler for the target is not installed.
      TypeError: and whatever else ``fn`` raises when traced, NotImplementedError apart, which is a
        refusal of kind ``"unsupported"``.

    Example:
      >>> import axattn, jax
      >>> from axattn import aot
      >>> q, kv = (jax.ShapeDtypeStruct((1, 128, n, 64), "bfloat16") for n in (8, 2))
      >>> report = aot.analyze(
      ...     axattn.dot_product_attention, q, kv, kv, is_causal=True, target="cpu"
      ... )
      >>> report.ok, report.argument_bytes, report.output_bytes
      (True, 196608, 131072)
    """
    chip = find_target(target)
    device = _toolchain.device(chip)
    sharding = _choose_sharding(device, (args, kwargs))
    traceable, args, kwargs = _prepare(fn, args, kwargs, sharding, donate_argnums, static_argnums)
    report = functools.partial(
        Report,
        target=chip.name,
        device_kind=device.device_kind,
        function=_name_function(fn),
        num_devices=len(sharding.device_set),
        versions=_toolchain.get_compiler_versions(chip),
    )
    with tracing_for(chip):
        try:
            lowered = traceable.trace(*args, **kwargs).lower()
        except NotImplementedError as error:
            return report(refusal=Refusal("unsupported", str(error) or repr(error)))
        except ValueError as error:
            # Mosaic GPU knows the chip's shared memory and checks before the compiler does.
            refusal = parse_refusal(str(error))
            if refusal.kind != "out_of_memory" or refusal.requested_bytes is None:
                raise
            return report(refusal=refusal)
        start = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return report(
                refusal=parse_refusal(str(error)), compile_seconds=time.perf_counter() - start
            )
        seconds = time.perf_counter() - start

    memory = compiled.memory_analysis()
    cost = compute_program_cost(compiled)
    collectives, notes = program_collectives(compiled, len(sharding.device_set))
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes
    total += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return report(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        generated_code_bytes=memory.generated_code_size_in_bytes,
        flops=cost.flops,
        bytes_accessed=cost.bytes_accessed,
        cost_is_lower_bound=cost.is_lower_bound,
        collectives=collectives,
        notes=cost.notes + notes,
        compile_seconds=seconds,
        refusal=_check_capacity(chip, total),
        compiled=compiled,
    )


@contextlib.contextmanager
def tracing_for(target: str | Target) -> Iterator[None]:
    """Let code that is traced see ``target`` where it asks for the device.

    A context manager. Pallas kernels ask: their lowering depends on the number of cores and on the
    architecture. `analyze` traces under it; use it to trace or lower a kernel by other means.

    Args:
      target: a name in ``axattn.aot.TARGETS``, or a `Target`.

    Raises:
      ValueError: an unknown target.
      MissingCompilerError: its compiler is not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn import aot
      >>> with aot.tracing_for("cpu"):
      ...     traced = jax.jit(jnp.sin).trace(jnp.ones(3))
      >>> traced.out_info.shape
      (3,)
    """
    chip = find_target(target)
    if chip.platform == "cpu":
        yield
        return
    device = _toolchain.device(chip)
    if chip.gpu is not None:
        cores, capability = chip.gpu.multiprocessors, "{}.{}".format(*chip.gpu.compute_capability)
    else:
        cores, capability = device.num_cores, None
    platform = "gpu" if chip.platform == "cuda" else chip.platform
    with _jax_compat.use_abstract_device(device.device_kind, cores, platform, capability):
        yield


def _check_capacity(chip: Target, total: int) -> Refusal | None:
    """Refuse a program larger than memory: XLA's GPU compiler leaves that to the allocator."""
    if chip.hbm_bytes is None or total <= chip.hbm_bytes:
        return None
    message = f"the compiled program needs {total} bytes of the {chip.hbm_bytes} on {chip.name}"
    return Refusal("out_of_memory", message, "hbm", total, chip.hbm_bytes)


def _choose_sharding(device: jax.Device, args: Any) -> jax.sharding.Sharding:
    """Return where arguments without a placement go: ``device``, or all devices of the others."""
    kept = [
        s for leaf in jax.tree.leaves(args) if (s := _get_own_sharding(leaf, device)) is not None
    ]
    for sharding in kept:
        if isinstance(sharding, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return kept[0] if kept else jax.sharding.SingleDeviceSharding(device)


def _get_own_sharding(leaf: Any, device: jax.Device) -> jax.sharding.Sharding | None:
    """Return a ShapeDtypeStruct's sharding if it is over devices like ``device``, else None."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return None
    if not isinstance(sharding, jax.sharding.Sharding):
        return None
    kind = device.platform, device.device_kind
    # A mesh of JAX's own AbstractMesh has no devices.
    devices = getattr(sharding, "device_set", ())
    return sharding if all((d.platform, d.device_kind) == kind for d in devices) else None


def _prepare(fn, args, kwargs, sharding, donate_argnums, static_argnums):
    """Return ``fn`` with a ``.trace``, and its arguments as shapes that ``sharding`` places."""
    jitted = hasattr(fn, "trace") and hasattr(fn, "lower")
    static = {static_argnums} if isinstance(static_argnums, int) else set(static_argnums)
    static = {i % len(args) for i in static} if args else static
    if not jitted:
        constants = {k: v for k, v in kwargs.items() if not _holds_arrays(v)}
        kwargs = {k: v for k, v in kwargs.items() if k not in constants}
        fn = functools.partial(fn, **constants) if constants else fn
    place = functools.partial(_place_leaf, sharding=sharding)
    args = tuple(a if i in static else jax.tree.map(place, a) for i, a in enumerate(args))
    kwargs = jax.tree.map(place, kwargs)
    placed = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((args, kwargs)))
    if jitted and placed and donate_argnums == () and static_argnums == ():
        return fn, args, kwargs
    # Without an array that says where, the outputs do.
    outputs = {} if placed else {"out_shardings": sharding}
    options = {"donate_argnums": donate_argnums, "static_argnums": static_argnums}
    return jax.jit(fn, **options, **outputs), args, kwargs


def _place_leaf(leaf: Any, sharding: jax.sharding.Sharding) -> Any:
    """Return an array's shape and dtype with its own sharding or this one; keep other leaves."""
    if not _is_array(leaf):
        return leaf
    own = _get_own_sharding(leaf, next(iter(sharding.device_set)))
    weak = getattr(leaf, "weak_type", False)
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=own or sharding, weak_type=weak)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic))


def _holds_arrays(value: Any) -> bool:
    return any(_is_array(leaf) for leaf in jax.tree.leaves(value))


def _name_function(fn: Any) -> str:
    """Return the name of a function for reports."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__name__", None) or type(fn).__name__
