"""Times of tracing, and the code that runs meanwhile."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import axattn
from benchmarks.harness import trace_rows
from benchmarks.harness.trace_rows import Program, columns, count_code, measure
from tests.benchmarks.test_scripts import script


def program(fn, direction="fwd", what="call", name="xla"):
    arrays = (jnp.ones((1, 4, 2, 8)),) * 3
    return Program(what, name, direction, jax.jit(fn), arrays)


def test_the_least_of_all_rounds(monkeypatch):
    ticks = iter([0.0, 5.0, 7.0, 8.0, 10.0, 12.0, 15.0, 19.0])
    monkeypatch.setattr(trace_rows.time, "perf_counter", lambda: next(ticks))
    found = program(lambda q, k, v: q + k + v)
    measure(found, compiles=True)
    measure(found, compiles=True)
    assert (found.trace, found.lower, found.compile, found.made) == (2.0, 2.0, 1.0, 4.0)


def test_a_refusal_is_a_reason():
    def fn(*arrays):
        return axattn.dot_product_attention(*arrays, implementation="mosaic_tpu")

    found = program(fn)
    measure(found, compiles=False)
    assert "mosaic_tpu" in found.reason and found.made is None


def test_what_fails_costs_its_own_line():
    def fn(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large\nand more")

    found = program(fn)
    measure(found, compiles=True)
    assert "too large" in found.reason and found.made is None


def test_code_is_counted_that_runs_in_the_package_alone():
    found = program(lambda q, k, v: q + k + v)
    count_code(found)
    assert (found.code, found.files) == (0, 0)
    found = program(lambda *arrays: axattn.dot_product_attention(*arrays, implementation="xla"))
    count_code(found)
    assert 20 < found.code < 200 and 8 < found.files < 30


def test_ratios():
    def made(what, name, seconds):
        return Program(what, name, "fwd", None, (), trace=seconds / 2, lower=seconds / 2)

    rows = [
        made("layer", "None", 6.0), made("layer", "xla", 3.0), made("layer", "flax", 2.0),
        made("call", "None", 1.0), made("call", "jax.nn", 4.0),
    ]  # fmt: skip
    by_header = {column.header: column.cell for column in columns(rows, "xla", compiles=False)}
    assert [by_header["vs. Flax, jax.nn"](row) for row in rows[:3]] == ["3.00x", "1.50x", "1.00x"]
    assert by_header["vs. Flax, jax.nn"](rows[3]) == "0.25x"
    assert by_header["vs. named"](rows[0]) == "2.00x"
    assert by_header["vs. named"](rows[3]) == "-"


@pytest.mark.ci
def test_script():
    out, _ = script("trace_bench.py", "--length=64", "--heads=4/2/8", "--features=16", "--rounds=1")
    rows = [line.split() for line in out.splitlines() if line.startswith(("layer", "call"))]
    assert len(rows) == 2 * 2 * 7
    assert [row[1] for row in rows[:4:2]] == ["None", "xla"]
    assert "lowered for cpu" in out
