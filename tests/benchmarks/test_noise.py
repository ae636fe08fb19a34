"""Ratios of times that differ by less than they spread are marked."""

from __future__ import annotations

import dataclasses
import io
import os

from rich.console import Console

from benchmarks.harness import (
    cache_steps,
    environment,
    generation_tables,
    layer_cases,
    layer_rows,
    noise,
    output,
    paired,
    report,
    rows,
    units,
)
from tests.benchmarks.test_generation import JOB


def test_times():
    for spread, marked in ((0.0, False), (0.05, False), (0.08, True), (0.2, True)):
        # Either of the two, or both together.
        assert noise.of_times(1.0, spread, 1.1, spread) == marked
        assert noise.of_times(1.1, spread * 2**0.5, 1.0, None) == marked
        assert noise.of_times(1.0, 0.0, 1.1, spread * 2**0.5) == marked


def test_what_was_not_measured_is_no_noise():
    assert not noise.of_times(None, None, 1.0, 0.5)
    assert not noise.of_ratios([]) and not noise.of_ratios([1.01])


def test_ratios():
    assert noise.of_ratios([0.9, 1.0, 1.05, 1.2])
    assert not noise.of_ratios([1.9, 2.0, 2.1]) and noise.of_ratios([1.9, 2.0, 2.1], other=2.05)
    # One round that something else fell into.
    assert not noise.of_ratios([2.0, 2.0, 2.01, 2.01, 2.02, 40.0])
    same = paired.Paired({"a": (1.0, 2.0, 9.0), "b": (1.1, 1.9, 9.1)})
    assert noise.of_ratios(same.ratios("a", "b")) and not noise.of_ratios(same.ratios("a", "a"))


def test_sign_test():
    # One in 32, and 10 in 512, and 46 in 512.
    assert noise.is_above([1.06] * 5, 1.05) and not noise.is_above([1.06] * 4, 1.05)
    assert noise.is_above([9.0] * 8 + [0.1], 1.05) and not noise.is_above(
        [9.0] * 7 + [0.1] * 2, 1.05
    )
    assert not noise.is_above([1.04] * 50, 1.05) and not noise.is_above([], 1.05)
    assert noise.is_above([1.06] * 7 + [1.0] * 2, 1.05, risk=0.1)


def test_rows_of_mqa_bench(tmp_path, make_row, environment):
    base = make_row(implementation="repeat_kv", time=1.0, time_stddev=0.1)
    base = rows.with_ratios(base, [base])
    near = rows.with_ratios(make_row(time=0.95, time_stddev=0.01), [base])
    far = rows.with_ratios(
        make_row(implementation="xla_chunked", time=0.5, time_stddev=0.1), [base]
    )
    assert [row.speedup_is_noise for row in (base, near, far)] == [False, True, False]
    for found, marked in (([base, near, far], True), ([base, far], False)):
        session = report.Session(environment, Console(file=io.StringIO(), width=300))
        session.rows = found
        for row in found:
            session._show(row)
        session.close(with_published=False)
        path = tmp_path / "out.md"
        output.write(path, found, environment)
        for text in (session.console.file.getvalue(), path.read_text("utf-8")):
            assert ("1.05x ~" in text) == (noise.LEGEND in text) == marked
            assert "2.00x" in text and "2.00x ~" not in text and "1.00x ~" not in text


def test_cells_of_layer_bench():
    case = next(
        layer_cases.cases(layer_cases.MODELS["tiny"], "SelfAttention", ["xla"], "float32", "fwd")
    )
    base, near = (layer_rows.of_case(case, "here", time=time, time_std=0.1) for time in (1.0, 0.95))
    assert not layer_rows.compared(base, base).speedup_is_noise
    near = layer_rows.compared(near, base)
    columns = {column.header: column for column in layer_rows.columns("here", "cpu")}
    assert columns["Speed-up"].cell(near) == "1.05x ~"
    (best,) = layer_rows.best([near])
    assert best.speedup_is_noise


def test_tokens_of_generate_bench():
    base = generation_tables.figures(dataclasses.replace(JOB, kind="none"), 1, [1.0, 1.2, 0.8])
    near = generation_tables.figures(JOB, 1, [0.9, 1.1, 0.9])
    assert generation_tables.with_speedup(near, [base]).speedup_is_noise
    assert not generation_tables.with_speedup(base, [base]).speedup_is_noise


def test_steps_of_kv_cache_bench(monkeypatch):
    measured = paired.Paired(
        {"8/16": (1.0, 1.0, 1.0), "8/32": (0.9, 1.05, 1.2), "16/32": (2.0,) * 3}
    )
    monkeypatch.setattr(cache_steps, "_Step", lambda case, tokens: None)
    monkeypatch.setattr(cache_steps.paired, "compare", lambda steps, seconds: measured)
    case = cache_steps.CacheCase("dense", "float32", 1, 2, 1, 8, 1, 16, 8)
    found = cache_steps.time_steps(case, [(8, 16), (8, 32), (16, 32)], 0)
    assert [step.growth_is_noise for step in found] == [False, True, False]


def test_load_average(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.123, 4.0, 5.678))
    assert environment.load_average() == [0.12, 4.0, 5.68]

    def fails():
        raise OSError

    monkeypatch.setattr(os, "getloadavg", fails)
    assert environment.load_average() is None


def test_the_mark():
    assert units.ratio(1.05, True) == "1.05x ~" and units.ratio(1.05) == "1.05x"
    assert units.ratio(None, True) == units.NOTHING
