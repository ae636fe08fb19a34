"""What a cell's own process does: compile a case for the chips of a mesh that is not here."""

from __future__ import annotations

import dataclasses

from axattn.aot._targets import Target
from benchmarks.harness import environment, plans, refusals, scale_rows
from benchmarks.harness.scale_cases import Case
from benchmarks.harness.scale_rows import Cell


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compile a case for the target ``where``; ``"cpu"``: for simulated devices."""

    case: Case
    where: str

    def __call__(self) -> Cell:
        return refusals.guarded(_compile, self, scale_rows.of_case)


def _compile(job: Compile) -> Cell:
    import jax

    from axattn import aot

    chip = aot.target(job.where)
    if chip.platform == "cpu":
        environment.choose_backend()
        jax.config.update("jax_num_cpu_devices", job.case.chips)
    return compiled(job.case, chip)


def compiled(case: Case, chip: Target) -> Cell:
    """The cell of a case for the target ``chip``."""
    from axattn import aot, parallel
    from benchmarks.harness import scale_build

    aot.device(chip)  # first of all: it prepares the environment that JAX starts in
    mesh = aot.mesh(chip, case.axes)
    estimate = None
    if chip.platform != "cpu":
        estimate = scale_build.estimate(case, mesh, parallel.Links.from_target(chip))
    workload = scale_build.build(case, mesh)
    report = aot.analyze(workload.fn, *workload.args, target=chip)
    plan = plans.of_report(report, chip.platform)
    plan["compiled_flops"], flops = plan.pop("flops"), scale_build.flops(case)
    sent = {found.kind: found.sent_bytes for found in report.collectives}
    roofline, bound = None, None
    if report.ok:
        roofline, bound = scale_rows.roofline(chip, flops, report.bytes_accessed, sent)
    return scale_rows.of_case(
        case,
        chip.name,
        argument_bytes=report.argument_bytes,
        sent=sent,
        flops=flops,
        roofline=roofline,
        bound=bound,
        estimate=estimate,
        notes="; ".join([*report.notes, *_remarks(case, sent)]) or None,
        **plan,
    )


def _remarks(case: Case, sent: dict[str, float]) -> list[str]:
    """What in the figures is the compiler's doing."""
    if case.strategy == "gather" and "all-reduce" in sent and "all-gather" not in sent:
        return [f"gather over {case.chips} chips: the compiler does it by sums, of twice the bytes"]
    return []
