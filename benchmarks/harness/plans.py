"""What the compiler plans for a program, as fields of rows and cells."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness import environment, refusals, rows, units


def compiled(
    fn: Callable, args: Sequence[Any], device: Any, donate_argnums: Sequence[int] = ()
) -> tuple[Any, dict[str, Any]]:
    """The program for this machine's ``device``, and what it takes of it."""
    import jax

    lowered = jax.jit(fn, donate_argnums=donate_argnums).lower(*args)
    start = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    plan = program.memory_analysis()
    memory = plan.argument_size_in_bytes + plan.output_size_in_bytes
    memory += plan.temp_size_in_bytes - plan.alias_size_in_bytes
    return program, dict(
        device=device.device_kind,
        memory_kind="host" if device.platform == "cpu" else "HBM",
        memory_bytes=memory,
        temp_bytes=plan.temp_size_in_bytes,
        compile_seconds=seconds,
    )


def too_large(memory: int, device: Any) -> dict[str, Any]:
    """Why a program is not run that takes more memory than a host has; nothing where it can be.

    Trying would have the kernel end some process or other.
    """
    there = environment.host_bytes() if device.platform == "cpu" else None
    if there is None or memory <= there:
        return {}
    reason = f"needs {units.size(memory)} of host memory, the machine has {units.size(there)}"
    return dict(
        status=rows.OUT_OF_MEMORY, reason=reason, requested_bytes=memory, available_bytes=there
    )


def of_report(report: Any, platform: str) -> dict[str, Any]:
    """Of an `axattn.aot.Report`; its notes are the caller's."""
    refusal = refusals.of_refusal(report.refusal) if report.refusal is not None else {}
    return dict(
        device=report.device_kind,
        memory_kind="host" if platform == "cpu" else "HBM",
        memory_bytes=report.total_bytes,
        temp_bytes=report.temp_bytes,
        compile_seconds=report.compile_seconds,
        flops=report.flops,
        bytes_accessed=report.bytes_accessed,
        cost_is_lower_bound=report.cost_is_lower_bound,
        **refusal,
    )
