from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from benchmarks.harness import cache_compile, cache_report, sections
from benchmarks.harness.cache_compile import Compiled

LAYER = {"bfloat16": 2 * 64 * 512, "int8": 2 * 64 * 264}
SIZES = dataclasses.replace(cache_report.PRESETS["smoke"], tokens=64)


@pytest.fixture
def out(environment):
    return sections.Sections(environment, Console(file=io.StringIO(), width=200))


def answers(monkeypatch, **by_dtype):
    def compile_append(case, target):
        return by_dtype[case.dtype]

    monkeypatch.setattr(cache_compile, "compile_append", compile_append)


def agreeing(size, **changes):
    return Compiled(**{**dict(claimed=size, aliased=size, tiled=size, temp=7), **changes})


def lines(out, first):
    return [
        line.split() for line in out.console.file.getvalue().splitlines() if line.startswith(first)
    ]


def test_bytes(out, monkeypatch):
    answers(monkeypatch, **{dtype: agreeing(size) for dtype, size in LAYER.items()})
    cache_report.bytes_tables(out, SIZES, ["v5p"])
    assert not out.failures
    assert lines(out, "dense") == [
        "dense bfloat16 512 B 512 B 1.00x 64.00 KiB 128 KiB 64.00 KiB +0.0% yes 7 B".split(),
        "dense int8 264 B 264 B 0.52x 33.00 KiB 66.00 KiB 33.00 KiB +0.0% yes 7 B".split(),
    ]
    assert "MQA, K=1: N=4 H=128, 2 x 64 tokens" in out.console.file.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claimed": 5}, "dense int8, K=1, v5p: by hand 33792 B, nbytes says 5 B"),
        ({"aliased": 33791}, "of which only 33791 B are updated in place"),
        ({"aliased": 40000, "tiled": 40001}, "in tiles 40001 B, compiled 40000 B"),
    ],
)
def test_what_does_not_agree_fails_by_name(out, monkeypatch, changes, message):
    wrong = agreeing(LAYER["int8"], **changes)
    answers(monkeypatch, bfloat16=agreeing(LAYER["bfloat16"]), int8=wrong)
    cache_report.bytes_tables(out, SIZES, ["v5p"])
    assert len(out.failures) == 2  # dense and paged
    assert "dense int8, K=1" in out.failures[0] and message in out.failures[0]
    assert f"FAILED: {out.failures[0]}" in out.console.file.getvalue()


def test_tiles_are_no_disagreement(out, monkeypatch):
    tiled = agreeing(LAYER["int8"], aliased=2 * LAYER["int8"], tiled=2 * LAYER["int8"])
    answers(monkeypatch, bfloat16=agreeing(LAYER["bfloat16"]), int8=tiled)
    cache_report.bytes_tables(out, SIZES, ["v5p"])
    assert not out.failures
    assert "+100.0%" in lines(out, "dense")[1]


@pytest.mark.parametrize(("temp", "copies"), [(2 * 64 * 128 - 1, False), (2 * 64 * 128, True)])
def test_an_append_that_copies_is_pointed_at(out, monkeypatch, temp, copies):
    int8 = agreeing(LAYER["int8"], temp=temp)  # keys, without scales: 2 x 64 x 128 bytes
    answers(monkeypatch, bfloat16=agreeing(LAYER["bfloat16"]), int8=int8)
    cache_report.bytes_tables(out, SIZES, ["v5p"])
    assert not out.failures
    note = "! to append one token takes as much memory again as all keys: dense int8, paged int8"
    assert (note in out.console.file.getvalue()) == copies


def test_million(out, monkeypatch):
    monkeypatch.setattr(
        cache_compile, "compile_append", lambda case, _: agreeing(case.kv_heads * 2**29)
    )
    cache_report.million_tables(out, ["v5p"])
    assert not out.failures
    repeated, shared = lines(out, "32,") + lines(out, "4,")
    assert repeated[2:14] == "8.00 GiB 8.00 GiB 16.00 GiB 8.59 GB 8.59 GB 17.18 GB".split()
    assert shared[2:14] == "1.00 GiB 1.00 GiB 2.00 GiB 1.07 GB 1.07 GB 2.15 GB".split()


def test_trace(out):
    cache_report.trace_table(out, SIZES)
    dense, *paged = lines(out, "dense") + lines(out, "paged")
    assert dense[-1] == "1.00x"
    assert [line[1] for line in paged] == ["16", "64", "256"]
    assert all(float(line[2].rstrip("x")) >= 1 for line in paged)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="kv_heads must divide heads"):
        dataclasses.replace(SIZES, kv_heads=(4, 3))
    with pytest.raises(ValueError, match="tokens must be at least 2"):
        dataclasses.replace(SIZES, tokens=1)
