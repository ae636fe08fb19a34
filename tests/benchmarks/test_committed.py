"""Results in the repository, read back."""

from __future__ import annotations

import pytest

from benchmarks.harness import committed


def test_rows_and_where_they_are_from():
    rows = committed.rows("axlearn-v5p-aot.json")
    assert {row["where"] for row in rows} == {"v5p"}
    text = committed.provenance("axlearn-v5p-aot.json")
    assert text.startswith("benchmarks/results/axlearn-v5p-aot.json: 20")
    assert "jax 0." in text and "libtpu 0." in text and "`python benchmarks/mqa_bench.py`" in text


def test_sections():
    text = committed.section("hopper-kernels.md", "Ceilings")
    assert text.startswith("Per SM and clock") and "\n## " not in text


def test_errors():
    with pytest.raises(ValueError, match="name takes one of .*layers.json.*, got 'nothing.json'"):
        committed.path("nothing.json")
    with pytest.raises(ValueError, match="heading takes one of .*HBM.*, got 'Speed'"):
        committed.section("tpu-kernels.md", "Speed")
