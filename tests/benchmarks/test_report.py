from __future__ import annotations

import dataclasses
import io
import os

import pytest
from rich.console import Console

from benchmarks.harness import cases, jobs, processes, report, rows


def case(implementation, direction="fwd"):
    return cases.Case(cases.parse_config("64/4/2/16"), implementation, 1, "float32", direction)


def session(environment):
    console = Console(file=io.StringIO(), width=200)
    return report.Session(environment, console), console.file


def compile_jobs(*names):
    return [jobs.Compile(case(name), "v5p") for name in names]


def answers(monkeypatch, by_name):
    def call(job, timeout):
        answer = by_name[job.case.implementation]
        if isinstance(answer, BaseException):
            raise answer
        return rows.of_case(job.case, job.where, device="TPU v5", **answer)

    monkeypatch.setattr(processes, "call", call)


def test_a_crash_costs_one_row(monkeypatch, environment):
    answers(
        monkeypatch,
        {
            "repeat_kv": dict(memory_bytes=400),
            "xla": processes.ProcessError("its process was ended by SIGSEGV"),
            "cudnn": RuntimeError("Traceback...\nKeyError: 'x'"),
            "xla_chunked": dict(memory_bytes=100),
        },
    )
    run, out = session(environment)
    assert run.run(compile_jobs("repeat_kv", "xla", "cudnn", "xla_chunked"), None)
    assert [row.status for row in run.rows] == ["ok", "failed", "failed", "ok"]
    assert run.rows[3].memory_ratio == 0.25
    assert run.failed
    text = out.getvalue()
    assert "failed: its process was ended by SIGSEGV" in text
    assert "failed: KeyError: 'x'" in text


def test_interruption_keeps_what_is_there(monkeypatch, environment):
    answers(monkeypatch, {"repeat_kv": dict(memory_bytes=400), "xla": KeyboardInterrupt()})
    run, out = session(environment)
    assert not run.run(compile_jobs("repeat_kv", "xla", "xla_chunked"), None)
    assert len(run.rows) == 1
    assert "interrupted: 1 of 3 rows finished" in out.getvalue()


def test_refusals_are_rows_and_no_failures(monkeypatch, environment):
    refused = dict(status=rows.OUT_OF_MEMORY, reason="out of memory (hbm): 99 of 95")
    answers(monkeypatch, {"repeat_kv": refused, "xla": dict(memory_bytes=1, is_default=True)})
    run, out = session(environment)
    assert run.run(compile_jobs("repeat_kv", "xla"), None)
    assert not run.failed
    run.close(with_published=True)
    text = out.getvalue()
    assert "    out of memory (hbm): 99 of 95" in text
    assert "xla *" in text and "* what axattn takes by itself" in text
    assert "869 -> 860 ms" in text


def test_every_place_has_its_table(monkeypatch, environment):
    answers(monkeypatch, {"xla": dict(memory_bytes=1)})
    run, out = session(environment)
    run.run([jobs.Run(case("xla"), 0.1, 3), *compile_jobs("xla")], None)
    here, target = out.getvalue().split("Compiled for v5p (TPU v5); nothing was run")
    assert "Host memory" in here and "HBM" not in here
    assert "HBM ratio" in target
    assert (
        "Some CPU, 2 cores, 16 GiB, load 0.25 0.50 1.00; Python 3.11.7, axattn 0.1, jax 0.10.2"
        in here
    )


@dataclasses.dataclass(frozen=True)
class Dying:
    case: cases.Case
    where: str = "here"

    def __call__(self):
        os._exit(9)


@pytest.mark.ci
def test_a_real_crash():
    row = report.finish(Dying(case("xla")), None)
    assert row.status == rows.FAILED and "exit code 9" in row.reason
