"""Attention as rows: what is compiled, what runs, and what becomes of what cannot."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from axattn import aot
from benchmarks.harness import function_rows, layer_jobs
from benchmarks.harness.function_rows import Case

SMALL = dict(seq_len=64, heads=4, kv_heads=2, head_dim=16, dtype="float32")


@pytest.mark.parametrize(
    "name, direction",
    [("repeat_kv", "fwd"), ("xla", "fwd+bwd"), ("xla_chunked", "decode"), ("default", "decode")],
)
def test_every_direction_compiles(name, direction):
    case = Case(name, **SMALL, direction=direction)
    row = function_rows.compiled(case, "cpu")
    assert row["status"] == "ok" and row["where"] == "cpu"
    assert {k: row[k] for k in dataclasses.asdict(case)} == dataclasses.asdict(case)
    assert row["roofline"] is None  # a CPU has no published peaks
    assert row["memory_kind"] == "host" and row["memory_bytes"] > 0


def test_decoding_reads_a_cache():
    for dtype, bytes_per_head in (("bfloat16", 2 * 2 * 16), ("int8", 2 * (16 + 4))):
        case = Case("xla", **{**SMALL, "dtype": dtype}, direction="decode")
        _, (cache, query) = function_rows.build(case)
        assert cache.bytes_per_token == 2 * bytes_per_head
        assert query.shape == (1, 1, 4, 16) and query.dtype == "bfloat16"


def test_flops_by_arithmetic():
    forward, both, decode = (Case("xla", 2, 4, 2, 8, direction=d) for d in function_rows.DIRECTIONS)
    # Three pairs of four; a product of two vectors of 8 and one of a weight with 8, each head.
    assert forward.flops == 3 * 4 * (2 * 8 + 2 * 8)
    assert both.flops == 3 * forward.flops
    assert decode.flops == 2 * 4 * (2 * 8 + 2 * 8)


def test_what_the_compiler_cannot_count_is_at_least_the_arithmetic(monkeypatch):
    report = aot.Report(
        "h200", "NVIDIA H200", "f", argument_bytes=100, output_bytes=20, temp_bytes=0,
        alias_bytes=0, flops=7.0, bytes_accessed=3.0, cost_is_lower_bound=True,
    )  # fmt: skip
    monkeypatch.setattr(aot, "device", lambda chip: None)
    monkeypatch.setattr(aot, "analyze", lambda *args, **options: report)
    case = Case("xla", **SMALL)
    row = function_rows.compiled(case, "h200")
    assert (row["flops"], row["bytes_accessed"]) == (case.flops, 120)
    assert row["cost_is_lower_bound"]
    chip = aot.target("h200")
    assert row["roofline"] == layer_jobs.roofline(chip, case.flops, 120)


def test_refusals_are_rows(monkeypatch):
    refusal = aot.Refusal("out_of_memory", "no", "hbm", 2**37, 2**36)
    monkeypatch.setattr(aot, "device", lambda chip: None)
    monkeypatch.setattr(
        aot, "analyze", lambda *args, **options: aot.Report("v5p", "TPU v5", "f", refusal=refusal)
    )
    row = function_rows.compiled(Case("xla", **SMALL), "v5p")
    assert row["status"] == "out_of_memory" and row["requested_bytes"] == 2**37
    assert row["roofline"] is None and "128.00 GiB requested" in row["reason"]


def test_measured_in_turn():
    names = ("repeat_kv", "default", "mosaic_tpu")
    rows = function_rows.measured([Case(name, **SMALL) for name in names], seconds=0.01)
    assert [row["implementation"] for row in rows] == list(names)
    assert all(row["where"] == "here" for row in rows)
    for row in rows[:2]:
        assert row["status"] == "ok" and row["time"] > 0 and row["runs"] >= 3
    if jax.default_backend() != "tpu":
        assert rows[2]["status"] == "unsupported" and "time" not in rows[2]


def test_errors():
    with pytest.raises(ValueError, match="direction takes one of fwd, fwd\\+bwd, decode, got 'up'"):
        Case("xla", 8, direction="up")
    with pytest.raises(ValueError, match="got 'decode'"):
        function_rows.measured([Case("xla", 8, direction="decode")])
