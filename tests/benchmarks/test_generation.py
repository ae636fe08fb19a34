from __future__ import annotations

import dataclasses
import io

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks.harness import generation, generation_tables, processes, sections
from benchmarks.harness.generation import Generate, Model, Result

MODEL = Model(hidden=32, layers=2, heads=4, kv_heads=2, vocabulary=64)
JOB = Generate(
    MODEL,
    "dense",
    "float32",
    batch=2,
    prompt=11,
    generated=7,
    repetitions=2,
    window=4,
    page_size=4,
)


def tokens(job):
    """What the job generates."""
    state, apply = generation._model(job)
    prompt = np.arange(22, dtype=np.int32).reshape(2, 11)
    run = generation._without_cache if job.kind == "none" else generation._with_cache
    process, step, fresh, _, _ = run(job, state, apply, prompt)
    carry = process(fresh())
    found = [carry]
    for _ in range(job.generated - 1):
        # The carry is donated: what is to be looked at later is copied.
        found.append(jax.tree.map(np.array, carry))
        carry = step(carry)
    if job.kind == "none":
        texts, length = carry
        assert int(length) == 11 + 7
        return np.asarray(texts)[:, 11:]
    assert not any(cache.overflowed.any() for cache in carry[1])
    found = [*found[1:], carry]
    return np.concatenate([np.asarray(new) for new, _ in found], axis=1)


@pytest.mark.ci
def test_caches_generate_what_the_baseline_does():
    wanted = tokens(dataclasses.replace(JOB, kind="none"))
    assert wanted.shape == (2, 7)
    assert len(np.unique(wanted)) > 2  # not one token for ever
    for kind in ("dense", "paged"):
        np.testing.assert_array_equal(tokens(dataclasses.replace(JOB, kind=kind)), wanted)


@pytest.mark.ci
def test_samples():
    result = generation._generate(dataclasses.replace(JOB, kind="ring", dtype="int8"))
    assert len(result.prompts) == 2 and len(result.tokens) == 2 * 6
    assert min(result.prompts + result.tokens) > 0 and result.compile_seconds > 0
    # 2 layers x 2 rows x 8 slots x 2 heads x (8 + 4 + 8 + 4) bytes
    assert result.cache_bytes == 1536
    # The baseline, which reads everything again, stops early.
    job = dataclasses.replace(JOB, kind="none", generated=200, repetitions=1)
    result = generation._generate(job)
    assert len(result.prompts) == 1 and len(result.tokens) == 32
    assert min(result.prompts + result.tokens) > 0 and result.cache_bytes is None


def test_models_that_cannot_be():
    wrong = {
        "hidden": (12, "a multiple of 2"),
        "kv_heads": (3, "divide"),
        "layers": (0, "at least"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=f"{name} must (be )?{message}"):
            dataclasses.replace(MODEL, **{name: value})


def test_figures():
    found = generation_tables.figures(JOB, 10, [1.0, 2.0, 6.0])
    assert (found.heads_name, found.kv_heads, found.cache) == ("GQA", 2, "dense")
    assert (found.n, found.median, found.rate) == (3, 2.0, 5.0)
    assert found.stddev == pytest.approx(7**0.5)
    assert generation_tables.figures(JOB, 10, [2.0]).stddev == 0
    assert generation_tables.figures(JOB, 10, []).median is None


def run(monkeypatch, environment, by_kind):
    def call(job, timeout):
        answer = by_kind[job.kind]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(processes, "call", call)
    out = sections.Sections(environment, Console(file=io.StringIO(), width=200))
    todo = [dataclasses.replace(JOB, kind=kind) for kind in by_kind]
    return out, generation_tables.run(out, todo, None)


def test_two_tables(monkeypatch, environment):
    answers = {
        "none": Result((4.0, 4.0), (3.0, 3.0), 1.0, None),
        "dense": Result((2.0, 2.0), (0.5, 1.5), 1.0, 2048),
    }
    out, finished = run(monkeypatch, environment, answers)
    assert finished and not out.failures
    lines = [line.split() for line in out.console.file.getvalue().splitlines() if "GQA" in line]
    assert lines == [
        "GQA, K=2 none - 4.00 s 6 0.00 us 2 1.00 s".split(),
        "GQA, K=2 dense float32 2.00 s 11 0.00 us 2 1.00 s".split(),
        "GQA, K=2 none - 3.00 s 1 0.00 us 2 1.00x -".split(),
        "GQA, K=2 dense float32 1.00 s 2 707 ms 2 3.00x 2.00 KiB".split(),
    ]
    assert [row["tokens"] for row in out.by_name()["prompt"]] == [22, 22]
    assert [row["tokens"] for row in out.by_name()["generation"]] == [2, 2]


def test_a_crash_costs_one_row(monkeypatch, environment):
    answers = {
        "none": processes.ProcessError("its process was ended by SIGSEGV"),
        "dense": Result((2.0,), (0.5,), 1.0, 2048),
        "paged": RuntimeError("Traceback...\nKeyError: 'x'"),
    }
    out, finished = run(monkeypatch, environment, answers)
    assert finished
    assert out.failures == [
        "K=2 none float32: its process was ended by SIGSEGV",
        "K=2 paged float32: KeyError: 'x'",
    ]
    assert [row["cache"] for row in out.by_name()["generation"]] == ["dense"]


def test_interruption_keeps_what_is_there(monkeypatch, environment):
    answers = {"dense": Result((2.0,), (0.5,), 1.0, 2048), "paged": KeyboardInterrupt()}
    out, finished = run(monkeypatch, environment, answers)
    assert not finished
    assert "interrupted: 1 of 2 rows finished" in out.console.file.getvalue()
    assert len(out.by_name()["generation"]) == 1
