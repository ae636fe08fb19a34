from __future__ import annotations

import pytest

from benchmarks.harness import cases, processes, rows
from benchmarks.harness.environment import Environment


@pytest.fixture
def environment() -> Environment:
    return Environment(
        date="2026-01-02T03:04:05+00:00",
        command="python benchmarks/mqa_bench.py",
        platform="cpu",
        device="cpu",
        devices=1,
        cpu="Some CPU",
        cores=2,
        host_bytes=2**34,
        system="Linux",
        python="3.11.7",
        versions={"axattn": "0.1", "jax": "0.10.2"},
        commit=None,
        load=[0.25, 0.5, 1.0],
    )


@pytest.fixture
def make_row():
    def make(config="64/4/2/16", implementation="xla", direction="fwd", where="here", **values):
        case = cases.Case(cases.parse_config(config), implementation, 1, "float32", direction)
        return rows.of_case(case, where, **values)

    return make


@pytest.fixture
def results(make_row):
    """Rows of all kinds: two lengths, two places, a refusal of each kind."""
    made = []
    for where in ("here", "v5p"):
        for length in (16, 64):
            for name, factor in (("repeat_kv", 2), ("xla", 1)):
                timing = dict(
                    time=factor * 1e-3 * length,
                    time_stddev=1e-4,
                    cpu_time=2e-3,
                    iterations=7,
                    repetitions=5,
                    clock="wall",
                )
                row = make_row(
                    f"64/4/2/{length}",
                    name,
                    where=where,
                    device="a device",
                    is_default=name == "xla",
                    memory_kind="host" if where == "here" else "HBM",
                    memory_bytes=factor * 2**20 * length,
                    temp_bytes=2**20,
                    compile_seconds=0.5,
                    flops=None if where == "here" else 1e9,
                    bytes_accessed=None if where == "here" else 2.5e6,
                    cost_is_lower_bound=where != "here",
                    notes="a note, with a comma",
                    **(timing if where == "here" else {}),
                )
                made.append(rows.with_ratios(row, made))
    made.append(
        make_row(
            "64/4/2/256",
            "repeat_kv",
            where="v5p",
            status=rows.OUT_OF_MEMORY,
            reason='out of memory (hbm): 98 "GiB" requested,\n95 available',
            requested_bytes=98 * 2**30,
            available_bytes=95 * 2**30,
        )
    )
    made.append(make_row("64/4/2/256", "cudnn", status=rows.UNSUPPORTED, reason="needs | bfloat16"))
    return made


@pytest.fixture
def worker():
    worker = processes.Worker()
    yield worker
    worker.close()
