"""What a cell's own process does: run a layer here, or compile it for a chip that is not here."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

from benchmarks.harness import environment, layer_rows, plans, refusals
from benchmarks.harness.layer_cases import Case
from benchmarks.harness.layer_rows import HERE, Cell


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a case on this machine: ``warmup`` runs, then ``runs`` that count."""

    case: Case
    warmup: int
    runs: int
    where: str = HERE

    def __call__(self) -> Cell:
        environment.choose_backend()
        return refusals.guarded(_run, self, layer_rows.of_case)


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compile a case for the target ``where``."""

    case: Case
    where: str

    def __call__(self) -> Cell:
        return refusals.guarded(_compile, self, layer_rows.of_case)


Job = Run | Compile


def _is_default(case: Case, platform: str) -> bool:
    from benchmarks.harness import layer_build

    if case.form == "absorbed" or not case.heads_at_once:
        return False
    return case.implementation == layer_build.default_implementation(case, platform)


def _run(job: Run) -> Cell:
    import jax

    from benchmarks.harness import device_time, inputs, layer_build

    case, device = job.case, jax.devices()[0]
    platform = environment.xla_platform(device)
    workload = layer_build.build(case, platform)
    compiled, plan = plans.compiled(workload.fn, workload.args, device)
    is_default = _is_default(case, platform)
    cell = functools.partial(layer_rows.of_case, case, job.where, is_default=is_default, **plan)
    refusal = plans.too_large(plan["memory_bytes"], device)
    if refusal:
        return cell(**refusal)
    given = inputs.random_like(workload.args)
    jax.block_until_ready(given)

    def step() -> None:
        jax.block_until_ready(compiled(*given))

    try:
        step()
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        device_seconds, note = device_time.cold_timer(step, device.platform)
        times = measure(device_seconds or _wall(step), job.warmup, job.runs)
    except jax.errors.JaxRuntimeError as error:
        return cell(**refusals.of_error(error))
    return cell(
        time=statistics.median(times),
        time_std=statistics.stdev(times) if len(times) > 1 else 0.0,
        runs=len(times),
        clock="wall" if device_seconds is None else "device",
        peak_bytes=peak,
        notes=note,
    )


def _wall(step: Callable[[], None]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return seconds


def measure(timer: Callable[[], float], warmup: int, runs: int) -> list[float]:
    """Seconds of so many runs, after as many that do not count."""
    for _ in range(warmup):
        timer()
    return [timer() for _ in range(runs)]


def _compile(job: Compile) -> Cell:
    from axattn import aot
    from benchmarks.harness import layer_build

    case, chip = job.case, aot.target(job.where)
    aot.device(chip)  # first of all: it prepares the environment that JAX starts in
    workload = layer_build.build(case, chip.platform)
    report = aot.analyze(workload.fn, *workload.args, target=chip)
    with aot.tracing_for(chip):
        is_default = _is_default(case, chip.platform)
    plan = plans.of_report(report, chip.platform)
    if plan["flops"] and plan["cost_is_lower_bound"]:
        plan["flops"] = max(plan["flops"], layer_build.flops(case))
    return layer_rows.of_case(
        case,
        job.where,
        is_default=is_default,
        roofline=roofline(chip, plan["flops"], plan["bytes_accessed"]),
        notes="; ".join(report.notes) or None,
        **plan,
    )


def roofline(chip, flops: float | None, accessed: float | None) -> float | None:
    """Seconds at the chip's published rates, of FLOPs in bfloat16; None where one is unknown."""
    if not (flops and accessed and chip.peak_bf16_flops and chip.hbm_bandwidth):
        return None
    return max(flops / chip.peak_bf16_flops, accessed / chip.hbm_bandwidth)
