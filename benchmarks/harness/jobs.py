"""What a row's own process does: run a case here, or compile it for a chip that is not here."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence

from benchmarks.harness import environment, plans, refusals, rows
from benchmarks.harness.cases import Case
from benchmarks.harness.rows import Row


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a case on this machine; see `benchmarks.harness.timing.measure` for the numbers."""

    case: Case
    min_time: float
    repetitions: int
    where: str = "here"

    def __call__(self) -> Row:
        environment.choose_backend()
        return refusals.guarded(_run, self, rows.of_case)


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compile a case for the target ``where``."""

    case: Case
    where: str

    def __call__(self) -> Row:
        return refusals.guarded(_compile, self, rows.of_case)


Job = Run | Compile


def _is_default(case: Case, platform: str) -> bool:
    from benchmarks.harness import layers

    return case.implementation in ("default", layers.default_implementation(case, platform))


def _run(job: Run) -> Row:
    import jax

    from benchmarks.harness import device_time, inputs, layers, timing

    case, device = job.case, jax.devices()[0]
    workload = layers.build(case)
    compiled, plan = plans.compiled(workload.fn, workload.args, device, workload.donate_argnums)
    is_default = _is_default(case, environment.xla_platform(device))
    row = functools.partial(rows.of_case, case, job.where, is_default=is_default, **plan)
    notes = workload.notes
    refusal = plans.too_large(plan["memory_bytes"], device)
    if refusal:
        return row(**refusal)

    params, cache, x = inputs.random_like(workload.args, ints=workload.ints)
    jax.block_until_ready((params, cache, x))

    def step():
        nonlocal cache
        out, cache = jax.block_until_ready(compiled(params, cache, x))
        return out

    try:
        step()  # warm-up: first touch of memory, autotuning
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        start = time.perf_counter()
        step()
        estimate = time.perf_counter() - start
        device_seconds, note = device_time.cold_timer(step, device.platform)
        timed = timing.measure(
            case.name,
            step,
            min_time=job.min_time,
            repetitions=job.repetitions,
            device_seconds=device_seconds,
            estimate=estimate,
        )
    except jax.errors.JaxRuntimeError as error:
        return row(**refusals.of_error(error))
    return row(
        time=timed.median,
        time_stddev=timed.stddev,
        cpu_time=timed.cpu,
        iterations=timed.iterations,
        repetitions=timed.repetitions,
        clock=timed.clock,
        allocator_peak_bytes=peak,
        notes="; ".join([*notes, *([note] if note else [])]) or None,
    )


def _compile(job: Compile) -> Row:
    from axattn import aot
    from benchmarks.harness import layers

    case, chip = job.case, aot.target(job.where)
    aot.device(chip)  # first of all: it prepares the environment that JAX starts in
    workload = layers.build(case)
    report = aot.analyze(
        workload.fn, *workload.args, target=chip, donate_argnums=workload.donate_argnums
    )
    with aot.tracing_for(chip):
        is_default = _is_default(case, chip.platform)
    return rows.of_case(
        case,
        job.where,
        is_default=is_default,
        notes="; ".join([*workload.notes, *report.notes]) or None,
        **plans.of_report(report, chip.platform),
    )


def named_targets(values: Sequence[str]) -> list[str]:
    """A repeatable flag --target, whose values may have commas, as a list without repetitions."""
    names = (name.strip() for text in values for name in text.split(","))
    return list(dict.fromkeys(name for name in names if name))


def target_platform(name: str) -> str:
    """cpu, cuda or tpu; ValueError for a target that there is not."""
    from axattn import aot

    return aot.target(name).platform


def check_target(name: str) -> None:
    """ValueError for an unknown target; ImportError, naming the extra, for a missing compiler."""
    from axattn import aot

    aot.check_installed(aot.target(name))


def check_targets(names: Sequence[str]) -> None:
    """`check_target` of all; ValueError, naming the flag --target, whatever is wrong."""
    for name in names:
        try:
            check_target(name)
        except (ValueError, ImportError) as error:
            raise ValueError(f"--target: {error}") from None


def missing_compilers(names: Sequence[str]) -> dict[str, str]:
    """Of these targets those whose compilers are not installed, and what to install."""
    missing = {}
    for name in names:
        try:
            check_target(name)
        except ImportError as error:
            missing[name] = str(error)
    return missing


def implementations() -> tuple[str, ...]:
    """All names that a case may give as its implementation."""
    from axattn._implementations import registry
    from benchmarks.harness.baselines import BASELINES

    return (*BASELINES, "default", *registry.NAMES)


def implementations_for(platform: str) -> list[str]:
    """axattn's implementations that exist for a platform: cpu, cuda, rocm or tpu."""
    from axattn._implementations import flash, registry

    return [
        name
        for name, implementation in registry.IMPLEMENTATIONS.items()
        if platform in implementation.platforms
        and (implementation.attend is not None or name in flash.NAMES)
    ]


def peers_for(platform: str) -> list[str]:
    """Kernels of others for a platform."""
    return ["splash"] if platform == "tpu" else []


@dataclasses.dataclass(frozen=True)
class Describe:
    """Where we are, asked in a process of its own: starting a backend takes hold of the device."""

    def __call__(self) -> environment.Environment:
        environment.choose_backend()
        return environment.describe()
